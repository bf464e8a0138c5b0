"""The proxy as an ASGI application: it answers a request itself, forwards it to an engine, or refuses it.

It answers `/health` (also as `/ping`, vLLM's other name for it) and `/metrics` itself. A request that `routes` allows
becomes an `Exchange` with an engine.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from tokencake.protocol.tenancy import Tenants
from tokencake_proxy.asgi import Receive, Scope, Send, send_response
from tokencake_proxy.body import BodyBudget
from tokencake_proxy.errors import Refusal, send_refusal
from tokencake_proxy.event_budget import EventBudget
from tokencake_proxy.exchange import Exchange
from tokencake_proxy.headers import first_value, repeated_header, tokens
from tokencake_proxy.json_work import JsonWork
from tokencake_proxy.metrics import CONTENT_TYPE, ProxyMetrics
from tokencake_proxy.refusal_log import RefusalLog
from tokencake_proxy.routes import HEALTH_PATHS, METRICS_PATH, REFUSED_ROUTE, engine_route
from tokencake_proxy.tenants import TenantScope
from tokencake_proxy.upstream import Upstream, choose_upstream

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
    "/metrics counts the requests of all clients, so it needs the operator's key: start the proxy "
    "with TOKENCAKE_METRICS_KEY set, and send that key as `Authorization: Bearer ...`.",
    [(b"www-authenticate", b"Bearer")],
)


def create_app(settings: ProxySettings) -> Proxy:
    """The proxy as an ASGI application, for one event loop. Its lifespan closes the connections to the engine."""
    return Proxy(settings)


class Proxy:
    """The ASGI application.

    Attributes:
        refusal_log: the server records its own refusals here.
    """

    def __init__(self, settings: ProxySettings) -> None:
        self._metrics = ProxyMetrics()
        self.refusal_log = RefusalLog(self._metrics)
        self._body_budget = BodyBudget(settings)
        self._json_work = JsonWork(settings)
        self._metrics_key = settings.metrics_key
        self._upstreams = (Upstream(settings.upstream, settings, self._metrics),)
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
        """Answer one request, or handle the server's start and shutdown."""
        match scope["type"]:
            case "http":
                await self._handle(scope, receive, send)
            case "websocket":
                # A close before the handshake makes the server answer HTTP 403.
                await send({"type": "websocket.close"})
            case "lifespan":
                await self._run_lifespan(receive, send)
            case kind:
                raise ValueError(f"scope type is {kind!r}; expected http, websocket or lifespan")

    async def _run_lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        for upstream in self._upstreams:
            await upstream.aclose()
        self.refusal_log.flush()
        await send({"type": "lifespan.shutdown.complete"})

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if (name := repeated_header(scope["headers"])) is not None:
            await self._refuse(scope, send, _repeated(name))
        elif path == METRICS_PATH or path in HEALTH_PATHS:
            await self._handle_own_route(scope, send)
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
                upstream=choose_upstream(self._upstreams),
                body_budget=self._body_budget,
                json_work=self._json_work,
                metrics=self._metrics,
                refusal_log=self.refusal_log,
            )
            await exchange.run(self._tenant_scope)

    async def _handle_own_route(self, scope: Scope, send: Send) -> None:
        if scope["method"] not in ("GET", "HEAD"):
            await self._refuse(scope, send, _only_read(scope["path"]))
        elif scope["path"] == METRICS_PATH and not self._may_read_metrics(scope):
            await self._refuse(scope, send, _METRICS_REFUSED)
        elif scope["path"] == METRICS_PATH:
            await send_response(send, HTTPStatus.OK, CONTENT_TYPE, self._metrics.exposition())
        else:
            await self._answer_health(send)

    def _may_read_metrics(self, scope: Scope) -> bool:
        key = self._metrics_key
        if key is None:
            return self._tenant_scope is None
        scheme, _, given = (first_value(scope["headers"], b"authorization") or b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given, key.encode())

    async def _answer_health(self, send: Send) -> None:
        problems = await asyncio.gather(*(upstream.health_problem() for upstream in self._upstreams))
        is_healthy = not all(problems)
        report = {
            "status": "ok" if is_healthy else "unavailable",
            "upstreams": {
                upstream.url: problem or "ok" for upstream, problem in zip(self._upstreams, problems, strict=True)
            },
        }
        status = HTTPStatus.OK if is_healthy else HTTPStatus.SERVICE_UNAVAILABLE
        await send_response(send, status, b"application/json", json.dumps(report).encode())

    async def _refuse(self, scope: Scope, send: Send, refusal: Refusal) -> None:
        self._metrics.count_request(REFUSED_ROUTE, scope["method"], refusal.status)
        self.refusal_log.record(refusal, scope.get("client"))
        await send_refusal(send, refusal)


def _not_forwarded(path: str) -> Refusal:
    shown = path if len(path) <= 100 else path[:100] + "..."  # noqa: PLR2004 - enough to recognise the path
    return Refusal(
        HTTPStatus.NOT_FOUND,
        "not_forwarded",
        f"{shown} does not pass this proxy, which forwards /v1/* and vLLM's other inference routes. Send requests for "
        "development and administration routes to the engine itself.",
    )


def _only_read(path: str) -> Refusal:
    return Refusal(
        HTTPStatus.METHOD_NOT_ALLOWED,
        "method",
        f"The proxy answers {path} itself, to GET and HEAD only.",
        [(b"allow", b"GET, HEAD")],
    )


def _repeated(name: bytes) -> Refusal:
    return Refusal(
        HTTPStatus.BAD_REQUEST,
        "repeated_header",
        f"The request has more than one header field {name.decode()!r}, and servers differ in which one they use. "
        "Send one.",
    )
