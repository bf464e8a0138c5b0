"""The proxy as an application: which requests it answers itself, passes to an engine, or refuses with the reason.

`/health` (also as `/ping`, vLLM's other name for it) and `/metrics` are its own. What `routes` lets pass becomes an
`Exchange` with an engine.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from tokencake.protocol.tenancy import Tenants
from tokencake_proxy.asgi import Receive, Scope, Send, send_whole
from tokencake_proxy.body import Intake
from tokencake_proxy.errors import Refusal, send_refusal
from tokencake_proxy.event_budget import EventBudget
from tokencake_proxy.exchange import Exchange
from tokencake_proxy.headers import first_value, repeated_line, tokens
from tokencake_proxy.metrics import CONTENT_TYPE, ProxyMetrics
from tokencake_proxy.refusals import Refusals
from tokencake_proxy.routes import HEALTH_PATHS, METRICS_PATH, REFUSED_ROUTE, engine_route
from tokencake_proxy.tenants import TenantScope
from tokencake_proxy.upstream import Engine, choose_engine

if TYPE_CHECKING:
    from tokencake_proxy.settings import ProxySettings

_NO_WEBSOCKETS: Final = Refusal(
    HTTPStatus.NOT_IMPLEMENTED,
    "websocket",
    "This proxy does not forward WebSockets; connect to the engine directly for its realtime routes.",
)

_METRICS_REFUSED: Final = Refusal(
    HTTPStatus.UNAUTHORIZED,
    "metrics_key",
    "/metrics counts everybody's requests, so it asks for the operator's key: start the proxy with "
    "TOKENCAKE_METRICS_KEY set, and send it as `Authorization: Bearer ...`.",
    [(b"www-authenticate", b"Bearer")],
)


def create_app(settings: ProxySettings) -> Proxy:
    """The proxy as an ASGI application. Runs in one event loop; its lifespan closes the connections to the engine."""
    return Proxy(settings)


class Proxy:
    """The application.

    Attributes:
        refusals: where its server notes what it refuses itself.
    """

    def __init__(self, settings: ProxySettings) -> None:
        self._metrics = ProxyMetrics()
        self.refusals = Refusals(self._metrics)
        self._intake = Intake(settings)
        self._metrics_key = settings.metrics_key
        self._engines = (Engine(settings.upstream, settings, self._metrics),)
        self._tenant_scope = (
            None
            if settings.tenant_secret is None
            else TenantScope(
                Tenants(settings.tenant_secret),
                shares_prefixes=settings.shares_prefixes,
                events=EventBudget(settings.tenant_events_per_s),
            )
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or live through the server's start and end."""
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
        self.refusals.flush()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if (name := repeated_line(scope["headers"])) is not None:
            await self._refuse(scope, send, _repeated(name))
        elif path == METRICS_PATH or path in HEALTH_PATHS:
            await self._answer_about_itself(scope, send)
        elif b"websocket" in tokens(scope["headers"], b"upgrade"):
            await self._refuse(scope, send, _NO_WEBSOCKETS)
        elif (route := engine_route(path)) is None:
            await self._refuse(scope, send, _not_forwarded(path))
        else:
            exchange = Exchange(
                scope,
                receive,
                send,
                route=route,
                engine=choose_engine(self._engines),
                intake=self._intake,
                metrics=self._metrics,
                refusals=self.refusals,
            )
            await exchange.run(self._tenant_scope)

    async def _answer_about_itself(self, scope: Scope, send: Send) -> None:
        if scope["method"] not in ("GET", "HEAD"):
            await self._refuse(scope, send, _only_read(scope["path"]))
        elif scope["path"] == METRICS_PATH and not self._may_read_metrics(scope):
            await self._refuse(scope, send, _METRICS_REFUSED)
        elif scope["path"] == METRICS_PATH:
            await send_whole(send, HTTPStatus.OK, CONTENT_TYPE, self._metrics.exposition())
        else:
            await self._answer_health(send)

    def _may_read_metrics(self, scope: Scope) -> bool:
        key = self._metrics_key
        if key is None:
            return self._tenant_scope is None
        scheme, _, given = (first_value(scope["headers"], b"authorization") or b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given, key.encode())

    async def _answer_health(self, send: Send) -> None:
        ailments = await asyncio.gather(*(engine.ailment() for engine in self._engines))
        is_well = not all(ailments)
        report = {
            "status": "ok" if is_well else "unavailable",
            "upstreams": {engine.url: ailment or "ok" for engine, ailment in zip(self._engines, ailments, strict=True)},
        }
        status = HTTPStatus.OK if is_well else HTTPStatus.SERVICE_UNAVAILABLE
        await send_whole(send, status, b"application/json", json.dumps(report).encode())

    async def _refuse(self, scope: Scope, send: Send, refusal: Refusal) -> None:
        self._metrics.count_request(REFUSED_ROUTE, scope["method"], refusal.status)
        self.refusals.note(refusal, scope.get("client"))
        await send_refusal(send, refusal)


def _not_forwarded(path: str) -> Refusal:
    shown = path if len(path) <= 100 else path[:100] + "..."  # noqa: PLR2004 - enough to recognise it
    return Refusal(
        HTTPStatus.NOT_FOUND,
        "not_forwarded",
        f"{shown} does not pass this proxy, which forwards /v1/* and vLLM's other inference routes. Development and "
        "administration routes are reached at the engine itself.",
    )


def _only_read(path: str) -> Refusal:
    return Refusal(
        HTTPStatus.METHOD_NOT_ALLOWED,
        "method",
        f"{path} is answered by the proxy, to GET and HEAD only.",
        [(b"allow", b"GET, HEAD")],
    )


def _repeated(name: bytes) -> Refusal:
    return Refusal(
        HTTPStatus.BAD_REQUEST,
        "repeated_header",
        f"The request has more than one header line {name.decode()!r}; which of them counts is not certain. Send one.",
    )
