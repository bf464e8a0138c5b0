"""Contracts of the Time Scheduler's policies: offload at the finish of a request, eviction from a full host.

When a request finishes, an offload policy says *keep* (pin the blocks on the device), *offload* (copy to the host what
is not there), *drop* (nothing will extend this prefix; its exclusive blocks are reused first) or *leave* (as stock
vLLM). For an offloaded prefix it says when the upload should start. Decisions are values; costs are compared in
seconds; nothing here knows vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias

from tokencake.forecast.costs import CostModel
from tokencake.forecast.durations import DurationDistribution
from tokencake.forecast.reuse import Claim, ReuseProbability
from tokencake.time_scheduler.host_tier import Distance, HostTier
from tokencake.time_scheduler.prefixes import CachedPrefix, PrefixIndex
from tokencake.time_scheduler.settings import TimeSettings

Action: TypeAlias = Literal["keep", "offload", "drop", "leave"]
PaperReason: TypeAlias = Literal[
    "no waiting demand",
    "host is full",
    "stall too short",
    "window too short",
    "low pressure",
    "important",
    "score",
]
"""Why the published gate rejects a copy."""
Reason: TypeAlias = (
    PaperReason
    | Literal[
        "final",
        "over",
        "short",
        "on host already",
        "recompute is cheaper",
        "reusable",
        "not eligible",
        "emergency",
        "pays",
    ]
)

MIN_REUSE_PROBABILITY: Final = 0.5
"""With a lower probability of reuse the next request is not expected."""
CHURN_STEPS: Final = 4


@dataclass(frozen=True, slots=True)
class PaperInputs:
    """What the published gate weighs beyond the rest; to know it costs a walk over the head of the queue."""

    waiting_blocks: int
    """What the waiting requests at the head of the queue need."""
    fitting_blocks: int
    """What those of them need that could be admitted now (paper: the window)."""
    host_free: int
    importance: float
    is_near_end: bool
    """Whether at most one LLM node follows in its graph."""
    recent_stores: int
    """Within the last `CHURN_STEPS` steps."""


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """What is known when a request finishes; `blocks` count full blocks."""

    claim: Claim | None
    """Why nothing will extend it, where that is believed."""
    remaining: DurationDistribution
    queue_s: float
    """How long the next request will wait for its first slot once it has come."""
    blocks: int
    missing: int
    """Of them not on the host."""
    device_blocks: int
    free_blocks: int
    pinned_blocks: int
    waiting_calls: int
    residency_s: float
    """How long unreferenced blocks stay on the device."""
    paper_inputs: Callable[[], PaperInputs]
    """Computed when called; valid until the scheduler's state changes."""


@dataclass(frozen=True, slots=True)
class OffloadDecision:
    """`action` and, in a word or two, why."""

    action: Action
    why: Reason


class TimePolicy(Protocol):
    """Pure: the same arguments give the same answer, and nothing is kept."""

    waits_for_demand: bool
    """Whether a `leave` is worth asking again while requests wait for room."""
    counts_whole_prompts: bool
    """Whether a waiting request is taken to need its whole prompt, blocks that others hold included."""
    restores_preempted: bool
    """Whether what a preempted request has computed is copied to the host."""

    def on_finish(self, request: FinishedRequest, costs: CostModel, settings: TimeSettings) -> OffloadDecision:
        """What to do with the KV of a request that has finished."""

    def upload_in_s(
        self, remaining: DurationDistribution, blocks: int, costs: CostModel, settings: TimeSettings
    ) -> float:
        """In how many seconds the upload of `blocks` should start."""

    def may_upload(self, remaining: DurationDistribution, probability: float, residency_s: float) -> bool:
        """Whether an upload now will be of use.

        Args:
            remaining: of the stall.
            probability: that the prefix is extended at all.
            residency_s: how long unreferenced blocks stay on the device.
        """


@dataclass(frozen=True, slots=True)
class EvictionInputs:
    """What an eviction policy may read when a prefix is to be stored on a full host."""

    own: CachedPrefix
    """The prefix to be stored."""
    prefixes: PrefixIndex
    tier: HostTier
    reuse: ReuseProbability
    now_s: float
    admission_interval_s: float
    """Between two admissions."""
    queue_positions: Callable[[], Mapping[str, int]]
    """Of each waiting request; a walk over the queue."""


class EvictionPolicy(Protocol):
    """Orders the ends of the prefixes in host memory by the distance of their next use. Keeps nothing."""

    def distances(self, inputs: EvictionInputs) -> tuple[Distance, float]:
        """The distance of any block at the end of a prefix, and that of the blocks to be stored.

        The farthest goes first, and only where it is farther than what is to be stored. Valid until the scheduler's
        state changes.
        """
