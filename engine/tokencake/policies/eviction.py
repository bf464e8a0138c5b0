"""Eviction policies of the host tier.

`NextUse` evicts what is needed last: the queue says it for waiting calls, the forecast for stalled agents; what a
running call holds is on the device and needed on the host only after its own stall. All blocks of an engine cost the
same to copy and nearly the same to compute, so the time alone decides.
"""

from __future__ import annotations

from math import inf
from typing import Final

from tokencake.time_scheduler.host_tier import Distance, HostBlock
from tokencake.time_scheduler.policy import EvictionInputs
from tokencake.time_scheduler.prefixes import Phase

LEAST_PROBABILITY: Final = 0.01
"""Lower bound: what was never extended counts as a hundred times as far."""
RUNNING_REMAINING_S: Final = 1.0
_MIN_PACE_S: Final = 0.001


def distance_s(phase: Phase, place: int, remaining_s: float, queued: int, admission_interval_s: float) -> float:
    """Seconds until the blocks of a prefix will be read.

    Args:
        phase: of the prefix.
        place: position of a waiting call in the queue.
        remaining_s: until the agent is back.
        queued: number of waiting calls.
        admission_interval_s: between two admissions.
    """
    admission_interval_s = max(admission_interval_s, _MIN_PACE_S)
    match phase:
        case "waiting":
            return place * admission_interval_s
        case "stalled":
            return queued * admission_interval_s + remaining_s
        case "running":
            return (queued + 1) * admission_interval_s + 10 * remaining_s


class NextUse:
    """What is needed last goes first. Reads: queue, forecast, reuse. Costs: a walk over the queue and all prefixes."""

    def distances(self, inputs: EvictionInputs) -> tuple[Distance, float]:
        """Seconds until each prefix is read again, over the probability that it is."""
        tier, positions = inputs.tier, inputs.queue_positions()
        ends: dict[bytes, float] = {}
        own_s = inf
        queued = len(positions)
        for prefix in inputs.prefixes:
            known = tier.known(prefix.block_hashes)
            if not known and prefix is not inputs.own:
                continue
            remaining_s = prefix.remaining_s(inputs.now_s) if prefix.phase == "stalled" else RUNNING_REMAINING_S
            seconds = distance_s(
                prefix.phase, positions.get(prefix.id, queued), remaining_s, queued, inputs.admission_interval_s
            )
            if prefix.phase != "waiting":
                # A prefix that is extended in one of two cases counts as twice as far; a waiting call reads its own.
                seconds /= max(LEAST_PROBABILITY, inputs.reuse.probability(prefix.hint))
            if prefix is inputs.own:
                own_s = seconds
            if known:
                end = prefix.block_hashes[known - 1]
                ends[end] = min(seconds, ends.get(end, inf))
        return lambda block: ends.get(block.key, inf), own_s


class LeastRecentlyUsed:
    """What was used longest ago goes first. Reads: the clock. Costs: nothing."""

    def distances(self, inputs: EvictionInputs) -> tuple[Distance, float]:
        """Seconds since the last use; what is to be stored is nearer than all."""
        now_s = inputs.now_s
        return lambda block: now_s - block.used_s, -1.0


def unbounded(block: HostBlock) -> float:  # noqa: ARG001  # the signature of a distance
    """Where the host has room: nothing is evicted."""
    return inf
