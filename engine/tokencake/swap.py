"""Who gives way to an old application whose call does not fit? Calls of much younger ones, and only if it pays.

A swapped call costs one load, and its blocks lie idle while they move. So nobody is swapped while the blocks would
come free by themselves soon, nobody who is nearly done, nobody too often, and nobody unless it is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokencake.applications import LiveCall
    from tokencake.space_settings import SpaceSettings


@dataclass(frozen=True, slots=True)
class Candidate:
    """A running call, what it has to itself and how far it is from its end."""

    call: LiveCall
    freed_blocks: int
    shared_blocks: int
    left_tokens: int


def swap_victims(
    head: LiveCall,
    short_blocks: int,
    running: Sequence[Candidate],
    ages: Sequence[str],
    settings: SpaceSettings,
) -> list[Candidate]:
    """Whom to swap out so that `head` fits; nobody where that would not be enough.

    Args:
        head: the call that waits first in line.
        short_blocks: how many blocks it is short of.
        running: the least senior last.
        ages: ids of the live applications, most senior first.
        settings: how old, how young, how near the end, how often.
    """
    if short_blocks <= 0 or head.app.id not in ages[: settings.swap_oldest]:
        return []
    young = set(ages[max(0, settings.swap_from - 1) :])
    able = [
        candidate
        for candidate in running
        if candidate.call.app.id in young
        and candidate.call.app is not head.app
        and candidate.call.swaps < settings.swaps_per_call
        and candidate.left_tokens > settings.swap_patience_tokens
    ]
    # A whole application gives way, the youngest first: its calls share blocks that come free with the last of them.
    by_app: dict[str, list[Candidate]] = {}
    for candidate in able:
        by_app.setdefault(candidate.call.app.id, []).append(candidate)
    chosen: list[Candidate] = []
    freed = 0
    for name in reversed(ages):
        calls = by_app.get(name, [])
        alone = [candidate for candidate in calls if candidate.freed_blocks >= short_blocks - freed]
        if alone:
            return [*chosen, min(alone, key=lambda candidate: candidate.freed_blocks)]
        chosen += calls
        freed += sum(candidate.freed_blocks for candidate in calls)
        freed += max((candidate.shared_blocks for candidate in calls), default=0)
        if freed >= short_blocks:
            return chosen
    return []
