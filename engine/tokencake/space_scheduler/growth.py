"""Will what has been admitted still fit when it has grown? The peak of the blocks that admitted calls will yet take.

Every running call grows by one token a step and gives its own blocks back at its end, so demand has its peaks just
before an end. A call holds back what it needs until then, and no longer: memory that one will have given back before
another wants it is promised to both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GrowthReservation:
    """What one admitted call will yet take and give."""

    left_tokens: int
    """Of its answer, as far as it can be foreseen."""
    pending_blocks: int
    """Of its prompt, not allocated yet."""
    freed_blocks: int
    """Held by it alone now: they come free with its end."""


def peak_blocks(reservations: Iterable[GrowthReservation], block_tokens: int) -> int:
    """Blocks that must be free now for all `reservations` to be kept."""
    ordered = sorted(reservations, key=lambda reservation: reservation.left_tokens)
    pending = sum(reservation.pending_blocks for reservation in ordered)
    alive, returned, peak = len(ordered), 0, pending
    for reservation in ordered:
        # Just before this one ends: it and the later ones have grown by as much, the earlier ones are gone.
        grown = -(-reservation.left_tokens // block_tokens) * alive
        peak = max(peak, pending + grown - returned)
        pending -= reservation.pending_blocks
        returned += reservation.freed_blocks
        alive -= 1
    return peak


def tokens_until_free(
    reservations: Iterable[GrowthReservation], need_blocks: int, free_blocks: int, block_tokens: int
) -> int:
    """After how many tokens of everybody's answers `need_blocks` are free, nobody else being admitted."""
    ordered = sorted(reservations, key=lambda reservation: reservation.left_tokens)
    pending = sum(reservation.pending_blocks for reservation in ordered)
    alive, returned = len(ordered), 0
    if free_blocks - pending >= need_blocks:
        return 0
    for reservation in ordered:
        pending -= reservation.pending_blocks
        returned += reservation.freed_blocks
        alive -= 1
        grown = -(-reservation.left_tokens // block_tokens) * alive
        if free_blocks + returned - pending - grown >= need_blocks:
            return reservation.left_tokens
    return ordered[-1].left_tokens + 1 if ordered else 0


def would_delay(
    coming: GrowthReservation,
    waiting: Iterable[int],
    reservations: Collection[GrowthReservation],
    free_blocks: int,
    block_tokens: int,
) -> bool:
    """Whether admitting `coming` now would make one of `waiting` start later.

    Args:
        coming: what it will take; nothing of it is allocated yet.
        waiting: blocks that calls need which go before it and do not fit now, the first in line first.
        reservations: of all admitted calls.
        free_blocks: now.
        block_tokens: tokens of a block.
    """
    grown = coming.pending_blocks + -(-coming.left_tokens // block_tokens)
    taken = (*reservations, GrowthReservation(coming.left_tokens, 0, grown))
    total = 0
    for need in waiting:
        total += need
        before = tokens_until_free(reservations, total, free_blocks, block_tokens)
        if tokens_until_free(taken, total, free_blocks - coming.pending_blocks, block_tokens) > before:
            return True
    return False
