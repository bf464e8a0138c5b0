"""What does a policy of the Space Scheduler see, and what does it answer? Values in, ranks and refusals out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol, TypeAlias

from tokencake.space_scheduler.applications import AppTracker, LiveRequest
from tokencake.space_scheduler.growth import GrowthReservation

Rank: TypeAlias = tuple[float, ...]
"""Lowest goes first; the last part is the number of the arrival, so no two are the same."""

Refusal: TypeAlias = Literal[
    "full", "promised", "delays", "critical", "begun", "order", "kept", "closed", "reserved", "undeclared"
]
"""Why a waiting call is passed over. `undeclared` stands for any other value that a policy gives: the call is passed
over as well, since the policy did not let it in."""

REFUSALS: Final[dict[Refusal, str]] = {
    "full": "it does not fit beside the calls that run",
    "promised": "the memory is promised to what the calls that run will yet write",
    "delays": "it would still hold memory when a call before it could have it",
    "critical": "a call of an application with a critical path waits for memory",
    "begun": "its application has not begun, and calls of others that have wait for memory",
    "order": "a call without a hint that came before it waits for memory",
    "kept": "what is free was given up for a call of an older application",
    "closed": "a call before it has been passed for too long",
    "reserved": "the rest of the memory is reserved for critical agent types",
    "undeclared": "the policy refused it for a reason that is not declared",
}


@dataclass(frozen=True, slots=True)
class AdmissionState:
    """The blocks of the device at one moment; blocks shared by several calls count once."""

    total_blocks: int
    free_blocks: int
    block_tokens: int = 16
    reservations: tuple[GrowthReservation, ...] = ()
    """Of all admitted calls."""
    bypassed: tuple[int, ...] = ()
    """What each call needs that was passed over in this step, the first in line first."""
    has_bypassed_critical: bool = False
    """Whether one of them belongs to an application with a critical path."""
    has_bypassed_unhinted: bool = False
    """Whether one of them came without a hint."""
    bypass_expired: bool = False
    """Whether the first of them has been passed for so long that nobody may pass it any more."""
    exclusive_blocks: Mapping[str, int] = field(default_factory=dict)
    """By request: blocks that nobody else holds, as of the last ranking."""
    taken: tuple[tuple[LiveRequest, int], ...] = ()
    """Calls admitted since, and what they need."""
    step: int = 0
    """Steps of the engine so far."""


class SpacePolicy(Protocol):
    """Decides from values; keeps what it needs from one ranking to the next."""

    @property
    def rank_reasons(self) -> tuple[str, ...]:
        """For each part of a rank: why the call with the lower one goes first."""

    @property
    def swaps(self) -> bool:
        """Whether running requests may be swapped out to the host for a more senior application."""

    def begin(self, applications: AppTracker, state: AdmissionState, now: float) -> None:
        """A new ranking begins: everything that `rank` and `refusal` may read of the live calls is as of now."""

    def rank(self, call: LiveRequest, *, need_blocks: int, shares_prefix: bool) -> Rank:
        """Its place among the calls that wait, and among those that run; valid until the next `begin`."""

    def refusal(self, call: LiveRequest, need_blocks: int, state: AdmissionState) -> Refusal | None:
        """Why a waiting call may not take `need_blocks` now, or None. Whoever is refused is passed over this step."""

    def reserve(self) -> dict[str, int]:
        """As of the last ranking: `size`, blocks kept for critical calls, and `used`, how many of them they hold."""
