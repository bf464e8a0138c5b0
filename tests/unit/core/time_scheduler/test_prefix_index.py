"""Which stalled prefix a call extends, which blocks are wanted, and what goes beyond the bound."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokencake.protocol import Hint
from tokencake.time_scheduler.prefixes import PrefixIndex


def blocks(name: str, count: int) -> list[bytes]:
    return [f"{name}{place}".encode() for place in range(count)]


def hint(session: str = "s", **fields: object) -> Hint:
    return Hint(session=session, agent="a", **fields)


def stalled(prefixes: PrefixIndex, name: str, keys: list[bytes], given: Hint | None) -> None:
    prefixes.arrive(name, keys[:1], given, 0.0)
    prefixes.stall(name, keys, 1.0)


@pytest.mark.parametrize(("shared", "is_kin"), [(3, False), (4, True), (5, True), (8, True)])
def test_a_call_that_shares_half_of_a_stalled_prefix_of_its_session_extends_it(shared: int, is_kin: bool) -> None:
    prefixes = PrefixIndex()
    stalled(prefixes, "one", blocks("k", 8), hint())
    keys = [*blocks("k", shared), *blocks("other", 4)]

    assert (prefixes.arrive("two", keys, hint(), 2.0) is not None) == is_kin
    assert ("one" in prefixes.by_id) != is_kin


def test_of_several_prefixes_of_its_session_a_call_extends_the_one_it_shares_most_of() -> None:
    prefixes = PrefixIndex()
    stalled(prefixes, "half", [*blocks("k", 4), *blocks("x", 4)], hint())
    stalled(prefixes, "most", [*blocks("k", 6), *blocks("y", 2)], hint("s2"))
    stalled(prefixes, "more", [*blocks("k", 6), *blocks("z", 2)], hint())
    stalled(prefixes, "least", [*blocks("k", 5), *blocks("w", 3)], hint())

    predecessor = prefixes.arrive("two", [*blocks("k", 7), *blocks("new", 2)], hint(), 2.0)
    assert predecessor is not None
    assert predecessor.id == "more"


def test_a_call_that_runs_is_nobodys_to_extend() -> None:
    prefixes = PrefixIndex()
    prefixes.arrive("one", blocks("k", 4), hint(), 0.0)

    assert prefixes.arrive("two", blocks("k", 6), hint(), 1.0) is None
    assert list(prefixes.by_id) == ["one", "two"]


def test_the_longest_prefix_that_a_prompt_begins_with_is_extended() -> None:
    prefixes = PrefixIndex()
    stalled(prefixes, "short", blocks("k", 2), hint("x"))
    stalled(prefixes, "long", blocks("k", 4), hint("y"))

    predecessor = prefixes.arrive("three", blocks("k", 6), hint("z"), 2.0)
    assert predecessor is not None
    assert predecessor.id == "long"
    predecessor = prefixes.arrive("four", blocks("k", 3), None, 2.0)
    assert predecessor is not None
    assert predecessor.id == "short"


@pytest.mark.parametrize("fan_out", [None, 1, 2, 3])
def test_a_prefix_is_wanted_until_as_many_calls_have_come_as_the_first_of_them_says(fan_out: int | None) -> None:
    prefixes = PrefixIndex()
    stalled(prefixes, "one", blocks("k", 4), hint())
    for number in range((fan_out or 1) - 1):
        prefixes.arrive(f"branch{number}", blocks("k", 5), hint(f"b{number}", fan_out=fan_out), 2.0)
        assert "one" in prefixes.by_id
    predecessor = prefixes.arrive("last", blocks("k", 5), hint("l", fan_out=fan_out), 2.0)

    assert predecessor is not None
    assert predecessor.expected_children == 0
    assert "one" not in prefixes.by_id


def test_a_call_that_left_nothing_leaves_no_prefix() -> None:
    prefixes = PrefixIndex()
    prefixes.arrive("one", blocks("k", 2), hint(), 0.0)

    assert prefixes.stall("one", [], 1.0) is None
    assert prefixes.stall("unknown", blocks("k", 2), 1.0) is None
    assert (prefixes.refcounts, list(prefixes)) == ({}, [])


def test_a_call_that_lost_its_blocks_wants_each_of_them_once() -> None:
    prefixes = PrefixIndex()
    prefixes.arrive("one", blocks("k", 2), hint(), 0.0)
    prefixes.arrive("two", blocks("k", 4), hint(), 0.0)
    prefixes.on_preempt(prefixes.by_id["one"], blocks("k", 4))

    assert prefixes.refcounts == dict.fromkeys(blocks("k", 4), 2)
    prefixes.on_preempt(prefixes.by_id["one"], blocks("k", 4))
    assert prefixes.refcounts == dict.fromkeys(blocks("k", 4), 2)


def test_sub_agents_are_found_by_the_call_inside_which_they_work() -> None:
    prefixes = PrefixIndex()
    stalled(prefixes, "chief", blocks("c", 2), hint(call="the call"))
    stalled(prefixes, "plain", blocks("p", 2), None)
    for number, predecessor in enumerate(("the call", "plain", "the call")):
        stalled(prefixes, f"w{number}", blocks(f"w{number}", 2), hint(f"w{number}", parent_call=predecessor))

    assert {prefix.id for prefix in prefixes.subagents_of(prefixes.by_id["chief"])} == {"w0", "w2"}
    assert [prefix.id for prefix in prefixes.subagents_of(prefixes.by_id["plain"])] == ["w1"]
    prefixes.remove("w0")
    assert [prefix.id for prefix in prefixes.subagents_of(prefixes.by_id["chief"])] == ["w2"]


def test_siblings_feed_the_same_join_of_the_same_application_in_other_sessions() -> None:
    prefixes = PrefixIndex()
    for name, fields in {
        "one": {"app": "x", "join": "j"},
        "two": {"app": "x", "join": "j"},
        "elsewhere": {"app": "y", "join": "j"},
        "other join": {"app": "x", "join": "k"},
        "no join": {"app": "x"},
        "no app": {"join": "j"},
    }.items():
        stalled(prefixes, name, blocks(name, 2), hint(name, **fields))
    stalled(prefixes, "same session", blocks("same", 2), hint("one", app="x", join="j"))
    stalled(prefixes, "plain", blocks("plain", 2), None)

    def siblings(name: str) -> set[str]:
        return {prefix.id for prefix in prefixes.join_peers(prefixes.by_id[name])}

    assert siblings("one") == {"two"}
    assert siblings("two") == {"one", "same session"}
    assert siblings("no join") == siblings("no app") == siblings("plain") == siblings("elsewhere") == set()


@pytest.mark.parametrize("surplus", [-1, 0, 1, 2])
def test_beyond_the_bound_the_oldest_stalled_prefixes_go(monkeypatch: pytest.MonkeyPatch, surplus: int) -> None:
    monkeypatch.setattr("tokencake.time_scheduler.prefixes.MAX_PREFIXES", 4)
    prefixes = PrefixIndex()
    prefixes.arrive("waits", blocks("w", 1), hint(), 0.0)
    for number in range(3 + surplus):
        stalled(prefixes, f"c{number}", blocks(f"c{number}", 1), hint(f"s{number}"))

    assert [prefix.id for prefix in prefixes.overflow()] == [f"c{number}" for number in range(max(0, surplus))]


def test_beyond_the_bound_the_tenant_with_most_stalled_prefixes_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokencake.time_scheduler.prefixes.MAX_PREFIXES", 2)
    prefixes = PrefixIndex()
    for name, tenant in (("a1", "a::"), ("b1", "b::"), ("b2", "b::"), ("b3", "b::")):
        stalled(prefixes, name, blocks(name, 1), hint(name, tenant=tenant))
    assert [prefix.id for prefix in prefixes.overflow()] == ["b1", "b2"]

    for name in ("x", "y", "z"):
        prefixes.arrive(name, blocks(name, 1), hint(name), 0.0)
    assert len(list(prefixes.overflow())) == 4, "no more than are stalled"


NAMES = st.sampled_from("abcd")
STEPS = st.lists(
    st.tuples(st.sampled_from(["arrive", "stall", "remove", "give way"]), NAMES, NAMES, st.integers(0, 5)), max_size=40
)


@given(STEPS)
def test_every_block_is_wanted_by_as_many_prefixes_as_hold_it(trace: list[tuple[str, str, str, int]]) -> None:
    prefixes = PrefixIndex()
    for step, name, text, count in trace:
        keys = blocks(text, count)
        match step:
            case "arrive":
                given = hint(f"s{text}", parent_call=name if count % 2 else None) if count else None
                prefixes.arrive(name, keys, given, 0.0)
            case "stall":
                prefixes.stall(name, keys, 1.0)
            case "remove":
                removed = prefixes.remove(name)
                if removed is not None:
                    assert prefixes.unreferenced(removed) == [
                        key for key in removed.block_hashes[::-1] if key not in prefixes.refcounts
                    ]
            case "give way" if name in prefixes.by_id and prefixes.by_id[name].phase != "stalled":
                prefixes.on_preempt(prefixes.by_id[name], [*prefixes.by_id[name].block_hashes, *keys])
        assert prefixes.refcounts == dict(Counter(key for prefix in prefixes for key in prefix.block_hashes))
        for prefix in prefixes:
            if prefix.hint is not None:
                assert prefix in prefixes.of_session(prefix.hint.session)
    for name in "abcd":
        prefixes.remove(name)
    assert (prefixes._stalled_at, prefixes._by_session, prefixes._subagents, prefixes.refcounts) == ({}, {}, {}, {})
