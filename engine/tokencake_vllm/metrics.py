"""How do the scheduler's numbers reach vLLM's `/metrics`?

The engine core is another process and stock `SchedulerStats` has no room for a plug-in's numbers, so the API server
fetches them when somebody scrapes. The engine hands out *increments since the last fetch*: whichever API server
process asks adds them to its own counters, and Prometheus' multi-process sum stays right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from prometheus_client import Counter, Gauge, Histogram
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import StatLoggerBase

from tokencake_vllm.plugin import is_requested

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send
    from vllm.config import VllmConfig

logger = init_logger("vllm.tokencake")

_COUNTERS = {
    "hints": ("LLM calls by what became of their hint: accepted, absent or void", ["outcome"]),
    "events": ("Events by type and outcome", ["type", "outcome"]),
    "calls": ("Hinted calls that ended: finished or aborted", ["outcome"]),
    "forgotten": ("Records dropped because of age or the registry's bounds", ["record"]),
    "errors": ("Exceptions inside the plug-in that were caught", []),
}
_GAUGES = {
    "sessions": "Sessions known to the engine",
    "live_calls": "Hinted requests waiting or running",
    "stalled_calls": "Calls whose agent waits for a tool",
}
_HISTOGRAMS = {
    "tool_s": ("tool_seconds", "Duration of tool calls in seconds"),
    "queue_s": ("queue_seconds", "Time of hinted calls from arrival to their first slot, in seconds"),
}
_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1_000, 3_000)


_families: dict[str, Any] = {}


class TokenCakeStatLogger(StatLoggerBase):
    """Registers the metrics when an engine starts; `ScrapeMiddleware` fills them."""

    by_engine: ClassVar[dict[int, TokenCakeStatLogger]] = {}

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:  # noqa: ARG002  # vLLM's signature
        if not is_requested():
            return
        if not _families:  # one family for all engines of the process
            for name, (text, labels) in _COUNTERS.items():
                _families[name] = Counter(f"tokencake:{name}", text, ["engine", *labels])
            for name, text in _GAUGES.items():
                _families[name] = Gauge(f"tokencake:{name}", text, ["engine"], multiprocess_mode="mostrecent")
            for name, (metric, text) in _HISTOGRAMS.items():
                _families[name] = Histogram(f"tokencake:{metric}", text, ["engine"], buckets=_BUCKETS)
        self._engine = str(engine_index)
        self.by_engine[engine_index] = self
        self.add({"counts": [], "observed": {}, "gauges": dict.fromkeys(_GAUGES, 0)})

    def add(self, drained: dict[str, Any]) -> None:
        """Add what `Registry.drain` gave."""
        for (name, *labels), count in drained["counts"]:
            _families[name].labels(self._engine, *labels).inc(count)
        for name, seconds in drained["observed"].items():
            for value in seconds:
                _families[name].labels(self._engine).observe(value)
        for name, value in drained["gauges"].items():
            _families[name].labels(self._engine).set(value)

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the per-step statistics of vLLM hold nothing of ours."""

    def log_engine_initialized(self) -> None:
        """Nothing to tell."""


class ScrapeMiddleware:
    """Fetches the engines' increments before `/metrics` is answered; every other path goes straight through."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and scope["path"] == "/metrics":
            try:
                await _fetch(scope["app"].state.tokencake)
            except Exception:
                logger.exception("TokenCake: the engine's counters could not be fetched; /metrics shows older ones")
        await self._app(scope, receive, send)


async def _fetch(calls: Any) -> None:
    if calls is None:
        return
    loggers = [TokenCakeStatLogger.by_engine[index] for index in sorted(TokenCakeStatLogger.by_engine)]
    for stat_logger, drained in zip(loggers, await calls("tokencake_metrics"), strict=False):
        stat_logger.add(drained)
