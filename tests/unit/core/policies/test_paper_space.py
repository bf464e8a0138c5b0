"""The published policy: Algorithm 2, its constants, the scores."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokencake.policies.paper_partition import MAX_RATIO, MIN_RATIO, Pools, next_ratio, reserves
from tokencake.policies.paper_scores import request_score
from tokencake.policies.paper_space import PaperSpacePolicy, agent_type_of
from tokencake.policies.registry import ADMISSION
from tokencake.space_scheduler.policy import AdmissionState
from tokencake.space_scheduler.settings import SpaceSettings


@pytest.mark.parametrize(
    ("ratio", "usage", "expected"),
    [(0.05, 0.80, 0.10), (0.10, 0.75, 0.15), (0.10, 0.60, 0.10), (0.10, 0.40, 0.05), (0.05, 0.1, 0.05), (0.3, 1, 0.3)],
)
def test_the_reserve_follows_the_pressure_between_its_bounds(ratio, usage, expected):
    assert next_ratio(ratio, usage) == pytest.approx(expected)


def test_three_quarters_of_the_types_are_critical_and_divide_the_reserve():
    scores = {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}

    assert reserves(scores, {}, 90) == {"a": 40, "b": 30, "c": 20}


def test_a_type_that_holds_much_keeps_more():
    assert reserves({"a": 1.0, "b": 1.0, "c": 0.5}, {"a": 80, "b": 20}, 100) == {"a": 57, "b": 43}


def test_a_single_type_is_critical():
    assert reserves({"only": 1.0}, {}, 7) == {"only": 7}


@given(st.dictionaries(st.text(max_size=3), st.floats(1, 100), min_size=1, max_size=9), st.integers(0, 500))
def test_the_reserve_is_divided_without_rest(scores, total):
    assert sum(reserves(scores, {}, total).values()) == total


@given(st.lists(st.floats(0, 1), max_size=50))
def test_the_ratio_stays_in_its_bounds(usages):
    ratio = 0.05
    for usage in usages:
        ratio = next_ratio(ratio, usage)
        assert MIN_RATIO <= ratio <= MAX_RATIO


def test_shared_memory_is_taken_first_then_the_own_reserve_then_idle_ones():
    pools = Pools({"critical": 20, "other": 10}, {"critical": 5}, total_blocks=100, free_blocks=40)

    assert pools.shared_free_blocks == 15
    assert pools.can_take("critical", 15 + 15, frozenset({"other"}))
    assert not pools.can_take("critical", 31, frozenset({"other"}))
    assert pools.can_take("critical", 40, frozenset())


def test_the_rest_borrows_only_while_no_critical_type_waits():
    pools = Pools({"critical": 20}, {}, total_blocks=100, free_blocks=30)

    assert pools.can_take("minor", 30, frozenset())
    assert not pools.can_take("minor", 11, frozenset({"critical"}))
    assert pools.can_take("minor", 10, frozenset({"critical"}))


def test_calls_without_a_hint_never_take_a_reserve():
    pools = Pools({"critical": 20}, {}, total_blocks=100, free_blocks=30)

    assert pools.can_take("", 10, frozenset())
    assert not pools.can_take("", 11, frozenset())


def test_the_score_adds_up_as_published(call):
    one = call("a", now=0.0, depth=2, out_degree=1, remaining=2, max_depth=4, fan_out=2, join="j", critical=True)

    structure = 100 * 2 + 15 * 2 + 45 + 10 + 20 * 0.5 + 20 * 2 + 4 * 2
    synchronisation = 120 * 1 + 180 + 20 + 12
    ageing = 5 * 10 * (1 + 0.75 * 0.5) + 8 * 10 * (1 + 0.5 * 0.5) + 5 * 10 * 0.5
    assert request_score(one, 0.0, 10.0) == pytest.approx(structure + synchronisation + ageing)


def test_the_higher_score_goes_first_but_not_past_a_call_without_a_hint(applications, call):
    low, plain, high, higher = call("a", depth=1), call(None), call("b", depth=5), call("c", depth=9)
    policy = PaperSpacePolicy(SpaceSettings())
    policy.begin(applications, AdmissionState(100, 100), now=1.0)

    line = sorted((low, plain, high, higher), key=lambda c: policy.rank(c, need_blocks=1, shares_prefix=False))

    assert line == [low, plain, higher, high]


def test_the_partition_is_set_at_first_use_and_every_500_steps(applications, call):
    call("a", agent="writer")
    policy = PaperSpacePolicy(SpaceSettings())

    policy.begin(applications, AdmissionState(1_000, 100, step=1), now=0.0)
    assert policy.reserved == {"writer": 50}
    policy.begin(applications, AdmissionState(1_000, 100, step=400), now=0.0)
    assert policy.reserved == {"writer": 50}
    policy.begin(applications, AdmissionState(1_000, 100, step=501), now=0.0)
    assert policy.reserved == {"writer": 100}


def test_a_minor_call_is_refused_what_is_reserved(applications, call):
    for depth, agent in ((9, "chief"), (9, "judge"), (9, "critic"), (0, "clerk")):
        call("a", agent=agent, depth=depth)
    policy = ADMISSION["paper"](SpaceSettings())
    policy.begin(applications, AdmissionState(1_000, 60, step=1), now=0.0)
    clerk = next(c for c in applications.calls.values() if agent_type_of(c) == "clerk")
    chief = next(c for c in applications.calls.values() if agent_type_of(c) == "chief")

    assert policy.refusal(clerk, 20, AdmissionState(1_000, 60)) == "reserved"
    assert policy.refusal(chief, 20, AdmissionState(1_000, 60)) is None
    assert policy.refusal(clerk, 10, AdmissionState(1_000, 60, taken=((chief, 5),))) is None
