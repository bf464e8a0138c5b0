"""The bounds of the registry and the account of its memory, each on both of its sides."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tokencake import protocol
from tokencake.protocol import Hint
from tokencake.registry.memory_account import Accounts, call_bytes, graph_bytes, text_bytes, tool_bytes, waits_bytes
from tokencake.registry.record_store import Limits
from tokencake.registry.registry import Registry
from tokencake.registry.timeline import MAX_VISITED, MAX_WEIGHT, TICK_S, Timeline, after, page_of

MIB = 2**20


def run(registry: Registry, name: str, session: str, now: float = 100.0, *, is_over: bool = True, **hint: Any) -> bool:
    is_kept = registry.add_call(name, Hint(session=session, call=name, **hint), 10, now)
    if is_kept and is_over:
        registry.finish_call(name, 1, is_aborted=False, now=now)
    return is_kept


def kept_bytes(registry: Registry) -> int:
    return int(registry.drain()["gauges"]["registry_bytes"])


# --- count ------------------------------------------------------------------------------------------


def test_as_many_sessions_apps_and_calls_are_kept_as_is_allowed() -> None:
    registry = Registry(Limits(sessions=3))
    for number in range(5):
        run(registry, f"c{number}", f"s{number}")
    assert list(registry.sessions) == ["s2", "s3", "s4"]

    registry = Registry(Limits(calls=3))
    for number in range(5):
        run(registry, f"c{number}", f"s{number}")
    assert list(registry.calls) == ["c2", "c3", "c4"]

    registry = Registry(Limits(sessions=3))
    for number in range(5):
        run(registry, f"c{number}", "s", app=f"a{number}")
    assert list(registry.apps) == ["a2", "a3", "a4"]
    assert list(registry.sessions) == ["s"], "it was used last"


def test_a_session_keeps_as_many_calls_as_is_allowed_and_those_that_live() -> None:
    registry = Registry(Limits(calls_per_session=2))
    run(registry, "live", "s", is_over=False)
    for number in range(3):
        run(registry, f"c{number}", "s")

    assert list(registry.calls) == ["live", "c2"]
    assert list(registry.sessions["s"].calls) == ["live", "c2"]


@pytest.mark.parametrize(("idle_s", "is_kept"), [(99.9, True), (100.0, True), (100.1, False)])
def test_what_was_not_used_for_longer_than_is_allowed_is_forgotten(idle_s: float, is_kept: bool) -> None:
    registry = Registry(Limits(idle_s=100.0))
    run(registry, "c", "s", app="a")
    run(registry, "d", "t", 100.0 + idle_s, app="b")

    assert ("s" in registry.sessions, "a" in registry.apps, "c" in registry.calls) == (is_kept,) * 3
    assert registry.counts["forgotten", "session"] == registry.counts["forgotten", "app"] == (not is_kept)


def test_a_session_with_a_live_call_outlives_any_age() -> None:
    registry = Registry(Limits(idle_s=100.0))
    run(registry, "live", "live", is_over=False)
    run(registry, "old", "old")
    run(registry, "c", "s", 1_000.0)

    assert set(registry.sessions) == {"s", "live"}


def test_a_bounded_number_of_old_records_is_forgotten_with_each_call() -> None:
    registry = Registry(Limits(idle_s=100.0))
    for number in range(20):
        run(registry, f"c{number}", f"s{number}", app=f"a{number}")
    run(registry, "d", "t", 1_000.0, is_over=False)
    assert (len(registry.sessions), len(registry.apps)) == (13, 12)


# --- memory -----------------------------------------------------------------------------------------


def test_records_are_estimated_by_their_parts_and_texts() -> None:
    size = sys.getsizeof("abc")
    assert text_bytes("abc", None, "", "xyz") == 2 * size
    assert call_bytes(Hint(session="abc")) == 1_300 + size
    assert call_bytes(Hint(session="abc", agent="def", expects_tools={"xyz": 1.0, "uvw": None})) == (
        1_300 + 4 * size + 2 * 70
    )
    assert tool_bytes("abc", "def", None) == 250 + 2 * size
    assert tool_bytes("abc", None, (protocol.Stage("xyz"), protocol.Stage("uvw"))) == 250 + 3 * size + 2 * 150
    assert waits_bytes(["abc", "xyz"]) == 2 * (400 + size)
    assert waits_bytes([]) == 0

    def graph(nodes: dict[str, Any], edges: tuple[tuple[str, str], ...] = ()) -> int:
        return graph_bytes(protocol.Graph("abc", nodes, edges))

    empty = graph({})
    assert empty == 500 + 5 * 70 + size + 70, "an item for each part; what is absent is one too"
    assert graph({"xyz": {}}) == empty + 70 + size
    assert graph({"xyz": {"uvw": 1.0}}) == empty + 2 * (70 + size) + 70
    assert graph({}, (("abc", "xyz"),)) == empty + 70 + 2 * (70 + size)


def test_what_a_call_its_tools_and_waits_take_is_added_and_given_back() -> None:
    registry = Registry(Limits(idle_s=100.0))
    sizes = [kept_bytes(registry)]

    def grown() -> int:
        sizes.append(kept_bytes(registry))
        return sizes[-1] - sizes[-2]

    hint = Hint(session="s", call="c", app="a")
    registry.add_call("r", hint, 10, 100.0)
    assert grown() == 1_000 + text_bytes("s") + 700 + text_bytes("a") + call_bytes(hint)
    registry.apply(protocol.ToolStart("c", "t", "x", stages=(protocol.Stage("y"),)), 101.0)
    assert grown() == tool_bytes("t", "x", (protocol.Stage("y"),))
    registry.apply(protocol.ToolProgress("c", "t", "a stage"), 101.0)
    assert grown() == text_bytes("a stage")
    registry.apply(protocol.ToolProgress("c", "t", "z"), 101.0)
    assert grown() == text_bytes("z") - text_bytes("a stage")
    registry.apply(protocol.StallEnd("s", "human"), 101.0)
    assert grown() == waits_bytes(["human"])
    registry.apply(protocol.Graph("g", {}, ()), 101.0)
    assert grown() == graph_bytes(protocol.Graph("g", {}, ()))
    registry.finish_call("r", 1, is_aborted=False, now=101.0)
    registry.add_call("again", hint, 10, 102.0)
    assert grown() == 0, "it is repeated, with its tools"


def test_accounts_add_up_and_the_largest_is_that_of_the_tenant_with_most() -> None:
    accounts = Accounts()
    assert accounts.largest is None
    accounts.add("t", "session", "a", 10)
    accounts.add("t", "session", "b", 10)
    accounts.add("u", "session", "a", 15)
    accounts.add("u", "graph", "g", 2)
    assert (accounts.of("t").total_bytes, accounts.of("u").total_bytes, accounts.total_bytes) == (20, 17, 37)
    assert accounts.largest is accounts.of("t")
    accounts.add("u", "session", "a", 5)
    assert accounts.largest is accounts.of("u")

    assert accounts.of("u").oldest == ("session", "a"), "more of a record makes it no younger"
    accounts.of("u").touch("session", "a")
    accounts.of("u").touch("session", "unknown")
    assert accounts.of("u").oldest == ("graph", "g")
    assert accounts.records_of("u") == [("graph", "g"), ("session", "a")]
    accounts.remove("u", "session", "a")
    assert (accounts.of("u").total_bytes, accounts.total_bytes) == (2, 22)
    accounts.remove("u", "graph", "g")
    assert (accounts.records_of("u"), accounts.total_bytes, accounts.largest) == ([], 20, accounts.of("t"))
    assert accounts.of("new").oldest is None


def test_a_tenant_is_over_its_share_only_beyond_it_and_only_beside_others() -> None:
    for has_tenants, sessions in ((True, 1), (False, 3)):
        registry = Registry(Limits(kept_mib=1.0, tenant_share=0.01), has_tenants=has_tenants)
        for number in range(3):
            run(registry, f"c{number}", f"s{number}".ljust(5_000))
        assert len(registry.sessions) == sessions


@pytest.mark.parametrize(("surplus", "sessions"), [(0, 2), (1, 1)])
def test_memory_is_used_to_the_last_byte(surplus: int, sessions: int) -> None:
    registry = Registry(Limits(kept_mib=1.0))
    run(registry, "c", "s")
    registry._accounts.add("", "session", "s", MIB - registry._accounts.total_bytes * 2 + surplus)
    run(registry, "d", "t")

    assert len(registry.sessions) == sessions


def test_of_a_session_in_use_the_oldest_call_that_is_over_goes() -> None:
    registry = Registry(Limits(calls=2))
    run(registry, "over", "s")
    run(registry, "live", "s", is_over=False)
    run(registry, "more", "s", is_over=False)

    assert set(registry.calls) == {"live", "more"}
    assert registry.counts["forgotten", "call"] == 1
    assert registry.counts["forgotten", "session"] == 0


def test_graphs_beyond_the_memory_are_forgotten_and_counted() -> None:
    registry = Registry(Limits(kept_mib=1.0))
    for name in ("g", "h"):
        registry.apply(protocol.Graph(name, {}, ()), 100.0)
    registry._accounts.add("", "graph", "h", MIB - registry._accounts.total_bytes + 1)
    run(registry, "c", "s")

    assert (list(registry.graphs), registry.counts["forgotten", "graph"]) == ([], 2)


def test_a_forgotten_session_is_no_longer_its_applications() -> None:
    registry = Registry(Limits(sessions=1))
    run(registry, "c", "a/one", app="a")
    run(registry, "d", "a/two", app="a")

    assert registry.apps["a"].own_sessions == {"a/two"}
    assert registry.ended_by(protocol.AppEnd("a")) == [registry.sessions["a/two"]]


# --- timeline ---------------------------------------------------------------------------------------


def records(count: int) -> Iterator[tuple[float, int]]:
    return ((float(number), number) for number in range(count, 0, -1))


def test_a_record_comes_a_tick_behind_the_last_or_when_it_comes() -> None:
    assert after(5.0, 4.0) == 5.0
    assert after(5.0, 5.0) == 5.0 + TICK_S
    assert after(5.0, 9.0) == 9.0 + TICK_S


@pytest.mark.parametrize(("limit", "next_s"), [(4, 2.0), (5, None), (6, None)])
def test_a_page_that_has_all_is_the_last(limit: int, next_s: float | None) -> None:
    assert page_of(records(5), limit).next_s == next_s


def test_a_page_of_nothing_is_the_last_and_one_of_no_record_is_not() -> None:
    assert (page_of(records(0), 3).entries, page_of(records(0), 3).next_s) == ([], None)
    assert page_of(records(3), 0).entries == []


@pytest.mark.parametrize(("count", "is_last"), [(MAX_VISITED, True), (MAX_VISITED + 1, False)])
def test_a_page_looks_at_as_many_records_as_is_allowed(count: int, is_last: bool) -> None:
    page = page_of(records(count), 10, is_wanted=lambda _: False)

    assert (page.next_s is None, page.entries) == (is_last, [])


def test_records_weigh_one_each_where_nothing_is_said() -> None:
    assert len(page_of(records(MAX_WEIGHT - 1), MAX_WEIGHT).entries) == MAX_WEIGHT - 1


def test_records_weigh_up_to_the_weight_of_a_page() -> None:
    def found(*weights: int) -> int:
        items = dict(enumerate(weights))
        return len(page_of(((float(-n), n) for n in items), 10, weight=items.__getitem__).entries)

    assert found(1, MAX_WEIGHT - 1) == 2
    assert found(2, MAX_WEIGHT - 1) == 1
    assert found(1, 1, MAX_WEIGHT - 2) == 3
    assert found(1, 1, MAX_WEIGHT - 1) == 2
    assert found(MAX_WEIGHT, 1) == 1
    assert found(3 * MAX_WEIGHT, 1) == 1


def test_gaps_are_closed_when_they_are_more_than_half() -> None:
    timeline: Timeline[int] = Timeline()
    for number in range(1, 5):
        timeline.add(float(number), number)
    for number in (2, 3):
        timeline.remove(float(number))
    assert list(timeline.newest_first()) == [(4.0, 4), (3.0, None), (2.0, None), (1.0, 1)]
    timeline.remove(1.0)
    assert list(timeline.newest_first()) == [(4.0, 4)]
    timeline.add(5.0, 5)
    timeline.remove(5.0)
    assert list(timeline.newest_first()) == [(5.0, None), (4.0, 4)]


def test_a_page_begins_before_its_time_and_rounding_does_not_matter() -> None:
    timeline: Timeline[int] = Timeline()
    for number in range(1, 4):
        timeline.add(float(number), number)

    for error_s in (-TICK_S / 8, 0.0, TICK_S / 8):
        assert [item for _, item in timeline.newest_first(3.0 + error_s)] == [2, 1]
    assert [item for _, item in timeline.newest_first(3.0 + TICK_S)] == [3, 2, 1]
