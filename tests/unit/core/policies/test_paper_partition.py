"""The published partition: what is reserved, what is shared, what may be borrowed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokencake.policies.paper_partition import Pools, reserves
from tokencake.policies.paper_space import PaperSpacePolicy, agent_type_of
from tokencake.protocol import Hint
from tokencake.space_scheduler.applications import AppTracker, LiveRequest
from tokencake.space_scheduler.policy import AdmissionState
from tokencake.space_scheduler.settings import SpaceSettings

NOBODY: frozenset[str] = frozenset()


@pytest.mark.parametrize(("types", "critical"), [(1, 1), (2, 1), (3, 2), (4, 3), (7, 5), (8, 6)])
def test_three_quarters_of_the_types_rounded_down_are_critical_but_at_least_one(types: int, critical: int) -> None:
    scores = {f"t{number}": 10.0 - number for number in range(types)}

    assert list(reserves(scores, {}, 100)) == [f"t{number}" for number in range(critical)]


def test_of_types_with_one_score_the_first_by_name_are_critical() -> None:
    assert set(reserves({"b": 1.0, "a": 1.0, "c": 1.0}, {}, 10)) == {"a", "b"}


def test_a_type_divides_by_its_score_or_by_the_mean_with_what_it_holds_whichever_is_more() -> None:
    # By score 1/4 and 3/4; by memory all and nothing: (1 + 1/4) / 2 = 5/8 and 3/4.
    assert reserves({"a": 1.0, "b": 3.0, "c": 0.5}, {"a": 50}, 110) == {"b": 60, "a": 50}


def test_what_others_hold_counts_as_held_memory_too() -> None:
    # By memory a quarter for "a": (1/4 + 1/2) / 2 is less than 1/2, so the scores decide.
    assert reserves({"a": 1.0, "b": 1.0, "c": 0.5}, {"a": 25, "c": 75}, 100) == {"a": 50, "b": 50}


def test_what_is_left_by_rounding_goes_to_the_largest_remainders() -> None:
    # 10/3 each: one is left, for the first by name. 1.25, 2.5 and 6.25 of 10: one is left, for the half.
    assert reserves({"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.5}, {}, 10) == {"a": 4, "b": 3, "c": 3}
    assert reserves({"a": 5.0, "b": 2.0, "c": 1.0, "d": 0.5}, {}, 10) == {"a": 6, "b": 3, "c": 1}


def test_without_types_or_scores_nothing_breaks() -> None:
    assert reserves({}, {}, 10) == {}
    assert reserves({"a": 0.0, "b": 0.0, "c": 0.0}, {}, 10) == {"a": 5, "b": 5}


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 100), min_size=1),
    st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 50)),
    st.integers(0, 500),
)
def test_the_whole_reserve_is_divided_and_nobody_gets_less_than_nothing(
    scores: dict[str, float], held: dict[str, int], total: int
) -> None:
    found = reserves(scores, held, total)

    assert sum(found.values()) == total
    assert all(blocks >= 0 for blocks in found.values())


def test_an_idle_reserve_is_what_is_not_held_of_it() -> None:
    pools = Pools({"a": 20, "b": 10}, {"a": 5, "b": 15, "c": 7}, total_blocks=100, free_blocks=40)

    assert [pools.idle_reserve(agent_type) for agent_type in "abc"] == [15, 0, 0]
    assert Pools({"a": 20}, {}, 100, 40).idle_reserve("a") == 20
    assert Pools({}, {"a": 3}, 100, 40).idle_reserve("a") == 0


def test_what_is_shared_is_free_and_nobodys_reserve() -> None:
    assert Pools({"a": 20, "b": 10}, {"a": 5, "b": 15}, 100, 40).shared_free_blocks == 25
    assert Pools({"a": 20}, {}, 100, 5).shared_free_blocks == 0, "a reserve may be larger than what is free"
    assert Pools({}, {}, 100, 5).shared_free_blocks == 5


def test_a_critical_type_takes_its_own_reserve_to_the_block_and_borrows_of_those_that_do_not_wait() -> None:
    pools = Pools({"a": 20, "b": 10, "c": 6}, {"a": 5}, total_blocks=100, free_blocks=40)
    # 9 are shared; a's own reserve has 15 left.
    assert pools.can_take("a", 24, frozenset("bc"))
    assert not pools.can_take("a", 25, frozenset("bc"))
    assert pools.can_take("a", 34, frozenset("c"))
    assert not pools.can_take("a", 35, frozenset("c"))
    assert pools.can_take("a", 40, NOBODY)
    assert not pools.can_take("a", 41, NOBODY)
    assert not pools.can_take("a", 41, frozenset("a")), "it does not lend to itself"


def test_a_minor_type_borrows_to_the_block_where_no_critical_one_waits() -> None:
    pools = Pools({"a": 20}, {}, total_blocks=100, free_blocks=30)

    assert pools.can_take("minor", 30, frozenset({"other"}))
    assert not pools.can_take("minor", 31, frozenset({"other"}))
    assert pools.can_take("", 10, frozenset({"a"}))


def test_the_reserve_is_refreshed_every_500_steps_from_the_first_and_not_before(
    applications: AppTracker, call: Callable[..., LiveRequest]
) -> None:
    call("a", agent="writer")
    policy = PaperSpacePolicy(SpaceSettings())
    found = []
    for step in (3, 502, 503, 1_002, 1_003):
        policy.begin(applications, AdmissionState(1_000, 100, step=step), now=0.0)
        found.append(policy.reserve()["size"])

    assert found == [50, 50, 100, 100, 150]


def test_the_reserve_shrinks_again_while_the_device_is_empty(
    applications: AppTracker, call: Callable[..., LiveRequest]
) -> None:
    call("a", agent="writer")
    policy = PaperSpacePolicy(SpaceSettings())
    for step, free in ((0, 0), (500, 250), (1_000, 400), (1_500, 599), (2_000, 600), (2_500, 900)):
        policy.begin(applications, AdmissionState(1_000, free, step=step), now=0.0)

    # 75 % held: more; 60 % and 40.1 %: the same; 40 %: less, down to where it began.
    assert policy.ratio == pytest.approx(0.05)
    assert policy.reserved == {"writer": 50}


def test_nothing_is_reserved_until_the_first_call_with_a_hint(
    applications: AppTracker, call: Callable[..., LiveRequest]
) -> None:
    policy = PaperSpacePolicy(SpaceSettings())
    call(None)
    policy.begin(applications, AdmissionState(1_000, 100, step=1), now=0.0)
    assert policy.reserve() == {"size": 0, "used": 0}

    call("a", agent="writer")
    policy.begin(applications, AdmissionState(1_000, 100, step=2), now=0.0)
    assert policy.reserve() == {"size": 50, "used": 0}


def test_what_a_type_holds_of_its_reserve_is_used(applications: AppTracker, call: Callable[..., LiveRequest]) -> None:
    one, two, plain = call("a", agent="writer"), call("a", agent="writer"), call(None)
    policy = PaperSpacePolicy(SpaceSettings())
    held = {one.request_id: 10, two.request_id: 15, plain.request_id: 40}
    policy.begin(applications, AdmissionState(1_000, 100, step=1, exclusive_blocks=held), now=0.0)
    assert policy.reserve() == {"size": 50, "used": 25}

    held[one.request_id] = 100
    policy.begin(applications, AdmissionState(1_000, 100, step=2, exclusive_blocks=held), now=0.0)
    assert policy.reserve() == {"size": 50, "used": 50}


def test_refusals_raise_the_score_of_their_type_at_the_next_refresh(
    applications: AppTracker, call: Callable[..., LiveRequest]
) -> None:
    calls = [call("a", agent=agent) for agent in ("a", "b", "c", "d")]
    policy = PaperSpacePolicy(SpaceSettings())
    policy.begin(applications, AdmissionState(1_000, 0, step=0), now=0.0)
    assert set(policy.reserved) == {"a", "b", "c"}
    for _ in range(3):
        assert policy.refusal(calls[3], 20, AdmissionState(1_000, 30)) == "reserved"
    policy.begin(applications, AdmissionState(1_000, 0, step=500), now=0.0)
    assert set(policy.reserved) == {"a", "b", "d"}

    policy.begin(applications, AdmissionState(1_000, 0, step=1_000), now=0.0)
    assert set(policy.reserved) == {"a", "b", "c"}, "they count once"


def test_a_call_that_does_not_fit_at_all_is_left_to_vllm(
    applications: AppTracker, call: Callable[..., LiveRequest]
) -> None:
    one = call("a", agent="writer", depth=1)
    call("b", agent="other", depth=9)
    policy = PaperSpacePolicy(SpaceSettings())
    policy.begin(applications, AdmissionState(1_000, 60, step=0), now=0.0)

    assert policy.reserved == {"other": 50}
    assert policy.refusal(one, 61, AdmissionState(1_000, 60)) is None
    assert policy.refusal(one, 60, AdmissionState(1_000, 60)) == "reserved"
    assert policy.refusal(one, 10, AdmissionState(1_000, 60)) is None
    assert policy.refusal(one, 11, AdmissionState(1_000, 60)) == "reserved"


def test_running_calls_are_ranked_before_waiting_ones_and_by_score(
    applications: AppTracker, call: Callable[..., LiveRequest]
) -> None:
    low, high, waiting = call("a", depth=1), call("b", depth=5), call("c", depth=9)
    for one in (low, high):
        applications.start(one.request_id, 0.0)
    policy = PaperSpacePolicy(SpaceSettings())
    policy.begin(applications, AdmissionState(100, 100), now=1.0)

    ranked = sorted((low, high, waiting), key=lambda one: policy.rank(one, need_blocks=1, shares_prefix=False))
    assert ranked == [high, low, waiting]


def test_the_offsets_of_applications_count_from_the_first_that_was_seen(
    applications: AppTracker, call: Callable[..., LiveRequest]
) -> None:
    first, second = call("a", now=100.0, importance=0.0), call("b", now=110.0, importance=0.0)
    policy = PaperSpacePolicy(SpaceSettings())
    policy.begin(applications, AdmissionState(100, 100), now=110.0)
    ranks = [policy.rank(one, need_blocks=1, shares_prefix=False)[1] for one in (first, second)]

    assert ranks[0] == pytest.approx(-(20 + (5 + 8) * 10))
    assert ranks[1] == pytest.approx(-(20 + 6 * 10))


@pytest.mark.parametrize(
    ("hint", "agent_type"),
    [
        (None, ""),
        (Hint(session="s", agent="a", node="n"), "a"),
        (Hint(session="s", node="n"), "n"),
        (Hint(session="s"), "s"),
        (Hint(session="t::s", agent="a", tenant="t::"), "t::a"),
    ],
)
def test_a_type_is_the_agent_else_the_node_else_the_session_of_a_tenant(
    applications: AppTracker, hint: Hint | None, agent_type: str
) -> None:
    call = applications.add("r", hint, prompt_tokens=1, max_tokens=1, now=0.0, tenant=hint.tenant if hint else "")

    assert agent_type_of(call) == agent_type
