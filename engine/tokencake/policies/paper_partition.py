"""Published memory partition: a reserve of blocks for each critical agent type (paper, Algorithm 2).

The memory is a shared pool and a reserve. The reserve grows while the device is full and shrinks while it is empty;
the critical agent types, the best-scored three quarters, divide it by what they hold and by their scores. It is
bookkeeping over vLLM's one block pool: every block held is charged to the type that holds it, a shared one once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

START_RATIO: Final = 0.05
STEP: Final = 0.05
MIN_RATIO: Final = 0.05
MAX_RATIO: Final = 0.30
HIGH_USAGE: Final = 0.75
LOW_USAGE: Final = 0.40
CRITICAL_SHARE: Final = 0.75
REFRESH_STEPS: Final = 500
_LEAST_WEIGHT: Final = 1e-6


def next_ratio(ratio: float, usage: float) -> float:
    """The share of the memory to reserve, after one period with `usage` of it held."""
    if usage >= HIGH_USAGE:
        ratio += STEP
    elif usage <= LOW_USAGE:
        ratio -= STEP
    return min(MAX_RATIO, max(MIN_RATIO, ratio))


def reserves(scores: Mapping[str, float], held_blocks: Mapping[str, int], reserved_blocks: int) -> dict[str, int]:
    """Blocks reserved for each critical type.

    Args:
        scores: of each agent type that is known.
        held_blocks: by type; only these count as the memory of which a type holds its share.
        reserved_blocks: of all types together.
    """
    ordered = sorted(scores, key=lambda agent_type: (-scores[agent_type], agent_type))
    critical = ordered[: max(1, int(len(ordered) * CRITICAL_SHARE))]
    total_score = sum(scores[agent_type] for agent_type in critical) or 1.0
    total_held = sum(held_blocks.values()) or 1
    weights = {}
    for agent_type in critical:
        by_score = scores[agent_type] / total_score
        by_memory = held_blocks.get(agent_type, 0) / total_held
        weights[agent_type] = max(by_score, (by_memory + by_score) / 2, _LEAST_WEIGHT)
    return _largest_remainder(weights, reserved_blocks)


def _largest_remainder(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """`total` divided by `weights` into whole numbers that add up to it."""
    if not weights:
        return {}
    scale = total / sum(weights.values())
    whole = {name: int(weight * scale) for name, weight in weights.items()}
    left = total - sum(whole.values())
    for name in sorted(weights, key=lambda name: (whole[name] - weights[name] * scale, name))[:left]:
        whole[name] += 1
    return whole


@dataclass(frozen=True, slots=True)
class Pools:
    """The partition at one moment, in blocks."""

    reserved: Mapping[str, int]
    """For each critical type."""
    held: Mapping[str, int]
    """By each type; "" are calls without a hint."""
    total_blocks: int
    free_blocks: int

    def idle_reserve(self, agent_type: str) -> int:
        """What is reserved for `agent_type` and not held by it."""
        return max(0, self.reserved.get(agent_type, 0) - self.held.get(agent_type, 0))

    @property
    def shared_free_blocks(self) -> int:
        """Free blocks outside all reserves; a reserve that shrank below its use is charged to them."""
        return max(0, self.free_blocks - sum(self.idle_reserve(agent_type) for agent_type in self.reserved))

    def can_take(self, agent_type: str, blocks: int, waiting_types: frozenset[str]) -> bool:
        """Whether a call of type `agent_type` may take `blocks`: shared first, then its own reserve, then idle ones.

        A critical type borrows the idle reserve of types none of whose calls wait, any other only while no critical
        type waits at all. Calls without a hint take what is shared.
        """
        left = blocks - self.shared_free_blocks - (self.idle_reserve(agent_type) if agent_type else 0)
        if left <= 0 or not agent_type:
            return left <= 0
        lenders = [other for other in self.reserved if other != agent_type and other not in waiting_types]
        is_critical = agent_type in self.reserved
        if not is_critical and any(other in waiting_types for other in self.reserved):
            return False
        return left <= sum(self.idle_reserve(other) for other in lenders)
