"""Choice of the running calls to swap out for a blocked call of a more senior application.

A swap costs a copy and a load, and the blocks are idle while they move. So there is no swap if blocks are freed soon
anyway, and never one of a call that is nearly done, was swapped out too often, or frees too little.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tokencake.space_scheduler.applications import LiveRequest
    from tokencake.space_scheduler.policy import Rank
    from tokencake.space_scheduler.settings import SpaceSettings

_FADE_TOKENS: Final = 2**20
"""Computed tokens after which the counts are halved."""


@dataclass(frozen=True, slots=True)
class SwapCandidate:
    """A running call that could be swapped out."""

    call: LiveRequest
    exclusive_blocks: int
    """Freed when it is swapped out."""
    shared_blocks: int
    """Freed when the other calls of its application are swapped out too."""
    left_tokens: int
    """Expected rest of its output."""


@dataclass(slots=True)
class RecomputeBudget:
    """Share of all computed tokens that were computed again for swapped-out calls."""

    computed_tokens: float = 0.0
    lost_tokens: float = 0.0

    def add(self, computed_tokens: int, lost_tokens: int) -> None:
        """Add the tokens of one step."""
        self.computed_tokens += computed_tokens
        self.lost_tokens += lost_tokens
        if self.computed_tokens > _FADE_TOKENS:
            self.computed_tokens, self.lost_tokens = self.computed_tokens / 2, self.lost_tokens / 2

    def are_within(self, share: float) -> bool:
        """Whether at most this share of all tokens was lost."""
        return self.lost_tokens <= share * self.computed_tokens


def by_seniority(ranks: Iterable[tuple[LiveRequest, Rank]]) -> list[str]:
    """Ids of the applications of these calls, the most senior first: by the best rank of their calls."""
    best: dict[str, Rank] = {}
    for call, rank in ranks:
        if call.app.id not in best or rank < best[call.app.id]:
            best[call.app.id] = rank
    return sorted(best, key=best.__getitem__)


def victims(
    head: LiveRequest,
    short_blocks: int,
    running: Iterable[SwapCandidate],
    apps: Sequence[str],
    settings: SpaceSettings,
) -> list[SwapCandidate]:
    """The calls to swap out so that `head` fits; none where all of them would not be enough.

    Args:
        head: the call at the head of the queue.
        short_blocks: how many blocks it lacks.
        running: running calls.
        apps: ids of the live applications, the most senior first.
        settings: thresholds of seniority, remaining output and number of swaps.
    """
    if short_blocks <= 0 or head.app.id not in apps[: settings.swap_oldest]:
        return []
    young = set(apps[max(settings.swap_from, apps.index(head.app.id) + 1) :])
    by_app = _eligible(running, young, head.app.first_seen_s, settings)
    chosen: list[SwapCandidate] = []
    freed = 0
    # The youngest application goes first and as a whole: blocks that its calls share are freed with the last of them.
    for name in reversed(apps):
        calls = by_app.get(name, [])
        enough = [candidate for candidate in calls if candidate.exclusive_blocks >= short_blocks - freed]
        if enough:
            return [*chosen, min(enough, key=lambda candidate: candidate.exclusive_blocks)]
        chosen += calls
        freed += sum(candidate.exclusive_blocks for candidate in calls)
        freed += max((candidate.shared_blocks for candidate in calls), default=0)
        if freed >= short_blocks:
            return chosen
    return []


def _eligible(
    running: Iterable[SwapCandidate], young: set[str], since_s: float, settings: SpaceSettings
) -> Mapping[str, list[SwapCandidate]]:
    by_app: dict[str, list[SwapCandidate]] = {}
    for candidate in running:
        call = candidate.call
        is_able = call.app.id in young and call.app.first_seen_s > since_s and call.swaps < settings.swaps_per_call
        if is_able and candidate.left_tokens > settings.swap_patience_tokens:
            by_app.setdefault(call.app.id, []).append(candidate)
    return by_app
