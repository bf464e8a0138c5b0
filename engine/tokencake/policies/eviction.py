"""When will each chain on the host be read again?

The host evicts what is needed last. The queue tells it for calls that wait, the forecast for agents that are stalled;
what a running call holds is on the device and needed on the host only after its own stall. All blocks of an engine cost
the same to copy and nearly the same to compute, so that the cost per byte is one for all and the time decides.
"""

from __future__ import annotations

from math import inf
from typing import Final

from tokencake.time_scheduler.host_tier import Distance, HostBlock
from tokencake.time_scheduler.policy import EvictionInputs
from tokencake.time_scheduler.prefixes import Phase

MIN_CHANCE: Final = 0.01
"""What was never extended is as good as a hundred times as far off."""
RUNNING_REST_S: Final = 1.0
_MIN_PACE_S: Final = 0.001


def distance_s(phase: Phase, place: int, rest_s: float, queued: int, pace_s: float) -> float:
    """Seconds until a chain's blocks will be read.

    Args:
        phase: of the chain.
        place: in the queue, of a waiting call.
        rest_s: until the agent is back.
        queued: calls that wait.
        pace_s: between two admissions.
    """
    pace_s = max(pace_s, _MIN_PACE_S)
    match phase:
        case "waiting":
            return place * pace_s
        case "stalled":
            return queued * pace_s + rest_s
        case "running":
            return (queued + 1) * pace_s + 10 * rest_s


class NextUse:
    """What is needed last goes first. Reads: queue, forecast, reuse. Costs: a walk over the queue and all prefixes."""

    def distances(self, inputs: EvictionInputs) -> tuple[Distance, float]:
        """Seconds until each prefix is read again, over the probability that it is."""
        tier, places = inputs.tier, inputs.queue_positions()
        ends: dict[bytes, float] = {}
        own_s = inf
        queued = len(places)
        for chain in inputs.chains:
            known = tier.known(chain.keys)
            if not known and chain is not inputs.own:
                continue
            rest_s = chain.rest_s(inputs.now_s) if chain.phase == "stalled" else RUNNING_REST_S
            seconds = distance_s(chain.phase, places.get(chain.id, queued), rest_s, queued, inputs.pace_s)
            if chain.phase != "waiting":
                # A prefix that is extended in one of two cases counts as twice as far; a waiting call reads its own.
                seconds /= max(MIN_CHANCE, inputs.returns.chance(chain.hint))
            if chain is inputs.own:
                own_s = seconds
            if known:
                end = chain.keys[known - 1]
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
