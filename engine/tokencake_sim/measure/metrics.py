"""Metrics of a run: one JSON object with the same keys for every policy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokencake_sim.clients.applications import Applications
    from tokencake_sim.clients.calls import SimCall
    from tokencake_sim.device.worker import Link, Links
    from tokencake_sim.measure.kv_occupancy import KVOccupancy
    from tokencake_sim.measure.step_recorder import StepRecorder


def summary(values: Iterable[float]) -> dict[str, float | None]:
    """Mean, median, 95th percentile (nearest rank) and maximum; None where there are no values."""
    ordered = sorted(values)
    if not ordered:
        return {"mean": None, "p50": None, "p95": None, "max": None}

    def rank(share: float) -> float:
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    return {"mean": sum(ordered) / len(ordered), "p50": rank(0.5), "p95": rank(0.95), "max": ordered[-1]}


def _between(calls: Iterable[SimCall], begin: str, end: str) -> dict[str, float | None]:
    pairs = ((getattr(call, begin), getattr(call, end)) for call in calls)
    return summary(last - first for first, last in pairs if first is not None and last is not None)


def _link(link: Link) -> dict[str, float]:
    return {"bytes": link.copied_bytes, "seconds": link.busy_s, "jobs": link.jobs}


def _kinds(applications: Applications, calls: Iterable[SimCall]) -> dict[str, dict[str, Any]]:
    """Every kind of application by itself: what one class of traffic pays for another shows here only."""
    latencies: dict[str, list[float]] = {}
    theirs: dict[str, list[SimCall]] = {}
    for app, latency_s in applications.latencies_s().items():
        latencies.setdefault(applications.kinds[app], []).append(latency_s)
    for call in calls:
        theirs.setdefault(call.app.kind, []).append(call)
    return {
        kind: {
            "applications": len(values),
            "app_latency_s": summary(values),
            "ttft_s": _between(theirs.get(kind, ()), "arrived_s", "first_token_s"),
        }
        for kind, values in sorted(latencies.items())
    }


def report(
    *,
    applications: Applications,
    recorder: StepRecorder,
    occupancy: KVOccupancy,
    links: Links,
    decisions: dict[str, int],
    makespan_s: float,
) -> dict[str, Any]:
    """The metrics of a finished run."""
    calls = list(applications.calls.values())
    capacity = occupancy.total_blocks * makespan_s or 1.0
    samples = occupancy.samples
    mean_stalled = sum(sample.stalled + sample.pinned for sample in samples) / max(1, len(samples))
    return {
        "makespan_s": makespan_s,
        "applications": len(applications.latencies_s()),
        "calls": len(calls),
        "app_latency_s": summary(applications.latencies_s().values()),
        "call_latency_s": _between(calls, "arrived_s", "finished_s"),
        "ttft_s": _between(calls, "arrived_s", "first_token_s"),
        "ttft_after_tool_s": _between((c for c in calls if c.is_after_tool), "arrived_s", "first_token_s"),
        "queue_s": _between(calls, "arrived_s", "scheduled_s"),
        "decode_s": _between(calls, "first_token_s", "finished_s"),
        "kinds": _kinds(applications, calls),
        "critical_call_latency_s": _between((c for c in calls if c.place.is_critical), "arrived_s", "finished_s"),
        "prompt_tokens": sum(call.texts.prompt_tokens for call in calls),
        "output_tokens": sum(call.answered_tokens for call in calls),
        "prefill_tokens": recorder.prefill_tokens,
        "recomputed_tokens": recorder.recomputed_tokens,
        "lost_prefix_tokens": recorder.lost_prefix_tokens,
        "hit_tokens": {
            "device": sum(call.device_hit_tokens for call in calls),
            "host": sum(call.host_hit_tokens for call in calls),
        },
        "preemptions": recorder.preemptions,
        "critical_inversions": recorder.preemption_inversions + recorder.admission_inversions,
        "inversions": {"preemption": recorder.preemption_inversions, "admission": recorder.admission_inversions},
        "kv_occupancy": occupancy.held_block_s / capacity,
        "kv_effective_utilisation": (occupancy.held_block_s + occupancy.reused_block_s) / capacity,
        "kv_held_by_stalled": mean_stalled,
        "mean_running": recorder.running_call_s / recorder.busy_s if recorder.busy_s else 0.0,
        "device_busy": recorder.busy_s / makespan_s if makespan_s else 0.0,
        "transfers": {"to_host": _link(links.to_host), "to_device": _link(links.to_device)},
        "decisions": decisions,
        "longest_wait_s": max((c.scheduled_s - c.arrived_s for c in calls if c.scheduled_s is not None), default=0.0),
        "idle_while_waiting_s": recorder.idle_while_waiting_s,
        "idle_while_admissible_s": recorder.idle_while_admissible_s,
        "steps": recorder.steps,
    }


def timeline(applications: Applications, occupancy: KVOccupancy) -> dict[str, Any]:
    """What the plots need: the state of the KV cache over time, and every call with its tool."""
    return {
        "kv": [
            {
                "time_s": sample.time_s,
                "running": sample.running,
                "pinned": sample.pinned,
                "stalled": sample.stalled,
                "other_cached": sample.other_cached,
                "calls_running": sample.calls_running,
                "calls_waiting": sample.calls_waiting,
            }
            for sample in occupancy.samples
        ],
        "calls": [
            {
                "app": call.app.id,
                "node": call.node.id,
                "arrived_s": call.arrived_s,
                "scheduled_s": call.scheduled_s,
                "first_token_s": call.first_token_s,
                "finished_s": call.finished_s,
                "tool_s": None if call.node.tool is None else call.node.tool.duration_s,
                "device_hit_tokens": call.device_hit_tokens,
                "host_hit_tokens": call.host_hit_tokens,
                "prompt_tokens": call.texts.prompt_tokens,
                "preemptions": call.preemptions,
            }
            for call in applications.calls.values()
        ],
    }
