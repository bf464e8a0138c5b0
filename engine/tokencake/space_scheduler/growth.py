"""Growth reservation: the peak of the blocks that admitted calls will still take until they end.

Every running call grows by one token a step and frees its exclusive blocks at its end, so demand peaks just before an
end. A call reserves what it needs until its own end and no longer: blocks that one call frees before another needs them
are reserved for both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GrowthReservation:
    """Blocks that one admitted call will still take, and those that it will free."""

    left_tokens: int
    """Expected rest of its output."""
    pending_blocks: int
    """Of its prompt, not yet allocated."""
    freed_blocks: int
    """Its exclusive blocks, freed with its end."""


def peak_blocks(reservations: Iterable[GrowthReservation], block_tokens: int) -> int:
    """Blocks that must be free now for all `reservations` to hold."""
    ordered = sorted(reservations, key=lambda reservation: reservation.left_tokens)
    pending = sum(reservation.pending_blocks for reservation in ordered)
    alive, returned, peak = len(ordered), 0, pending
    for reservation in ordered:
        # Just before this one ends: it and the later ones have grown by its tokens, the earlier ones are gone.
        grown = -(-reservation.left_tokens // block_tokens) * alive
        peak = max(peak, pending + grown - returned)
        pending -= reservation.pending_blocks
        returned += reservation.freed_blocks
        alive -= 1
    return peak


def tokens_until_free(
    reservations: Iterable[GrowthReservation], need_blocks: int, free_blocks: int, block_tokens: int
) -> int:
    """Decode steps after which `need_blocks` are free if no other call is admitted (backfilling's shadow time)."""
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
        coming: the call to be admitted; nothing of it is allocated yet.
        waiting: blocks that each blocked call ahead of it needs, in the order of the queue.
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
