"""How does one request get to an engine, and its answer back?

An answer that breaks off is never ended cleanly, because a clean end would make it look complete: the connection is
closed without the last chunk (or short of its Content-Length), which every HTTP client reports. Where the answer is a
stream of server-sent events that stands between two events, one `error` event goes before, so that OpenAI's and
Anthropic's clients raise the reason instead of a bare network error.
"""

from __future__ import annotations

import asyncio
from functools import partial
from http import HTTPStatus
from time import perf_counter
from typing import TYPE_CHECKING, Final, cast

import httpx

from tokencake_proxy.body import Body, ClientLeftError
from tokencake_proxy.errors import Refusal, error_event, send_refusal
from tokencake_proxy.headers import first_value, request_lines, response_lines
from tokencake_proxy.media import is_costly
from tokencake_proxy.routes import EVENTS_ROUTE, is_guarded
from tokencake_proxy.upstream import Call, Engine

if TYPE_CHECKING:
    from tokencake_proxy.asgi import HeaderLine, Receive, Scope, Send
    from tokencake_proxy.body import Intake
    from tokencake_proxy.metrics import Phase, ProxyMetrics
    from tokencake_proxy.refusals import Refusals
    from tokencake_proxy.tenants import TenantScope

_EVENT_ENDS: Final = (b"\n\n", b"\r\r", b"\r\n\r\n")
_LONGEST_EVENT_END: Final = 4

_BRIEF_BYTES: Final = 16_384

_SHUTTING_DOWN: Final = Refusal(
    HTTPStatus.SERVICE_UNAVAILABLE, "shutting_down", "The proxy is shutting down; send the request again."
)


class Exchange:
    """One request and its answer.

    While the engine works, a second task listens for the client's leaving and then cancels the first: the connection
    to the engine is closed, and the engine stops computing what nobody will read.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        route: str,
        engine: Engine,
        intake: Intake,
        metrics: ProxyMetrics,
        refusals: Refusals,
    ) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._route = route
        self._engine = engine
        self._body = Body(intake, first_value(scope["headers"], b"authorization"))
        self._metrics = metrics
        self._refusals = refusals
        self._settings = intake.settings
        self._apart = intake.apart
        self._turns = intake.turns
        self._is_guarded = is_guarded(scope["path"], scope["method"])
        self._arrived_at_s = perf_counter()
        self._phase: Phase = "upload"
        self._status: int | None = None
        self._can_send_event = False
        self._is_over = False
        self._has_client_left = False

    async def run(self, tenant_scope: TenantScope | None) -> None:
        """Answer the request, from the engine or with a refusal. Must be the last that its task does.

        Args:
            tenant_scope: what keeps tenants apart; None where all clients are one.
        """
        self._metrics.in_flight.inc()
        try:
            await self._run(tenant_scope)
        except ClientLeftError:
            self._metrics.client_disconnects.labels(self._phase).inc()
        except asyncio.CancelledError:
            # Not raised further: the client's leaving was ours, and else the server shuts down and has lost patience,
            # with nothing left to do for this task, and would log a traceback of it.
            if self._has_client_left:
                self._metrics.client_disconnects.labels(self._phase).inc()
            else:
                await self._refuse(_SHUTTING_DOWN)
        except Refusal as refusal:
            await self._refuse(refusal)
        finally:
            self._body.release()
            self._metrics.in_flight.dec()
            self._metrics.count_request(self._route, self._scope["method"], self._status)

    async def _run(self, tenant_scope: TenantScope | None) -> None:
        call = await self._call(must_prove=tenant_scope is not None)
        watcher = asyncio.create_task(self._watch(asyncio.current_task()))
        try:
            if tenant_scope is not None:
                call = await self._scoped(call, tenant_scope)
            response = await self._engine.answer(call)
            del call
            self._body.release()
            if self._is_guarded:
                self._engine.keys.learn(self._scope["headers"], response.status_code)
            try:
                await self._pass_on(response)
            finally:
                await response.aclose()
        finally:
            self._is_over = True
            watcher.cancel()

    async def _call(self, *, must_prove: bool) -> Call:
        scope, lines, keys = self._scope, self._scope["headers"], self._engine.keys
        # Before anything is parsed, and where the engine does not look at the key itself.
        if (must_prove or not self._is_guarded) and not _is_preflight(scope["method"], lines):
            await keys.prove(lines)
        body = await self._body.read(lines, self._receive, partial(keys.prove, lines))
        self._phase = "waiting"
        target: bytes = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        return Call(scope["method"], target, request_lines(lines), body)

    async def _scoped(self, call: Call, tenant_scope: TenantScope) -> Call:
        # The contract bounds a body of events; and the scope keeps account of them, which another process could not.
        if self._route == EVENTS_ROUTE or len(call.body) <= _BRIEF_BYTES:
            return tenant_scope.scoped(call, self._route)
        if len(call.body) > self._settings.json_inline_bytes or is_costly(call.body):
            return await self._apart.run(tenant_scope.scoped, call, self._route)
        async with self._turns:
            return tenant_scope.scoped(call, self._route)

    async def _watch(self, forwarding: asyncio.Task[None] | None) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        # A server also says `disconnect` when the answer is complete.
        if forwarding is not None and not self._is_over:
            self._has_client_left = True
            forwarding.cancel()

    async def _pass_on(self, response: httpx.Response) -> None:
        lines = self._lines(response)
        is_event_stream = _is_event_stream(lines)
        self._can_send_event = is_event_stream
        self._status = response.status_code
        await self._send({"type": "http.response.start", "status": self._status, "headers": lines})
        if self._route == EVENTS_ROUTE and response.is_success:
            self._metrics.event_bodies.inc()
        tail = b""
        try:
            async for piece in cast("httpx.AsyncByteStream", response.stream):  # the wider type is for other clients
                if self._phase == "waiting":
                    self._phase = "streaming"
                    waited_s = perf_counter() - self._arrived_at_s
                    self._metrics.time_to_first_byte_s.labels(self._route).observe(waited_s)
                if is_event_stream:
                    tail = (tail + piece)[-_LONGEST_EVENT_END:]
                    self._can_send_event = tail.endswith(_EVENT_ENDS)
                await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        except httpx.TransportError as error:
            raise self._engine.broken_stream(error) from error
        self._is_over = True
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def _lines(self, response: httpx.Response) -> list[HeaderLine]:
        try:
            return response_lines(response.headers.raw, response.status_code, self._engine.url.encode())
        except ValueError as error:
            raise self._engine.bad_answer(str(error)) from error

    async def _refuse(self, refusal: Refusal) -> None:
        self._refusals.note(refusal, self._scope.get("client"))
        if self._status is None:
            self._status = refusal.status
            await send_refusal(self._send, refusal)
        elif self._can_send_event:
            # To return without the last message makes the server close the connection.
            await self._send({"type": "http.response.body", "body": error_event(refusal), "more_body": True})


def _is_preflight(method: str, lines: list[HeaderLine]) -> bool:
    """Whether a browser asks what another origin may send; it asks without a key, and vLLM's CORS layer answers."""
    names = {name for name, _ in lines}
    has_body = not names.isdisjoint((b"content-length", b"transfer-encoding"))
    return method == "OPTIONS" and not has_body and {b"origin", b"access-control-request-method"} <= names


def _is_event_stream(lines: list[HeaderLine]) -> bool:
    """Whether a readable event can be added: the stream is neither compressed nor of a length announced."""
    content_type = first_value(lines, b"content-type") or b""
    return content_type.lower().startswith(b"text/event-stream") and not any(
        name in (b"content-encoding", b"content-length") for name, _ in lines
    )
