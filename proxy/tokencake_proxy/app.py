"""What happens to a request that arrives at the proxy?

`/health` and `/metrics` are the proxy's own. What `routes` lets pass becomes an `Exchange` with an engine; everything
else is refused with the reason.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from tokencake_proxy.asgi import App, Receive, Scope, Send, send_whole
from tokencake_proxy.errors import Refusal, send_refusal
from tokencake_proxy.exchange import Exchange
from tokencake_proxy.headers import tokens
from tokencake_proxy.metrics import CONTENT_TYPE, ProxyMetrics
from tokencake_proxy.routes import HEALTH_PATH, METRICS_PATH, REFUSED_ROUTE, engine_route
from tokencake_proxy.upstream import Engine, choose_engine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokencake_proxy.asgi import HeaderLine
    from tokencake_proxy.settings import ProxySettings

_NO_WEBSOCKETS: Final = Refusal(
    HTTPStatus.NOT_IMPLEMENTED,
    "websocket",
    "This proxy does not forward WebSockets; connect to the engine directly for its realtime routes.",
)


def create_app(settings: ProxySettings) -> App:
    """The proxy as an ASGI application. Runs in one event loop; its lifespan closes the connections to the engine."""
    return _Proxy(settings)


class _Proxy:
    def __init__(self, settings: ProxySettings) -> None:
        self._settings = settings
        self._metrics = ProxyMetrics()
        self._engines = (Engine(settings.upstream, settings, self._metrics),)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "http":
                await self._answer(scope, receive, send)
            case "websocket":
                # Before the handshake is accepted, a close is answered to the client as HTTP 403.
                await send({"type": "websocket.close"})
            case "lifespan":
                await self._live(receive, send)
            case kind:
                raise ValueError(f"scope type is {kind!r}; expected http, websocket or lifespan")

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        for engine in self._engines:
            await engine.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if path in (HEALTH_PATH, METRICS_PATH):
            await self._answer_about_itself(scope, send)
        elif b"websocket" in tokens(scope["headers"], b"upgrade"):
            await self._refuse(scope, send, _NO_WEBSOCKETS)
        elif (route := engine_route(path)) is None:
            await self._refuse(scope, send, _not_forwarded(path))
        else:
            engine = choose_engine(self._engines)
            exchange = Exchange(scope, receive, send, route=route, engine=engine, metrics=self._metrics)
            await exchange.run(self._settings.max_body_bytes, has_tenants=self._settings.has_tenants)

    async def _answer_about_itself(self, scope: Scope, send: Send) -> None:
        if scope["method"] not in ("GET", "HEAD"):
            await self._refuse(scope, send, _only_read(scope["path"]), [(b"allow", b"GET, HEAD")])
        elif scope["path"] == METRICS_PATH:
            await send_whole(send, HTTPStatus.OK, CONTENT_TYPE, self._metrics.exposition())
        else:
            await self._answer_health(send)

    async def _answer_health(self, send: Send) -> None:
        ailments = await asyncio.gather(*(engine.ailment() for engine in self._engines))
        is_well = not all(ailments)
        report = {
            "status": "ok" if is_well else "unavailable",
            "upstreams": {engine.url: ailment or "ok" for engine, ailment in zip(self._engines, ailments, strict=True)},
        }
        status = HTTPStatus.OK if is_well else HTTPStatus.SERVICE_UNAVAILABLE
        await send_whole(send, status, b"application/json", json.dumps(report).encode())

    async def _refuse(self, scope: Scope, send: Send, refusal: Refusal, extra: Sequence[HeaderLine] = ()) -> None:
        self._metrics.count_request(REFUSED_ROUTE, scope["method"], refusal.status)
        await send_refusal(send, refusal, extra)


def _not_forwarded(path: str) -> Refusal:
    shown = path if len(path) <= 100 else path[:100] + "..."  # noqa: PLR2004 - enough to recognise it
    return Refusal(
        HTTPStatus.NOT_FOUND,
        "not_forwarded",
        f"{shown} does not pass this proxy, which forwards /v1/* and vLLM's other inference routes. Development and "
        "administration routes are reached at the engine itself.",
    )


def _only_read(path: str) -> Refusal:
    return Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "method", f"{path} is answered by the proxy, to GET and HEAD only.")
