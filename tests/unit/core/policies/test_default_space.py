"""Refusals of the default policy, each at its bound."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tokencake.policies.default_space import DefaultSpacePolicy
from tokencake.space_scheduler.applications import AppTracker, LiveRequest
from tokencake.space_scheduler.growth import GrowthReservation
from tokencake.space_scheduler.policy import AdmissionState
from tokencake.space_scheduler.settings import SpaceSettings

MakeCall = Callable[..., LiveRequest]
BUSY = (GrowthReservation(32, 0, 52),)
"""Gives 52 blocks back after 32 tokens."""


def policy_for(applications: AppTracker, total_blocks: int = 100, **settings: float) -> DefaultSpacePolicy:
    policy = DefaultSpacePolicy(SpaceSettings(**settings))
    policy.begin(applications, AdmissionState(total_blocks, 50), now=0.0)
    return policy


def test_what_is_promised_to_prompts_is_not_free(applications: AppTracker, call: MakeCall) -> None:
    policy, one = policy_for(applications), call("a")
    state = AdmissionState(100, 30, reservations=(GrowthReservation(16, 3, 0), GrowthReservation(16, 2, 0)))

    assert policy.refusal(one, 25, state) is None
    assert policy.refusal(one, 26, state) == "full"


def test_who_passes_nobody_may_grow_beyond_what_is_free(applications: AppTracker, call: MakeCall) -> None:
    policy, one = policy_for(applications), call("a", max_tokens=160)
    state = AdmissionState(100, 30, bypassed=(75,), reservations=(GrowthReservation(200, 0, 60),))

    assert policy.refusal(one, 30, AdmissionState(100, 30)) is None
    assert policy.refusal(one, 10, state) is None, "10 now, and 10 for each of the two until it ends"
    assert policy.refusal(one, 11, state) == "promised"


@pytest.mark.parametrize(("free", "refusal"), [(13, None), (12, "promised")])
def test_what_a_call_will_give_back_at_its_end_is_not_counted_on(
    applications: AppTracker, call: MakeCall, free: int, refusal: str | None
) -> None:
    one = call("a", max_tokens=16)
    state = AdmissionState(100, free, bypassed=(70,), reservations=(GrowthReservation(200, 0, 60),))

    # The other one grows by 13 blocks after this one has ended.
    assert policy_for(applications).refusal(one, 2, state) == refusal


def test_only_the_first_of_those_passed_are_guarded(applications: AppTracker, call: MakeCall) -> None:
    one = call("a", max_tokens=320)
    state = AdmissionState(100, 45, bypassed=(20, 97 - 20), reservations=BUSY)

    assert policy_for(applications, guarded=1).refusal(one, 10, state) is None
    assert policy_for(applications, guarded=2).refusal(one, 10, state) == "delays"


def test_a_call_without_a_hint_passes_none_that_came_without_one(applications: AppTracker, call: MakeCall) -> None:
    policy, plain, hinted = policy_for(applications), call(None, max_tokens=1), call("a", max_tokens=1)
    state = AdmissionState(100, 45, bypassed=(95,), reservations=BUSY, has_bypassed_unhinted=True)

    assert policy.refusal(plain, 1, state) == "order"
    assert policy.refusal(hinted, 1, state) is None
    assert policy.refusal(plain, 1, AdmissionState(100, 45, bypassed=(95,), reservations=BUSY)) is None


@pytest.mark.parametrize(("need", "refusal"), [(9, None), (10, "begun")])
def test_an_application_begins_past_others_where_it_will_be_short(
    applications: AppTracker, call: MakeCall, need: int, refusal: str | None
) -> None:
    policy, one = policy_for(applications, short_s=0.2), call("a", max_tokens=100)
    state = AdmissionState(100, 45, bypassed=(95,), reservations=(GrowthReservation(320, 0, 52),))

    # 100 tokens of 20 ms are 2 s: with a tenth of the device, 0.2 device-seconds.
    assert policy.refusal(one, need, state) == refusal
    one.app.served_s = 0.1
    assert policy.refusal(one, need, state) is None, "it has begun"


def test_the_share_of_a_call_is_that_of_the_whole_device(applications: AppTracker, call: MakeCall) -> None:
    one = call("a", max_tokens=500)

    def level(total_blocks: int) -> float:
        policy = policy_for(applications, total_blocks, short_s=1.0, head_start_s=100.0)
        return policy.rank(one, need_blocks=10, shares_prefix=False)[1] - one.app.first_seen_s

    assert (level(100), level(101)) == (100.0, 0.0)


def test_a_rank_is_tenant_seniority_way_and_arrival(applications: AppTracker, call: MakeCall) -> None:
    one, other = call("t::a", now=5.0, remaining=2, max_tokens=1), call("u::b", now=6.0, max_tokens=1)
    other.app.tenant.served_s = 9.0
    policy = policy_for(applications, tenant_quantum_s=4.0, sibling_s=2.0)

    assert policy.rank(one, need_blocks=1, shares_prefix=False) == (0, 5.0, -10.0, 1)
    assert policy.rank(other, need_blocks=1, shares_prefix=True) == (2, 4.0, 0.0, 2)
    assert policy.reserve() == {"size": 0, "used": 0}


def test_the_tenant_of_a_call_that_came_since_is_ahead_of_nobody(applications: AppTracker, call: MakeCall) -> None:
    policy = policy_for(applications)

    assert policy.rank(call("new::a"), need_blocks=1, shares_prefix=False)[0] == 0


def test_the_whole_device_is_what_calls_without_a_hint_are_measured_by(
    applications: AppTracker, call: MakeCall
) -> None:
    plain = call(None, prompt_tokens=160, max_tokens=100)
    plain.app.tenant.token_s = 1.0

    def level(short_s: float) -> float:
        return policy_for(applications, short_s=short_s, head_start_s=7.0).rank(
            plain, need_blocks=1, shares_prefix=False
        )[1]

    # 160 of 100 x 16 tokens for 100 s.
    assert (level(10.0), level(9.99)) == (0.0, 7.0)
