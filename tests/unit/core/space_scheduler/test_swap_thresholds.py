"""Thresholds and order of swapping out, each on both of its sides."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tokencake.space_scheduler.applications import LiveRequest
from tokencake.space_scheduler.settings import SpaceSettings
from tokencake.space_scheduler.swap_victims import RecomputeBudget, SwapCandidate, by_seniority, victims

SETTINGS = SpaceSettings(swap_oldest=1, swap_from=1, swap_patience_tokens=64, swaps_per_call=2)
MakeCall = Callable[..., LiveRequest]


def chosen(
    head: LiveRequest, short: int, running: list[SwapCandidate], apps: list[str], settings: SpaceSettings = SETTINGS
) -> list[LiveRequest]:
    return [candidate.call for candidate in victims(head, short, running, apps, settings)]


def test_a_call_that_is_short_of_one_block_is_given_way_to_and_one_that_fits_is_not(call: MakeCall) -> None:
    old, young = call("old"), call("young", now=1.0)
    running = [SwapCandidate(young, 10, 0, 1_000)]

    assert chosen(old, 1, running, ["old", "young"]) == [young]
    assert chosen(old, 0, running, ["old", "young"]) == []
    assert chosen(old, -1, running, ["old", "young"]) == []


def test_a_call_is_swapped_out_while_more_than_the_patience_is_left_of_its_answer(call: MakeCall) -> None:
    old, young = call("old"), call("young", now=1.0)

    assert chosen(old, 5, [SwapCandidate(young, 10, 0, 64)], ["old", "young"]) == []
    assert chosen(old, 5, [SwapCandidate(young, 10, 0, 65)], ["old", "young"]) == [young]


def test_a_call_is_swapped_out_as_often_as_is_set_and_no_more(call: MakeCall) -> None:
    old, young = call("old"), call("young", now=1.0)
    running = [SwapCandidate(young, 10, 0, 1_000)]

    young.swaps = 1
    assert chosen(old, 5, running, ["old", "young"]) == [young]
    young.swaps = 2
    assert chosen(old, 5, running, ["old", "young"]) == []


def test_an_application_seen_at_the_same_moment_is_not_younger(call: MakeCall) -> None:
    old, twin = call("old", now=1.0), call("twin", now=1.0)

    assert chosen(old, 5, [SwapCandidate(twin, 10, 0, 1_000)], ["old", "twin"]) == []


def test_those_that_give_way_are_enough_to_the_block(call: MakeCall) -> None:
    old, young, twin = call("old"), call("young", now=1.0), call("young", now=1.0)

    assert chosen(old, 10, [SwapCandidate(young, 10, 0, 1_000)], ["old", "young"]) == [young]
    assert chosen(old, 11, [SwapCandidate(young, 10, 0, 1_000)], ["old", "young"]) == []
    both = [SwapCandidate(young, 10, 4, 1_000), SwapCandidate(twin, 10, 6, 1_000)]
    assert chosen(old, 26, both, ["old", "young"]) == [young, twin], "what they share comes free once"
    assert chosen(old, 27, both, ["old", "young"]) == []


def test_an_older_one_gives_only_what_the_youngest_did_not(call: MakeCall) -> None:
    old, middle, other, young = call("old"), call("b", now=1.0), call("b", now=1.0), call("c", now=2.0)
    running = [
        SwapCandidate(middle, 12, 0, 1_000),
        SwapCandidate(other, 5, 0, 1_000),
        SwapCandidate(young, 10, 0, 1_000),
    ]

    assert chosen(old, 15, running, ["old", "b", "c"]) == [young, other], "5 beyond the 10 are short"
    assert chosen(old, 16, running, ["old", "b", "c"]) == [young, middle]


def test_of_the_calls_that_are_enough_the_smallest_gives_way(call: MakeCall) -> None:
    old, large, small = call("old"), call("c", now=2.0), call("c", now=2.0)
    running = [SwapCandidate(large, 30, 0, 1_000), SwapCandidate(small, 20, 0, 1_000)]

    assert chosen(old, 8, running, ["old", "c"]) == [small]


@pytest.mark.parametrize(("kept", "is_victim"), [(1, True), (2, True), (3, False)])
def test_the_most_senior_applications_are_never_swapped_out(call: MakeCall, kept: int, is_victim: bool) -> None:
    first, second, third = call("first"), call("second", now=1.0), call("third", now=2.0)
    settings = SpaceSettings(swap_oldest=3, swap_from=kept)
    apps = ["first", "second", "third"]

    assert chosen(first, 5, [SwapCandidate(third, 10, 0, 1_000)], apps, settings) == ([third] if is_victim else [])
    assert chosen(second, 5, [SwapCandidate(second, 10, 0, 1_000)], apps, settings) == [], "nor its own"
    assert chosen(third, 5, [SwapCandidate(second, 10, 0, 1_000)], apps, settings) == []


def test_an_application_counts_by_the_best_rank_whenever_it_comes(call: MakeCall) -> None:
    a, b, again = call("a"), call("b", now=1.0), call("a", now=2.0)

    assert by_seniority([(a, (1.0,)), (b, (2.0,)), (again, (3.0,))]) == ["a", "b"]
    assert by_seniority([(a, (3.0,)), (b, (2.0,)), (again, (1.0,))]) == ["a", "b"]
    assert by_seniority([(a, (3.0,)), (b, (2.0,))]) == ["b", "a"]


def test_losses_are_within_a_share_up_to_and_with_that_share() -> None:
    losses = RecomputeBudget()
    losses.add(800, 8)
    losses.add(200, 2)

    assert (losses.computed_tokens, losses.lost_tokens) == (1_000, 10)
    assert losses.are_within(0.01)
    assert not losses.are_within(0.0099)


def test_the_past_counts_for_half_only_beyond_the_bound() -> None:
    losses = RecomputeBudget()
    losses.add(2**20, 100)
    assert (losses.computed_tokens, losses.lost_tokens) == (2**20, 100)

    losses.add(2, 2)
    assert (losses.computed_tokens, losses.lost_tokens) == (2**19 + 1, 51)
