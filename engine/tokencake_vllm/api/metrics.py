"""Metrics of the scheduler on vLLM's `/metrics`.

The engine core is another process and stock `SchedulerStats` has no room for a plug-in's numbers, so the API server
fetches them at each scrape. The engine hands out *increments since the last fetch*: whichever API server
process asks adds them to its own counters, and Prometheus' multi-process sum stays right. A busy or dead engine never
holds a scrape up: after a second the older numbers are shown.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, Literal

from prometheus_client import Counter, Gauge, Histogram
from vllm.logger import init_logger

from tokencake.registry.metric_names import COUNTERS, GAUGES, HISTOGRAMS, LABELLED_GAUGES

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = init_logger("vllm.tokencake")

_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1_000, 3_000)


_families: dict[str, Any] = {}
_left_out: set[str] = set()
"""Names that were logged."""
SCRAPE_S: Final = 1.0
"""How long a scrape waits for the engine, which answers between two steps."""


def register_metrics() -> None:
    """Make the metrics known to Prometheus, once in a process."""
    if _families:
        return
    for counter, (text, labels) in COUNTERS.items():
        _families[counter] = Counter(f"tokencake:{counter}", text, ["engine", *labels])
    for gauge, text in GAUGES.items():
        metric = gauge.removesuffix("_s") + "_seconds" if gauge.endswith("_s") else gauge
        _families[gauge] = Gauge(f"tokencake:{metric}", text, ["engine"], multiprocess_mode="mostrecent")
    for labelled, (text, label) in LABELLED_GAUGES.items():
        _families[labelled] = Gauge(f"tokencake:{labelled}", text, ["engine", label], multiprocess_mode="mostrecent")
    for histogram, (metric, text) in HISTOGRAMS.items():
        _families[histogram] = Histogram(f"tokencake:{metric}", text, ["engine"], buckets=_BUCKETS)


def count_event(kind: str, outcome: str) -> None:
    """Count an event that no engine core took."""
    _families["events"].labels("none", kind, outcome).inc()


def _add(engine: str, drained: dict[str, Any]) -> None:
    """Add what `Registry.drain` gave."""
    for (name, *labels), count in drained["counts"]:
        _update("inc", count, name, engine, *labels)
    for name, seconds in drained["observed"].items():
        for value in seconds:
            _update("observe", value, name, engine)
    for name, value in drained["gauges"].items():
        _update("set", value, name, engine)
    for name, by_label in drained["labelled"].items():
        for label, value in by_label.items():
            _update("set", value, name, engine, label)


def _update(how: Literal["inc", "observe", "set"], value: float, name: str, engine: str, *labels: str) -> None:
    """Change one metric. One that is not declared, or not with these labels, is left out, counted and logged once."""
    try:
        getattr(_families[name].labels(engine, *labels), how)(value)
    except Exception:
        _families["undeclared_metrics"].labels(engine).inc()
        if name not in _left_out:
            _left_out.add(name)
            logger.exception(
                "TokenCake: /metrics goes on without %r with the labels %r; declare it in registry/metric_names.py",
                *(name, labels),
            )


class ScrapeMiddleware:
    """Fetches the engines' increments before `/metrics` is answered; every other path goes straight through."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._fetching: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and scope["path"].rstrip("/").endswith("/metrics"):
            # One fetch serves all scrapes, and goes on when a scraper leaves: what was drained is not lost.
            if self._fetching is None or self._fetching.done():
                self._fetching = asyncio.create_task(_fetch(getattr(scope["app"].state, "tokencake", None)))
            await asyncio.wait((self._fetching,), timeout=SCRAPE_S)
        await self._app(scope, receive, send)


async def _fetch(calls: Any) -> None:
    if calls is None:
        return
    try:
        for index, drained in enumerate(await calls("tokencake_metrics")):
            _add(str(index), drained)
    except Exception:
        logger.exception("TokenCake: the engine's counters could not be fetched; /metrics shows older ones")
