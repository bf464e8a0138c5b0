"""The HTTP routes of the plug-in on vLLM's own API server, protected by its API key.

`POST /v1/tokencake/events` and `GET /v1/tokencake/state`, `/decisions` and `/steps` call the scheduler of each engine
core over vLLM's utility RPC, which wakes an idle engine. Every response reports what the engines did.

If tenants are isolated (`space.tenant_mark`), the parameter `tenant` is a mark, with which the proxy proves the tenant
of a request. Without a mark, the state is the operator's, and events are ignored.
"""

from __future__ import annotations

import asyncio
import time
from math import nan
from typing import TYPE_CHECKING, Any, Final

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from vllm.logger import init_logger
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

from tokencake import protocol
from tokencake.protocol.parsing import short_repr
from tokencake.settings import section
from tokencake.space_scheduler.settings import SpaceSettings
from tokencake_vllm.api.metrics import ScrapeMiddleware, count_event, register_metrics
from tokencake_vllm.tenant_secret import TenantSecret

if TYPE_CHECKING:
    from argparse import Namespace

    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

logger = init_logger("vllm.tokencake")

STEPS_PATH: Final = "/v1/tokencake/steps"
MAX_PAGE: Final = 200
"""Calls or decisions in one answer: what the engine's loop makes of them takes it a few milliseconds."""
MAX_STEPS: Final = 1_000
MAX_LIMIT: Final = 10_000
"""What may be asked for; a page holds less, and `next` leads on."""
_LAST_S: Final = 1e11
ANSWER_S: Final = 30.0
"""An engine core that takes longer is stuck or dead; vLLM itself would wait for its answer for ever."""

# Data-parallel engines all see every event; the one that knows the session has the say.
_BEST_FIRST: Final[tuple[protocol.EventOutcome, ...]] = ("applied", "duplicate", "late", "invalid", "unknown")


class SchedulerCalls:
    """Calls a method of our scheduler in each engine core behind `engine_client`."""

    def __init__(self, engine_client: EngineClient) -> None:
        self._core: Any = engine_client.engine_core  # type: ignore[attr-defined]  # AsyncLLM's; no public path exists

    async def __call__(self, method: str, *args: Any, timeout_s: float = ANSWER_S) -> list[Any]:
        """One result per engine core; empty where none runs our scheduler.

        Raises:
            TimeoutError: an engine core did not answer in time.
        """
        async with asyncio.timeout(timeout_s):
            if hasattr(self._core, "call_utility_all_async"):
                results = await self._core.call_utility_all_async("tokencake", method, args)
            else:  # vLLM 0.31 has the same under another name
                ask = self._core._call_utility_async  # noqa: SLF001
                engines = self._core.core_engines
                results = await asyncio.gather(*(ask("tokencake", method, args, engine=engine) for engine in engines))
        return [result for result in results if result is not None]


class TokenCakeEndpoints(EndpointPlugin):
    """The `vllm.endpoint_plugins` contract."""

    name = "tokencake_http"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, and a look at the engine's counters before each scrape of `/metrics`."""
        app.add_api_route(protocol.EVENTS_PATH, _post_events, methods=["POST"], include_in_schema=True)
        app.add_api_route(protocol.STATE_PATH, _get_state, methods=["GET"], include_in_schema=True)
        app.add_api_route(protocol.DECISIONS_PATH, _get_decisions, methods=["GET"], include_in_schema=True)
        app.add_api_route(STEPS_PATH, _get_steps, methods=["GET"], include_in_schema=True)
        app.add_middleware(ScrapeMiddleware)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Keep the way to the engine; there is none in a render-only server."""
        register_metrics()
        settings = section(getattr(args, "additional_config", None), "space", SpaceSettings)
        state.tokencake_secret = None if settings.tenant_mark is None else TenantSecret()
        state.tokencake = None if engine_client is None else SchedulerCalls(engine_client)


def create_endpoints() -> TokenCakeEndpoints:
    """Entry point of `vllm.endpoint_plugins`."""
    return TokenCakeEndpoints()


def _error(status: int, message: str) -> Response:
    """An error in OpenAI's shape."""
    kind = "BadRequestError" if status < 500 else "ServiceUnavailableError"  # noqa: PLR2004  # HTTP's own border
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


def _asking(request: Request, mark: str | None) -> str | None:
    """The prefix of the tenant that asks, as `mark` proves it; None is the operator.

    Raises:
        _RefusedError: nothing proves it, or this engine knows of no tenants.
    """
    secret: TenantSecret | None = request.app.state.tokencake_secret
    if mark is None:
        return None
    if secret is None:
        setting = '--additional-config \'{"tokencake": {"space": {"tenant_mark": "::"}}}\''
        raise _RefusedError(501, f"this engine does not keep tenants apart, as its proxy does; start it with {setting}")
    prefix = secret.tenants().prefix_from_mark(mark)
    if prefix is None:
        raise _RefusedError(403, "`tenant` is not the mark of a proxy that has this engine's tenant secret")
    return prefix


class _RefusedError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def _read_body(request: Request, *, is_scoped: bool) -> bytes:
    chunks: list[bytes] = []
    size = 0
    limit = protocol.SCOPED_BODY_BYTES if is_scoped else protocol.MAX_BODY_BYTES
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise protocol.TooLargeError("body", f"has more than {protocol.MAX_BODY_BYTES} bytes; send smaller batches")
        chunks.append(chunk)
    return b"".join(chunks)


async def _post_events(request: Request, tenant: str | None = None) -> Response:
    received = time.time()
    try:
        asking = _asking(request, tenant)
        prefix = asking or ""
        parsed = protocol.parse_events(await _read_body(request, is_scoped=bool(prefix)), prefix)
    except _RefusedError as error:
        return _error(error.status, str(error))
    except protocol.TooLargeError as error:
        return _error(413, str(error))
    except protocol.ProtocolError as error:
        return _error(400, str(error))
    if asking is None and request.app.state.tokencake_secret is not None:
        parsed = [
            event if isinstance(event, protocol.ProtocolError) else _unmarked(index)
            for index, event in enumerate(parsed)
        ]
    valid = [protocol.to_wire(event) for event in parsed if not isinstance(event, protocol.ProtocolError)]
    answers = await _ask(request, "tokencake_events", valid, received, prefix)
    if isinstance(answers, Response):
        return answers
    outcomes = iter([min(each, key=_BEST_FIRST.index) for each in zip(*(a["outcomes"] for a in answers), strict=True)])
    results = []
    for event in parsed:
        if isinstance(event, protocol.ProtocolError):
            results.append({"outcome": "invalid", "error": str(event)})
            count_event("unreadable", "invalid")
        else:
            results.append({"outcome": (outcome := next(outcomes))})
            if outcome == "unknown":
                count_event(event.type, outcome)
    need = sorted({graph for answer in answers for graph in answer["need"]})
    return JSONResponse(_unscoped({"v": protocol.VERSION, "results": results, "need": need}, asking))


def _unmarked(index: int) -> protocol.UnmarkedError:
    return protocol.UnmarkedError(
        f"events[{index}]", "does not count: this engine takes events through `tokencake proxy --tenants`"
    )


async def _get_state(
    request: Request,
    session: str | None = None,
    app: str | None = None,
    tenant: str | None = None,
    limit: str = "100",
    before: str | None = None,
) -> Response:
    try:
        asking, calls, end = _asking(request, tenant), _limit(limit, MAX_PAGE), _before(before)
    except _RefusedError as error:
        return _error(error.status, str(error))
    answers = await _ask(request, "tokencake_state", session, app, calls, asking, end)
    if isinstance(answers, Response):
        return answers
    page = _page(answers, "calls", calls)
    return JSONResponse(_unscoped({**_merged(answers), **page}, asking))


async def _get_decisions(
    request: Request,
    call: str | None = None,
    app: str | None = None,
    tenant: str | None = None,
    limit: str = "100",
    before: str | None = None,
) -> Response:
    try:
        asking, entries, end = _asking(request, tenant), _limit(limit, MAX_PAGE), _before(before)
    except _RefusedError as error:
        return _error(error.status, str(error))
    answers = await _ask(request, "tokencake_decisions", call, app, entries, asking, end)
    if isinstance(answers, Response):
        return answers
    longest_s = max(answer["longest_wait_s"] for answer in answers)
    view = {"v": protocol.VERSION, "longest_wait_s": longest_s, **_page(answers, "decisions", entries)}
    return JSONResponse(_unscoped(view, asking))


async def _get_steps(request: Request, limit: str = "1000", before: str | None = None) -> Response:
    try:
        steps, end = _limit(limit, MAX_STEPS), _before(before)
    except _RefusedError as error:
        return _error(error.status, str(error))
    answers = await _ask(request, "tokencake_steps", steps, end)
    if isinstance(answers, Response):
        return answers
    return JSONResponse({"v": protocol.VERSION, **_page(answers, "steps", steps)})


def _limit(text: str, page: int) -> int:
    """The parameter `limit`, or what a `page` holds if that is less.

    Raises:
        _RefusedError: it is no number from 1 to `MAX_LIMIT`.
    """
    if text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_LIMIT)) and 1 <= int(text) <= MAX_LIMIT:
        return min(int(text), page)
    raise _RefusedError(
        400,
        f"limit is {short_repr(text)}; expected a number from 1 to {MAX_LIMIT}. One answer has {page} at most; "
        "`before={next}` asks for what is older",
    )


def _before(text: str | None) -> float | None:
    """The parameter `before`.

    Raises:
        _RefusedError: it is no time.
    """
    if text is None:
        return None
    try:
        end = float(text)
    except ValueError:
        end = nan
    if 0 <= end < _LAST_S:
        return end
    raise _RefusedError(
        400, f"before is {short_repr(text)}; expected the `next` of an earlier answer: seconds since the epoch"
    )


def _page(answers: list[dict[str, Any]], name: str, limit: int) -> dict[str, Any]:
    """The newest page of what several engines answered, oldest first, and where the next page begins."""
    next_s = max((answer["next"] for answer in answers if answer["next"] is not None), default=None)
    entries = [entry for answer in answers for entry in zip(answer["order"], answer[name], strict=True)]
    entries.sort(key=lambda entry: entry[0])
    if next_s is not None:  # an engine that has shown more than the others shows it again on the next page
        entries = [entry for entry in entries if entry[0] >= next_s]
    if len(entries) > limit:
        entries = entries[-limit:]
        next_s = entries[0][0]
    return {name: [entry for _, entry in entries], "next": next_s}


def _unscoped(value: Any, tenant: str | None) -> Any:
    """`value` as its tenant may read it: its ids, which are fields of their own, without the proxy's prefix."""
    if tenant is None:
        return value
    match value:
        case str():
            return value.removeprefix(tenant)
        case dict():
            return {name.removeprefix(tenant): _unscoped(item, tenant) for name, item in value.items()}
        case list():
            return [_unscoped(item, tenant) for item in value]
    return value


def _merged(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """One state of several engines, each of which saw some calls of a session; without the calls."""
    apps: dict[str, Any] = {}
    sessions: dict[str, Any] = {}
    for answer in answers:
        apps.update(answer["apps"])
        for name, view in answer["sessions"].items():
            other = sessions.get(name)
            if other is None or (view["status"] == "running", view["touched"]) > (
                other["status"] == "running",
                other["touched"],
            ):
                sessions[name] = view
    sums = {
        part: {name: sum(answer[part][name] for answer in answers) for name in answers[0][part]}
        for part in ("totals", "kv_blocks")
    }
    rest = {part: value for part, value in answers[0].items() if part != "order"}
    return {**rest, **sums, "apps": apps, "sessions": sessions}


async def _ask(request: Request, method: str, *args: Any) -> list[Any] | Response:
    calls: SchedulerCalls | None = request.app.state.tokencake
    try:
        answers = [] if calls is None else await calls(method, *args)
    except TimeoutError:
        return _error(503, f"the engine did not answer within {ANSWER_S:g} s")
    if not answers:
        return _error(501, "this engine does not run TokenCake's scheduler; start it with `tokencake engine`")
    return answers
