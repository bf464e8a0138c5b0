"""The engine's metrics by name, each declared once: what it counts and its labels.

`/metrics` shows what stands here. A name that does not is a type error where it is counted; at run time it is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, Protocol, TypeAlias

CounterName: TypeAlias = Literal[
    "hints",
    "events",
    "calls",
    "forgotten",
    "errors",
    "undeclared_metrics",
    "space_refusals",
    "space_swaps",
    "space_inversions",
    "kv_decisions",
    "kv_uploads",
    "kv_stores",
    "kv_offloads",
    "kv_freed_block_seconds",
    "kv_loads",
    "kv_stalls",
    "kv_pins",
    "kv_tokens_saved",
    "kv_copied_bytes",
    "kv_copy_seconds",
    "kv_copy_failures",
    "kv_checksum_mismatches",
    "kv_evictions",
]
CountKey: TypeAlias = tuple[CounterName, *tuple[str, ...]]
"""The name of a counter and a value for each of its labels."""
Count: TypeAlias = Callable[[CountKey, float], None]
"""Adds to a counter: which, and how much."""
GaugeName: TypeAlias = Literal[
    "sessions", "live_calls", "stalled_calls", "registry_bytes", "longest_wait_s", "promised_blocks"
]
LabelledGaugeName: TypeAlias = Literal["kv_blocks", "space_reserve_blocks"]
HistogramName: TypeAlias = Literal["tool_s", "queue_s", "critical_queue_s", "forecast_error_s"]

COUNTERS: Final[dict[CounterName, tuple[str, tuple[str, ...]]]] = {
    "hints": (
        "LLM calls by the outcome of their hint: accepted, absent, void, unmarked, or refused for lack of memory",
        ("outcome",),
    ),
    "events": ("Events by type and outcome", ("type", "outcome")),
    "calls": ("Hinted calls that ended: finished or aborted", ("outcome",)),
    "forgotten": ("Records dropped because of age or the registry's bounds", ("record",)),
    "errors": ("Exceptions inside the plug-in that were caught", ()),
    "undeclared_metrics": ("Numbers of the engine that are not shown because no metric with this name is declared", ()),
    "space_refusals": (
        "Waiting calls skipped in a step, by reason",
        ("reason",),
    ),
    "space_swaps": ("Running calls swapped out for a call of a more senior application", ()),
    "space_inversions": ("Priority inversions of critical calls, at admission or by preemption", ("kind",)),
    "kv_decisions": ("Finished calls by the decision on their KV: keep, offload, drop or leave", ("action", "why")),
    "kv_uploads": ("Uploads before a call: started, used, late, wasted, failed or no_room", ("outcome",)),
    "kv_stores": ("Calls whose KV was queued for the host", ("outcome",)),
    "kv_offloads": (
        "Blocks stored, read back (used), or evicted unread: with a hit on the device (spare), without (wasted)",
        ("outcome",),
    ),
    "kv_freed_block_seconds": ("Device blocks freed by offloading stalled calls, times seconds", ()),
    "kv_loads": (
        "Calls that load their prefix (queued), wait while it is loaded (waited), or compute what left the host (gone)",
        ("outcome",),
    ),
    "kv_stalls": ("Stalls that ended without a call", ("outcome",)),
    "kv_pins": ("Pinned prefixes given up for waiting or running calls", ("outcome",)),
    "kv_tokens_saved": ("Prompt tokens not computed, by how they were kept", ("by",)),
    "kv_copied_bytes": ("Bytes copied, all ranks", ("direction",)),
    "kv_copy_seconds": ("Seconds that copies took", ("direction",)),
    "kv_copy_failures": ("Failed copies, replaced by computing", ("direction",)),
    "kv_checksum_mismatches": ("Copied blocks with another checksum than their source", ()),
    "kv_evictions": ("Blocks evicted", ("tier",)),
}
GAUGES: Final[dict[GaugeName, str]] = {
    "sessions": "Sessions known to the engine",
    "live_calls": "Hinted requests waiting or running",
    "stalled_calls": "Calls whose agent waits for a tool",
    "registry_bytes": "Memory of the records of sessions, calls, applications and graphs, by estimate",
    "longest_wait_s": "Longest current wait for a first slot, in seconds",
    "promised_blocks": "KV blocks reserved for the expected growth of running calls, at its peak",
}
LABELLED_GAUGES: Final[dict[LabelledGaugeName, tuple[str, str]]] = {
    "kv_blocks": ("KV blocks of the device by state; the states add up to all of them", "state"),
    "space_reserve_blocks": ("KV blocks reserved for critical calls (size), and those of them in use (used)", "part"),
}
HISTOGRAMS: Final[dict[HistogramName, tuple[str, str]]] = {
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


class CountByName(Protocol):
    """Adds to a counter, most often one."""

    def __call__(self, name: CounterName, /, *labels: str, by: float = 1) -> None:
        """Add `by` to the counter `name` with these labels."""
