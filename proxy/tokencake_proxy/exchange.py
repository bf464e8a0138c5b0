"""One request on its way to the engine, and the response on its way back.

A response that breaks off is never ended cleanly, because a clean end would make it look complete: the connection is
closed without the last chunk (or short of its Content-Length), which every HTTP client reports. If the response is a
stream of server-sent events and stands between two events, one `error` event is sent first, so that the client raises
the reason instead of a bare network error.
"""

from __future__ import annotations

import asyncio
from functools import partial
from http import HTTPStatus
from time import perf_counter
from typing import TYPE_CHECKING, Final, cast

import httpx

from tokencake_proxy.body import ClientDisconnectedError, RequestBody
from tokencake_proxy.dialects import dialect_of
from tokencake_proxy.errors import Refusal, send_refusal
from tokencake_proxy.headers import first_value, request_headers, response_headers
from tokencake_proxy.routes import EVENTS_ROUTE, engine_checks_key
from tokencake_proxy.upstream import ForwardedRequest, Upstream

if TYPE_CHECKING:
    from tokencake_proxy.asgi import Header, Receive, Scope, Send
    from tokencake_proxy.body import BodyBudget
    from tokencake_proxy.json_work import JsonWork
    from tokencake_proxy.metrics import ProxyMetrics, RequestPhase
    from tokencake_proxy.refusal_log import RefusalLog
    from tokencake_proxy.tenants import TenantScope

_SHUTTING_DOWN: Final = Refusal(
    HTTPStatus.SERVICE_UNAVAILABLE, "shutting_down", "The proxy is shutting down; send the request again."
)


class Exchange:
    """One request and its response.

    While the engine works, a second task waits for the client to disconnect and then cancels the first. That closes the
    connection to the engine, which stops computing.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        route: str,
        upstream: Upstream,
        body_budget: BodyBudget,
        json_work: JsonWork,
        metrics: ProxyMetrics,
        refusal_log: RefusalLog,
    ) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._route = route
        self._dialect = dialect_of(route)
        self._upstream = upstream
        self._body = RequestBody(body_budget, first_value(scope["headers"], b"authorization"))
        self._json_work = json_work
        self._metrics = metrics
        self._refusal_log = refusal_log
        self._engine_checks_key = engine_checks_key(scope["path"], scope["method"])
        self._arrived_at_s = perf_counter()
        self._phase: RequestPhase = "upload"
        self._status: int | None = None
        self._can_send_event = False
        self._is_over = False
        self._is_client_gone = False

    async def run(self, tenant_scope: TenantScope | None) -> None:
        """Answer the request, from the engine or with a refusal. It must be the last call of its task.

        Args:
            tenant_scope: isolates tenants; None where all clients are one tenant.
        """
        self._metrics.in_flight.inc()
        try:
            await self._run(tenant_scope)
        except ClientDisconnectedError:
            self._metrics.client_disconnects.labels(self._phase).inc()
        except asyncio.CancelledError:
            # Not raised again. Either `_watch_for_disconnect` cancelled this task, or the server is shutting down: then
            # nothing is left to do, and the server would log a traceback.
            if self._is_client_gone:
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
        request = await self._read_request(must_prove=tenant_scope is not None)
        watcher = asyncio.create_task(self._watch_for_disconnect(asyncio.current_task()))
        try:
            if tenant_scope is not None:
                request = await self._scoped(request, tenant_scope)
            response = await self._upstream.send(request)
            del request
            self._body.release()
            if self._engine_checks_key:
                self._upstream.keys.learn(self._scope["headers"], response.status_code)
            try:
                await self._forward(response)
            finally:
                await response.aclose()
        finally:
            self._is_over = True
            watcher.cancel()

    async def _read_request(self, *, must_prove: bool) -> ForwardedRequest:
        scope, headers, keys = self._scope, self._scope["headers"], self._upstream.keys
        # Before anything is parsed, and where the engine does not check the key itself.
        if (must_prove or not self._engine_checks_key) and not _is_preflight(scope["method"], headers):
            await keys.prove(headers)
        body = await self._body.read(headers, self._receive, partial(keys.prove, headers))
        self._phase = "waiting"
        target: bytes = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        return ForwardedRequest(scope["method"], target, request_headers(headers), body)

    async def _scoped(self, request: ForwardedRequest, tenant_scope: TenantScope) -> ForwardedRequest:
        # The contract limits a body of events, and their rate is counted here, which another process could not do.
        if self._route == EVENTS_ROUTE:
            return tenant_scope.scoped(request, self._route)
        return await self._json_work.run(request.body, tenant_scope.scoped, request, self._route)

    async def _watch_for_disconnect(self, forwarding: asyncio.Task[None] | None) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        # A server also sends `disconnect` when the response is complete.
        if forwarding is not None and not self._is_over:
            self._is_client_gone = True
            forwarding.cancel()

    async def _forward(self, response: httpx.Response) -> None:
        headers = self._response_headers(response)
        is_event_stream = _is_event_stream(headers)
        self._can_send_event = is_event_stream
        self._status = response.status_code
        await self._send({"type": "http.response.start", "status": self._status, "headers": headers})
        if self._route == EVENTS_ROUTE and response.is_success:
            self._metrics.event_bodies.inc()
        event_ends = self._dialect.event_ends
        longest_end = max(map(len, event_ends))
        tail = b""
        try:
            async for piece in cast("httpx.AsyncByteStream", response.stream):  # the wider type is for other clients
                if self._phase == "waiting":
                    self._phase = "streaming"
                    waited_s = perf_counter() - self._arrived_at_s
                    self._metrics.time_to_first_byte_s.labels(self._route).observe(waited_s)
                if is_event_stream:
                    tail = (tail + piece)[-longest_end:]
                    self._can_send_event = tail.endswith(event_ends)
                await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        except httpx.TransportError as error:
            raise self._upstream.broken_stream(error) from error
        self._is_over = True
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def _response_headers(self, response: httpx.Response) -> list[Header]:
        try:
            return response_headers(response.headers.raw, response.status_code, self._upstream.url.encode())
        except ValueError as error:
            raise self._upstream.bad_answer(str(error)) from error

    async def _refuse(self, refusal: Refusal) -> None:
        self._refusal_log.record(refusal, self._scope.get("client"))
        if self._status is None:
            self._status = refusal.status
            await send_refusal(self._send, refusal, self._dialect)
        elif self._can_send_event:
            # The server closes the connection because the last message is missing.
            await self._send({"type": "http.response.body", "body": refusal.event(self._dialect), "more_body": True})


def _is_preflight(method: str, headers: list[Header]) -> bool:
    """Whether this is a CORS preflight. Browsers send it without a key, and vLLM's CORS middleware answers it."""
    names = {name for name, _ in headers}
    has_body = not names.isdisjoint((b"content-length", b"transfer-encoding"))
    return method == "OPTIONS" and not has_body and {b"origin", b"access-control-request-method"} <= names


def _is_event_stream(headers: list[Header]) -> bool:
    """Whether an event can be appended: the response is an event stream, not compressed, of no announced length."""
    content_type = first_value(headers, b"content-type") or b""
    return content_type.lower().startswith(b"text/event-stream") and not any(
        name in (b"content-encoding", b"content-length") for name, _ in headers
    )
