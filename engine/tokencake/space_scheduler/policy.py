"""Contract of an admission policy: the state of the blocks in, ranks and refusals out."""

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
"""Why a waiting call is skipped in a step. `undeclared` stands for any other value that a policy gives: the call is
skipped as well, since the policy did not admit it."""

REFUSALS: Final[dict[Refusal, str]] = {
    "full": "it does not fit beside the running calls",
    "promised": "the free memory is reserved for the expected growth of running calls",
    "delays": "it would delay a call ahead of it",
    "critical": "a call of an application with a critical path waits for memory",
    "begun": "it would start another long application while calls of started ones wait for memory",
    "order": "a call without a hint that arrived earlier waits for memory",
    "kept": "the free memory is reserved for the call that others were swapped out for",
    "closed": "a call ahead of it has been bypassed for too long",
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
    """Blocks that each call needs that was bypassed in this step, in the order of the queue."""
    has_bypassed_critical: bool = False
    """Whether one of them belongs to an application with a critical path."""
    has_bypassed_unhinted: bool = False
    """Whether one of them came without a hint."""
    bypass_expired: bool = False
    """True once the first of them was bypassed longer than `pass_s`; backfilling then stops."""
    exclusive_blocks: Mapping[str, int] = field(default_factory=dict)
    """By request: blocks that no other request holds, as of the last ranking."""
    taken: tuple[tuple[LiveRequest, int], ...] = ()
    """Calls admitted since, and the blocks that they need."""
    step: int = 0
    """Steps of the engine so far."""


class SpacePolicy(Protocol):
    """Decides from values; keeps what it needs from one ranking to the next."""

    @property
    def rank_reasons(self) -> tuple[str, ...]:
        """For each part of a rank: why the call with the lower value goes first."""

    @property
    def swaps(self) -> bool:
        """Whether running requests may be swapped out to the host for a more senior application."""

    def begin(self, applications: AppTracker, state: AdmissionState, now: float) -> None:
        """A new ranking begins: everything that `rank` and `refusal` may read of the live calls is as of now."""

    def rank(self, call: LiveRequest, *, need_blocks: int, shares_prefix: bool) -> Rank:
        """Its order among the waiting calls, and among the running ones; valid until the next `begin`.

        Args:
            call: waiting or running.
            need_blocks: to hold all its tokens.
            shares_prefix: whether running calls hold most of its prompt.
        """

    def refusal(self, call: LiveRequest, need_blocks: int, state: AdmissionState) -> Refusal | None:
        """Why a waiting call may not take `need_blocks` now, or None. A refused call is skipped in this step."""

    def reserve(self) -> dict[str, int]:
        """As of the last ranking: `size`, blocks kept for critical calls, and `used`, how many of them they hold."""
