"""When will each chain on the host be read again?

The host evicts what is needed last. The queue tells it for calls that wait, the forecast for agents that are stalled;
what a running call holds is on the device and needed on the host only after its own stall. All blocks of an engine cost
the same to copy and nearly the same to compute, so that the cost per byte is one for all and the time decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import Final

from tokencake.forecast.reuse import Returns
from tokencake.time_scheduler.host_tier import HostBlock, HostTier
from tokencake.time_scheduler.prefixes import Chain, Chains, Phase

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


def distances(
    chains: Chains,
    tier: HostTier,
    places: Mapping[str, int],
    own: Chain,
    returns: Returns,
    now_s: float,
    pace_s: float,
) -> tuple[Callable[[HostBlock], float], float]:
    """The distance of the end of every chain on the host, and that of `own`, which wants to be stored."""
    ends: dict[bytes, float] = {}
    own_s = inf
    queued = len(places)
    for chain in chains:
        known = tier.known(chain.keys)
        if not known and chain is not own:
            continue
        rest_s = chain.rest_s(now_s) if chain.phase == "stalled" else RUNNING_REST_S
        seconds = distance_s(chain.phase, places.get(chain.id, queued), rest_s, queued, pace_s)
        if chain.phase != "waiting":
            # What is extended in one of two cases counts as twice as far off. A waiting call reads its own surely.
            seconds /= max(MIN_CHANCE, returns.chance(chain.hint))
        if chain is own:
            own_s = seconds
        if known:
            end = chain.keys[known - 1]
            ends[end] = min(seconds, ends.get(end, inf))
    return lambda block: ends.get(block.key, inf), own_s


def least_recent(now_s: float) -> Callable[[HostBlock], float]:
    """The distance under which the least recently used go first."""
    return lambda block: now_s - block.used_s


def unbounded(block: HostBlock) -> float:  # noqa: ARG001  # the signature of a distance
    """Where the host has room: nothing is evicted."""
    return inf
