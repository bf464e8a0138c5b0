"""Blocks that admitted calls will yet take, against a count without shortcuts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tokencake.space_scheduler.growth import GrowthReservation, peak_blocks, tokens_until_free, would_delay

BLOCK = 16
PROMISES = st.lists(
    st.builds(
        GrowthReservation,
        left_tokens=st.integers(1, 400),
        pending_blocks=st.integers(0, 20),
        freed_blocks=st.integers(0, 40),
    ),
    max_size=8,
)


def taken_after(tokens: int, reservations: list[GrowthReservation], *, are_over: int) -> int:
    """Blocks taken beyond those of now, where the first `are_over` have ended and the others have written `tokens`."""
    grown = -(-tokens // BLOCK)
    alive = reservations[are_over:]
    return sum(reservation.pending_blocks + grown for reservation in alive) - sum(
        p.freed_blocks for p in reservations[:are_over]
    )


@given(PROMISES)
def test_the_peak_is_the_most_that_is_taken_just_before_an_end(reservations: list[GrowthReservation]) -> None:
    ordered = sorted(reservations, key=lambda reservation: reservation.left_tokens)
    taken = [taken_after(0, ordered, are_over=0)]
    taken += [
        taken_after(reservation.left_tokens, ordered, are_over=place) for place, reservation in enumerate(ordered)
    ]

    assert peak_blocks(reservations, BLOCK) == max(taken)


@given(PROMISES, st.integers(0, 200), st.integers(0, 200))
def test_blocks_are_free_after_the_first_end_that_leaves_enough(
    reservations: list[GrowthReservation], need: int, free: int
) -> None:
    ordered = sorted(reservations, key=lambda reservation: reservation.left_tokens)
    moments = [(0, taken_after(0, ordered, are_over=0))]
    moments += [
        (reservation.left_tokens, taken_after(reservation.left_tokens, ordered, are_over=place + 1))
        for place, reservation in enumerate(ordered)
    ]
    never = ordered[-1].left_tokens + 1 if ordered else 0

    expected = next((tokens for tokens, taken in moments if free - taken >= need), never)
    assert tokens_until_free(reservations, need, free, BLOCK) == expected


def test_the_prompt_of_a_call_that_has_begun_counts_until_it_is_allocated() -> None:
    assert peak_blocks([GrowthReservation(16, 7, 0)], BLOCK) == 8
    assert peak_blocks([GrowthReservation(16, 7, 2), GrowthReservation(32, 5, 0)], BLOCK) == 14, (
        "both prompts, and a block for each"
    )
    assert tokens_until_free([GrowthReservation(16, 7, 0)], 3, 10, BLOCK) == 0
    assert tokens_until_free([GrowthReservation(16, 7, 0)], 4, 10, BLOCK) == 16


def test_what_never_comes_free_is_later_than_every_end() -> None:
    assert tokens_until_free([GrowthReservation(16, 0, 1), GrowthReservation(40, 0, 1)], 100, 10, BLOCK) == 41
    assert tokens_until_free([], 100, 10, BLOCK) == 0


def test_a_call_takes_its_prompt_from_what_is_free_and_gives_it_back_with_its_answer() -> None:
    running = [GrowthReservation(32, 0, 20)]
    # 10 are free; a call of 4 blocks that writes one more gives back 5 at its end.
    assert not would_delay(GrowthReservation(16, 4, 0), [30], running, 10, BLOCK), "it is over before the running one"
    assert not would_delay(GrowthReservation(32, 4, 0), [30], running, 10, BLOCK), "or together with it"
    assert would_delay(GrowthReservation(33, 4, 0), [30], running, 10, BLOCK), "the waiting one would start later"
    assert not would_delay(GrowthReservation(33, 4, 0), [6], running, 10, BLOCK), "which fits beside it"
    assert would_delay(GrowthReservation(33, 4, 0), [7], running, 10, BLOCK)


def test_waiting_calls_need_their_blocks_together() -> None:
    running = [GrowthReservation(32, 0, 20)]
    late = GrowthReservation(320, 4, 0)

    assert not would_delay(late, [10], running, 20, BLOCK)
    assert not would_delay(late, [10, 6], running, 20, BLOCK)
    assert would_delay(late, [10, 7], running, 20, BLOCK), "the second would not fit beside the first any more"
    assert not would_delay(late, [], running, 20, BLOCK)


@given(PROMISES.filter(bool), st.lists(st.integers(1, 60), max_size=3), st.integers(0, 200))
def test_a_call_that_needs_nothing_and_ends_at_once_delays_nobody(
    reservations: list[GrowthReservation], waiting: list[int], free: int
) -> None:
    assert not would_delay(GrowthReservation(0, 0, 0), waiting, reservations, free, BLOCK)
