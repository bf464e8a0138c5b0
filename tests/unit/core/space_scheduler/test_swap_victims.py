"""Who gives way to an old application's call, from values."""

import pytest

from tokencake.space_scheduler.applications import LiveRequest
from tokencake.space_scheduler.settings import SpaceSettings
from tokencake.space_scheduler.swap_victims import RecomputeBudget, SwapCandidate, by_seniority, victims

SETTINGS = SpaceSettings(swap_oldest=1, swap_from=1)


def candidates(*calls: LiveRequest, private: int = 10, shared: int = 0, left: int = 1_000) -> list[SwapCandidate]:
    return [SwapCandidate(call, private, shared, left) for call in calls]


def chosen(
    head: LiveRequest, short: int, running: list[SwapCandidate], apps: list[str], settings: SpaceSettings = SETTINGS
):
    return [candidate.call for candidate in victims(head, short, running, apps, settings)]


def test_an_old_application_may_push_out_a_young_one(call):
    old, young = call("old"), call("young", now=1.0)

    assert chosen(old, 5, candidates(young), ["old", "young"]) == [young]


def test_nobody_is_pushed_out_in_vain(call):
    old, young = call("old"), call("young", now=1.0)
    apps = ["old", "young"]

    assert chosen(old, 11, candidates(young), apps) == [], "not enough"
    assert chosen(old, 0, candidates(young), apps) == [], "it fits"
    assert chosen(young, 5, candidates(old), apps) == [], "the other way round"
    assert chosen(old, 5, candidates(young, left=SETTINGS.swap_patience_tokens), apps) == [], "nearly done"
    young.swaps = SETTINGS.swaps_per_call
    assert chosen(old, 5, candidates(young), apps) == [], "too often"


def test_only_the_oldest_may_and_only_the_young_must(call):
    first, second, third = call("first"), call("second", now=1.0), call("third", now=2.0)
    apps = ["first", "second", "third"]
    settings = SpaceSettings(swap_oldest=2, swap_from=2)

    assert chosen(second, 5, candidates(first, third), apps, settings) == [third]
    assert chosen(third, 5, candidates(first, second), apps, settings) == []
    assert chosen(first, 5, candidates(second), apps, settings) == []
    assert chosen(first, 5, candidates(third), apps, SpaceSettings(swap_oldest=0, swap_from=1)) == []


def test_a_call_does_not_give_way_to_its_own_application_nor_to_a_younger_one(call):
    older, head, sibling = call("older"), call("app"), call("app", now=1.0)
    settings = SpaceSettings(swap_oldest=2, swap_from=0)

    assert chosen(head, 5, candidates(older, sibling), ["older", "app"], settings) == []


def test_the_youngest_application_gives_way_with_one_call_where_one_is_enough(call):
    old, middle, young, twin = call("old"), call("b", now=1.0), call("c", now=2.0), call("c", now=2.0)
    running = [*candidates(middle, private=9), *candidates(young, private=20), *candidates(twin, private=9)]

    assert chosen(old, 8, running, ["old", "b", "c"]) == [twin]
    assert chosen(old, 30, running, ["old", "b", "c"]) == [young, twin, middle]


def test_blocks_that_two_calls_share_come_free_when_both_give_way(call):
    old, young, twin = call("old"), call("c", now=2.0), call("c", now=2.0)

    assert chosen(old, 50, candidates(young, twin, private=5, shared=40), ["old", "c"]) == [young, twin]


def test_an_application_is_as_senior_as_its_most_senior_call(call):
    calls = [call("b", now=1.0), call("a", now=2.0), call("b", now=3.0)]

    assert by_seniority(zip(calls, [(5.0,), (3.0,), (1.0,)], strict=True)) == ["b", "a"]


def test_swapping_stops_while_too_much_is_lost_by_it():
    losses = RecomputeBudget()
    assert losses.are_within(0.01), "nothing was tried yet"

    losses.add(1_000, 20)
    assert not losses.are_within(0.01)

    losses.add(1_500, 0)
    assert losses.are_within(0.01)
    losses.add(2**20, 0)
    assert losses.lost_tokens == pytest.approx(10), "the past fades"
