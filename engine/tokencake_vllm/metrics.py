"""How do the scheduler's numbers reach vLLM's `/metrics`?

The engine core is another process and stock `SchedulerStats` has no room for a plug-in's numbers, so the API server
fetches them when somebody scrapes. The engine hands out *increments since the last fetch*: whichever API server
process asks adds them to its own counters, and Prometheus' multi-process sum stays right. A busy or dead engine never
holds a scrape up: after a second the older numbers are shown.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import Counter, Gauge, Histogram
from vllm.logger import init_logger

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = init_logger("vllm.tokencake")

_COUNTERS = {
    "hints": (
        "LLM calls by what became of their hint: accepted, absent, void, unmarked, or refused for want of memory",
        ["outcome"],
    ),
    "events": ("Events by type and outcome", ["type", "outcome"]),
    "calls": ("Hinted calls that ended: finished or aborted", ["outcome"]),
    "forgotten": ("Records dropped because of age or the registry's bounds", ["record"]),
    "errors": ("Exceptions inside the plug-in that were caught", []),
    "space_refusals": (
        "Waiting calls passed over in a step: full, promised, delays, begun, critical, order, kept, closed or reserved",
        ["reason"],
    ),
    "space_swaps": ("Running calls swapped out for an older application's", []),
    "space_inversions": ("Critical calls that gave way to others: at admission or by preemption", ["kind"]),
    "kv_decisions": ("Finished calls by what became of their KV: keep, offload, drop or leave", ["action", "why"]),
    "kv_uploads": ("Uploads before a call: started, used, late, wasted, failed or no_room", ["outcome"]),
    "kv_stores": ("Calls whose KV was queued for the host", ["outcome"]),
    "kv_offloads": (
        "Blocks stored, read back (used), or evicted unread: with a hit on the device (spare), without (wasted)",
        ["outcome"],
    ),
    "kv_freed_block_seconds": ("Device blocks that stalled calls left to others, times seconds", []),
    "kv_loads": ("Calls that load their prefix, or wait while it is loaded", ["outcome"]),
    "kv_stalls": ("Stalls that ended without a call", ["outcome"]),
    "kv_pins": ("Pinned chains given up for others", ["outcome"]),
    "kv_tokens_saved": ("Prompt tokens not computed, by how they were kept", ["by"]),
    "kv_copied_bytes": ("Bytes copied, all ranks", ["direction"]),
    "kv_copy_seconds": ("Seconds that copies took", ["direction"]),
    "kv_copy_failures": ("Copies that failed and were made up for by computing", ["direction"]),
    "kv_evictions": ("Blocks evicted", ["tier"]),
}
_GAUGES = {
    "sessions": "Sessions known to the engine",
    "live_calls": "Hinted requests waiting or running",
    "stalled_calls": "Calls whose agent waits for a tool",
    "registry_bytes": "Memory of the records of sessions, calls, applications and graphs, by estimate",
    "longest_wait_s": "For how long the call has waited that has waited longest for its first slot, in seconds",
    "promised_blocks": "KV blocks that the calls that run will yet take at one time, as far as can be foreseen",
}
_LABELLED_GAUGES = {
    "kv_blocks": ("KV blocks of the device by who has them; the states add up to all of them", "state"),
    "space_reserve_blocks": ("KV blocks kept for critical calls: how many, and how many of them they hold", "part"),
}
_HISTOGRAMS = {
    "tool_s": ("tool_seconds", "Duration of tool calls in seconds"),
    "queue_s": ("queue_seconds", "Time of hinted calls from arrival to their first slot, in seconds"),
    "critical_queue_s": (
        "critical_queue_seconds",
        "Time of critical calls from arrival to their first slot, in seconds",
    ),
    "forecast_error_s": (
        "forecast_error_seconds",
        "Difference between a tool's forecast and true duration, in seconds",
    ),
}
_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1_000, 3_000)


_families: dict[str, Any] = {}
SCRAPE_S: Final = 1.0
"""How long a scrape waits for the engine, which answers between two steps."""


def register_metrics() -> None:
    """Make the metrics known to Prometheus, once in a process."""
    if _families:
        return
    for name, (text, labels) in _COUNTERS.items():
        _families[name] = Counter(f"tokencake:{name}", text, ["engine", *labels])
    for name, text in _GAUGES.items():
        metric = name.removesuffix("_s") + "_seconds" if name.endswith("_s") else name
        _families[name] = Gauge(f"tokencake:{metric}", text, ["engine"], multiprocess_mode="mostrecent")
    for name, (text, label) in _LABELLED_GAUGES.items():
        _families[name] = Gauge(f"tokencake:{name}", text, ["engine", label], multiprocess_mode="mostrecent")
    for name, (metric, text) in _HISTOGRAMS.items():
        _families[name] = Histogram(f"tokencake:{metric}", text, ["engine"], buckets=_BUCKETS)


def count_event(kind: str, outcome: str) -> None:
    """Count an event that no engine core took."""
    _families["events"].labels("none", kind, outcome).inc()


def _add(engine: str, drained: dict[str, Any]) -> None:
    """Add what `Registry.drain` gave."""
    for (name, *labels), count in drained["counts"]:
        _families[name].labels(engine, *labels).inc(count)
    for name, seconds in drained["observed"].items():
        for value in seconds:
            _families[name].labels(engine).observe(value)
    for name, value in drained["gauges"].items():
        _families[name].labels(engine).set(value)
    for name, by_label in drained["labelled"].items():
        for label, value in by_label.items():
            _families[name].labels(engine, label).set(value)


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
                self._fetching = asyncio.create_task(_fetch(scope["app"].state.tokencake))
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
