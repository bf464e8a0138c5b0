"""Which stalled chain a call extends, which blocks are wanted, and what goes beyond the bound."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokencake.protocol import Hint
from tokencake.time_scheduler.prefixes import Chains


def blocks(name: str, count: int) -> list[bytes]:
    return [f"{name}{place}".encode() for place in range(count)]


def hint(session: str = "s", **fields: object) -> Hint:
    return Hint(session=session, agent="a", **fields)


def stalled(chains: Chains, name: str, keys: list[bytes], given: Hint | None) -> None:
    chains.arrive(name, keys[:1], given, 0.0)
    chains.stall(name, keys, 1.0)


@pytest.mark.parametrize(("shared", "is_kin"), [(3, False), (4, True), (5, True), (8, True)])
def test_a_call_that_shares_half_of_a_stalled_chain_of_its_session_extends_it(shared: int, is_kin: bool) -> None:
    chains = Chains()
    stalled(chains, "one", blocks("k", 8), hint())
    keys = [*blocks("k", shared), *blocks("other", 4)]

    assert (chains.arrive("two", keys, hint(), 2.0) is not None) == is_kin
    assert ("one" in chains.by_id) != is_kin


def test_of_several_chains_of_its_session_a_call_extends_the_one_it_shares_most_of() -> None:
    chains = Chains()
    stalled(chains, "half", [*blocks("k", 4), *blocks("x", 4)], hint())
    stalled(chains, "most", [*blocks("k", 6), *blocks("y", 2)], hint("s2"))
    stalled(chains, "more", [*blocks("k", 6), *blocks("z", 2)], hint())
    stalled(chains, "least", [*blocks("k", 5), *blocks("w", 3)], hint())

    parent = chains.arrive("two", [*blocks("k", 7), *blocks("new", 2)], hint(), 2.0)
    assert parent is not None
    assert parent.id == "more"


def test_a_call_that_runs_is_nobodys_to_extend() -> None:
    chains = Chains()
    chains.arrive("one", blocks("k", 4), hint(), 0.0)

    assert chains.arrive("two", blocks("k", 6), hint(), 1.0) is None
    assert list(chains.by_id) == ["one", "two"]


def test_the_longest_chain_that_a_prompt_begins_with_is_extended() -> None:
    chains = Chains()
    stalled(chains, "short", blocks("k", 2), hint("x"))
    stalled(chains, "long", blocks("k", 4), hint("y"))

    parent = chains.arrive("three", blocks("k", 6), hint("z"), 2.0)
    assert parent is not None
    assert parent.id == "long"
    parent = chains.arrive("four", blocks("k", 3), None, 2.0)
    assert parent is not None
    assert parent.id == "short"


@pytest.mark.parametrize("fan_out", [None, 1, 2, 3])
def test_a_chain_is_wanted_until_as_many_calls_have_come_as_the_first_of_them_says(fan_out: int | None) -> None:
    chains = Chains()
    stalled(chains, "one", blocks("k", 4), hint())
    for number in range((fan_out or 1) - 1):
        chains.arrive(f"branch{number}", blocks("k", 5), hint(f"b{number}", fan_out=fan_out), 2.0)
        assert "one" in chains.by_id
    parent = chains.arrive("last", blocks("k", 5), hint("l", fan_out=fan_out), 2.0)

    assert parent is not None
    assert parent.heirs_left == 0
    assert "one" not in chains.by_id


def test_a_call_that_left_nothing_leaves_no_chain() -> None:
    chains = Chains()
    chains.arrive("one", blocks("k", 2), hint(), 0.0)

    assert chains.stall("one", [], 1.0) is None
    assert chains.stall("unknown", blocks("k", 2), 1.0) is None
    assert (chains.wanted, list(chains)) == ({}, [])


def test_a_call_that_lost_its_blocks_wants_each_of_them_once() -> None:
    chains = Chains()
    chains.arrive("one", blocks("k", 2), hint(), 0.0)
    chains.arrive("two", blocks("k", 4), hint(), 0.0)
    chains.give_way(chains.by_id["one"], blocks("k", 4))

    assert chains.wanted == dict.fromkeys(blocks("k", 4), 2)
    chains.give_way(chains.by_id["one"], blocks("k", 4))
    assert chains.wanted == dict.fromkeys(blocks("k", 4), 2)


def test_sub_agents_are_found_by_the_call_inside_which_they_work() -> None:
    chains = Chains()
    stalled(chains, "chief", blocks("c", 2), hint(call="the call"))
    stalled(chains, "plain", blocks("p", 2), None)
    for number, parent in enumerate(("the call", "plain", "the call")):
        stalled(chains, f"w{number}", blocks(f"w{number}", 2), hint(f"w{number}", parent_call=parent))

    assert {chain.id for chain in chains.hired_by(chains.by_id["chief"])} == {"w0", "w2"}
    assert [chain.id for chain in chains.hired_by(chains.by_id["plain"])] == ["w1"]
    chains.remove("w0")
    assert [chain.id for chain in chains.hired_by(chains.by_id["chief"])] == ["w2"]


def test_siblings_feed_the_same_join_of_the_same_application_in_other_sessions() -> None:
    chains = Chains()
    for name, fields in {
        "one": {"app": "x", "join": "j"},
        "two": {"app": "x", "join": "j"},
        "elsewhere": {"app": "y", "join": "j"},
        "other join": {"app": "x", "join": "k"},
        "no join": {"app": "x"},
        "no app": {"join": "j"},
    }.items():
        stalled(chains, name, blocks(name, 2), hint(name, **fields))
    stalled(chains, "same session", blocks("same", 2), hint("one", app="x", join="j"))
    stalled(chains, "plain", blocks("plain", 2), None)

    def siblings(name: str) -> set[str]:
        return {chain.id for chain in chains.siblings_of(chains.by_id[name])}

    assert siblings("one") == {"two"}
    assert siblings("two") == {"one", "same session"}
    assert siblings("no join") == siblings("no app") == siblings("plain") == siblings("elsewhere") == set()


@pytest.mark.parametrize("surplus", [-1, 0, 1, 2])
def test_beyond_the_bound_the_oldest_stalled_chains_go(monkeypatch: pytest.MonkeyPatch, surplus: int) -> None:
    monkeypatch.setattr("tokencake.time_scheduler.prefixes.MAX_CHAINS", 4)
    chains = Chains()
    chains.arrive("waits", blocks("w", 1), hint(), 0.0)
    for number in range(3 + surplus):
        stalled(chains, f"c{number}", blocks(f"c{number}", 1), hint(f"s{number}"))

    assert [chain.id for chain in chains.overflow()] == [f"c{number}" for number in range(max(0, surplus))]


def test_beyond_the_bound_the_tenant_with_most_stalled_chains_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokencake.time_scheduler.prefixes.MAX_CHAINS", 2)
    chains = Chains()
    for name, tenant in (("a1", "a::"), ("b1", "b::"), ("b2", "b::"), ("b3", "b::")):
        stalled(chains, name, blocks(name, 1), hint(name, tenant=tenant))
    assert [chain.id for chain in chains.overflow()] == ["b1", "b2"]

    for name in ("x", "y", "z"):
        chains.arrive(name, blocks(name, 1), hint(name), 0.0)
    assert len(list(chains.overflow())) == 4, "no more than are stalled"


NAMES = st.sampled_from("abcd")
STEPS = st.lists(
    st.tuples(st.sampled_from(["arrive", "stall", "remove", "give way"]), NAMES, NAMES, st.integers(0, 5)), max_size=40
)


@given(STEPS)
def test_every_block_is_wanted_by_as_many_chains_as_hold_it(trace: list[tuple[str, str, str, int]]) -> None:
    chains = Chains()
    for step, name, text, count in trace:
        keys = blocks(text, count)
        match step:
            case "arrive":
                given = hint(f"s{text}", parent_call=name if count % 2 else None) if count else None
                chains.arrive(name, keys, given, 0.0)
            case "stall":
                chains.stall(name, keys, 1.0)
            case "remove":
                removed = chains.remove(name)
                if removed is not None:
                    assert chains.dead(removed) == [key for key in removed.keys[::-1] if key not in chains.wanted]
            case "give way" if name in chains.by_id and chains.by_id[name].phase != "stalled":
                chains.give_way(chains.by_id[name], [*chains.by_id[name].keys, *keys])
        assert chains.wanted == dict(Counter(key for chain in chains for key in chain.keys))
        for chain in chains:
            if chain.hint is not None:
                assert chain in chains.of_session(chain.hint.session)
    for name in "abcd":
        chains.remove(name)
    assert (chains._stalled_at, chains._by_session, chains._hired, chains.wanted) == ({}, {}, {}, {})
