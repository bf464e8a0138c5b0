"""Slack of branches at the join that waits for them, from values."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tokencake.forecast.graph_stats import GraphStats, PathCosts
from tokencake.protocol import Graph
from tokencake.space_scheduler.branches import MAX_NODES, MAX_STALLED, Branch, StalledBranches, slacks_s

DIAMOND = Graph("g", {"l": {}, "r": {}, "m": {}, "solo": {}}, (("l", "m"), ("r", "m")))


def no_ways(_: str) -> None:
    return None


def path_costs_of(graph: str) -> PathCosts | None:
    return GraphStats({"g": DIAMOND}.get).path_costs(graph)


def branch(
    call: str,
    remaining_s: float,
    *,
    node: str = "n",
    join: str | None = None,
    parent: str | None = None,
    at_s: float = 0.0,
    session: str | None = None,
    until_s: float = float("inf"),
    graph: str = "g",
) -> Branch:
    return Branch(call, session or call, (graph, node), join, parent, at_s, remaining_s, until_s)


def test_what_is_left_of_a_way_shrinks_with_the_time_and_is_no_debt() -> None:
    one = branch("a", 10.0, at_s=5.0)

    assert [one.left_s(now) for now in (5.0, 8.0, 15.0, 99.0)] == [10.0, 7.0, 0.0, 0.0]


def test_the_farthest_branch_of_a_join_has_no_slack_and_the_others_the_difference() -> None:
    branches = [branch("a", 10.0, node="x", join="j"), branch("b", 4.0, node="y", join="j"), branch("c", 7.0, join="j")]

    assert slacks_s(branches, no_ways, 0.0) == [0.0, 6.0, 3.0]
    assert slacks_s(branches, no_ways, 5.0) == [0.0, 5.0, 3.0]


def test_branches_of_one_place_and_join_are_siblings_and_one_alone_is_not() -> None:
    assert slacks_s([branch("a", 3.0), branch("b", 5.0)], no_ways, 0.0) == [2.0, 0.0]
    assert slacks_s([branch("a", 3.0)], no_ways, 0.0) == [None]
    assert slacks_s([], no_ways, 0.0) == []


def test_branches_of_other_joins_or_callers_are_no_siblings() -> None:
    assert slacks_s([branch("a", 3.0, join="j"), branch("b", 5.0, join="k")], no_ways, 0.0) == [None, None]
    assert slacks_s([branch("a", 3.0, join="j", parent="p"), branch("b", 5.0, join="j")], no_ways, 0.0) == [None, None]


@pytest.mark.parametrize(
    ("one", "other", "are_siblings"),
    [
        ("l", "r", True),
        ("l", "solo", False),
        ("solo", "l", False),
        ("l", "m", False),
        ("m", "l", False),
        ("l", "unknown", False),
        ("unknown", "l", False),
    ],
)
def test_branches_from_which_the_graph_leads_to_one_node_are_siblings(one: str, other: str, are_siblings: bool) -> None:
    found = slacks_s([branch("a", 3.0, node=one), branch("b", 5.0, node=other)], path_costs_of, 0.0)

    assert found == ([2.0, 0.0] if are_siblings else [None, None])
    elsewhere = [branch("a", 3.0, node=one), branch("b", 5.0, node=other, graph="h")]
    assert slacks_s(elsewhere, path_costs_of, 0.0) == [None, None]


def test_a_branch_that_names_its_join_is_a_sibling_of_one_that_the_graph_leads_there() -> None:
    assert slacks_s([branch("a", 3.0, node="l", join="m"), branch("b", 5.0, node="r")], path_costs_of, 0.0) == [
        2.0,
        0.0,
    ]


@pytest.mark.parametrize(("places", "is_measured"), [(MAX_NODES, True), (MAX_NODES + 1, False)])
def test_slack_is_measured_for_a_bounded_number_of_places(places: int, is_measured: bool) -> None:
    branches = [branch(str(number), 1.0, node=f"n{number}", join="j") for number in range(places)]

    assert slacks_s(branches, no_ways, 0.0) == [0.0 if is_measured else None] * places


# --- stalled branches -------------------------------------------------------------------------------


def arrive(
    stalled: StalledBranches,
    session: str,
    node: str,
    *,
    join: str | None = None,
    parent: str | None = None,
    path_costs: Callable[[str], PathCosts | None] = path_costs_of,
) -> tuple[str | None, bool]:
    cause, is_sure = stalled.arrive(session, ("g", node), join, parent, path_costs("g"))
    return None if cause is None else cause.call, is_sure


def left(*branches: Branch) -> StalledBranches:
    stalled = StalledBranches()
    for one in branches:
        stalled.leave(one)
    return stalled


def names(stalled: StalledBranches, now: float = 0.0) -> list[str]:
    return [one.call for one in stalled.living(now)]


def test_a_stalled_branch_is_waited_for_until_its_time_is_up() -> None:
    stalled = left(branch("a", 1.0, until_s=10.0), branch("b", 1.0))

    assert (names(stalled, 9.9), names(stalled, 10.0)) == (["a", "b"], ["b"])


@pytest.mark.parametrize(("count", "oldest"), [(MAX_STALLED, "0"), (MAX_STALLED + 1, "1")])
def test_the_oldest_of_too_many_stalled_branches_is_forgotten(count: int, oldest: str) -> None:
    stalled = left(*(branch(str(number), 1.0) for number in range(count)))

    assert names(stalled)[0] == oldest
    assert len(names(stalled)) == min(count, MAX_STALLED)


def test_the_next_call_of_its_session_ends_a_stalled_branch_and_is_sure_of_it() -> None:
    stalled = left(branch("a", 1.0, session="s", at_s=3.0), branch("b", 1.0, session="t", at_s=9.0))

    assert arrive(stalled, "s", "x") == ("a", True)
    assert names(stalled) == ["b"]


def test_what_works_in_a_tool_of_an_agent_that_goes_on_is_over_too() -> None:
    stalled = left(branch("a", 1.0, session="s"), branch("helper", 1.0, parent="a", at_s=5.0))

    assert arrive(stalled, "s", "x") == ("helper", True), "the last to end"
    assert names(stalled) == []


def test_a_call_behind_a_join_ends_all_branches_that_feed_it() -> None:
    stalled = left(branch("a", 1.0, node="l", at_s=5.0), branch("b", 1.0, node="r", at_s=2.0))
    assert arrive(stalled, "new", "m") == ("a", True)
    assert names(stalled) == []

    stalled = left(branch("a", 1.0, node="l", join="m"), branch("b", 1.0, node="r", join="m"))
    assert arrive(stalled, "new", "m", join="m") == ("b", False), "a branch of the same join goes beside them"
    assert names(stalled) == ["a", "b"]
    assert arrive(stalled, "new", "m")[1]
    assert names(stalled) == []


def test_a_session_that_is_known_goes_on_for_itself_and_ends_no_unnamed_branch() -> None:
    stalled = left(branch("a", 1.0, node="l", session="s"), branch("b", 1.0, node="r", session="t"))

    assert arrive(stalled, "s", "m") == ("a", True)
    assert names(stalled) == ["b"]


def test_a_call_of_another_caller_or_off_the_graph_ends_no_branch() -> None:
    stalled = left(branch("a", 1.0, node="l"), branch("p", 1.0, node="solo"))

    assert arrive(stalled, "new", "m", parent="p") == ("p", False), "it works in the tool of that call"
    assert arrive(stalled, "new", "solo") == ("p", False), "the last that ended may have caused it"
    assert arrive(stalled, "new", "m", path_costs=no_ways) == ("p", False)
    assert names(stalled) == ["a", "p"]
    assert arrive(StalledBranches(), "new", "m") == (None, False)
