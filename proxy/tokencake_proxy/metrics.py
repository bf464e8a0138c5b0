"""The proxy's metrics. Labels come from closed sets: no path, model or key of a client becomes a label."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from tokencake_proxy.errors import RefusalReason

RequestPhase: TypeAlias = Literal["upload", "waiting", "streaming"]

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4.encode()

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_TIME_TO_FIRST_BYTE_BUCKETS_S: Final = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 300, 600,
)  # fmt: skip


class ProxyMetrics:
    """The metrics of one proxy. They have their own registry, so that two proxies in one process do not collide."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "tokencake_proxy_requests",
            "Requests by route, method and status; status `none` if the client disconnected before the response began.",
            ["route", "method", "status"],
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "tokencake_proxy_requests_in_flight",
            "Requests that have arrived and whose response is not complete.",
            registry=self.registry,
        )
        self.time_to_first_byte_s = Histogram(
            "tokencake_proxy_time_to_first_byte_seconds",
            "Time from a request's arrival to the first byte of the body of the engine's response.",
            ["route"],
            buckets=_TIME_TO_FIRST_BYTE_BUCKETS_S,
            registry=self.registry,
        )
        self.upstream_retries = Counter(
            "tokencake_proxy_upstream_retries",
            "Requests sent a second time because the engine had closed a pooled connection.",
            registry=self.registry,
        )
        self.upstream_errors = Counter(
            "tokencake_proxy_upstream_errors",
            "Requests that the engine did not answer completely, by kind.",
            ["kind"],
            registry=self.registry,
        )
        self.refusals = Counter(
            "tokencake_proxy_refusals",
            "Requests and connections that the proxy refused, by reason.",
            ["reason"],
            registry=self.registry,
        )
        for reason in get_args(RefusalReason):
            self.refusals.labels(reason)
        self.client_disconnects = Counter(
            "tokencake_proxy_client_disconnects",
            "Clients that disconnected, by phase: sending the request, waiting for the response, receiving it.",
            ["phase"],
            registry=self.registry,
        )
        self.event_bodies = Counter(
            "tokencake_proxy_event_bodies_forwarded",
            "Bodies of events that the engine has accepted.",
            registry=self.registry,
        )

    def count_request(self, route: str, method: str, status: int | None) -> None:
        """Count a finished request. `route` must be a name of `routes`; `method` is arbitrary."""
        known_method = method if method in _METHODS else "other"
        self._requests.labels(route, known_method, "none" if status is None else str(status)).inc()

    def exposition(self) -> bytes:
        """The body of `/metrics`, of type `CONTENT_TYPE`."""
        return generate_latest(self.registry)
