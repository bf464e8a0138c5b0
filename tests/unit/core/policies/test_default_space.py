"""Refusals of the default policy, each at its bound."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tokencake.policies.default_space import DefaultSpacePolicy
from tokencake.space_scheduler.applications import Applications, LiveCall
from tokencake.space_scheduler.growth import Promise
from tokencake.space_scheduler.policy import Memory
from tokencake.space_scheduler.settings import SpaceSettings

MakeCall = Callable[..., LiveCall]
BUSY = (Promise(32, 0, 52),)
"""Gives 52 blocks back after 32 tokens."""


def policy_for(applications: Applications, total_blocks: int = 100, **settings: float) -> DefaultSpacePolicy:
    policy = DefaultSpacePolicy(SpaceSettings(**settings))
    policy.begin(applications, Memory(total_blocks, 50), now=0.0)
    return policy


def test_what_is_promised_to_prompts_is_not_free(applications: Applications, call: MakeCall) -> None:
    policy, one = policy_for(applications), call("a")
    memory = Memory(100, 30, promises=(Promise(16, 3, 0), Promise(16, 2, 0)))

    assert policy.refusal(one, 25, memory) is None
    assert policy.refusal(one, 26, memory) == "full"


def test_who_passes_nobody_may_grow_beyond_what_is_free(applications: Applications, call: MakeCall) -> None:
    policy, one = policy_for(applications), call("a", max_tokens=160)
    memory = Memory(100, 30, passed=(75,), promises=(Promise(200, 0, 60),))

    assert policy.refusal(one, 30, Memory(100, 30)) is None
    assert policy.refusal(one, 10, memory) is None, "10 now, and 10 for each of the two until it ends"
    assert policy.refusal(one, 11, memory) == "promised"


def test_only_the_first_of_those_passed_are_guarded(applications: Applications, call: MakeCall) -> None:
    one = call("a", max_tokens=320)
    memory = Memory(100, 45, passed=(20, 97 - 20), promises=BUSY)

    assert policy_for(applications, guarded=1).refusal(one, 10, memory) is None
    assert policy_for(applications, guarded=2).refusal(one, 10, memory) == "delays"


def test_a_call_without_a_hint_passes_none_that_came_without_one(applications: Applications, call: MakeCall) -> None:
    policy, plain, hinted = policy_for(applications), call(None, max_tokens=1), call("a", max_tokens=1)
    memory = Memory(100, 45, passed=(95,), promises=BUSY, has_passed_plain=True)

    assert policy.refusal(plain, 1, memory) == "order"
    assert policy.refusal(hinted, 1, memory) is None
    assert policy.refusal(plain, 1, Memory(100, 45, passed=(95,), promises=BUSY)) is None


@pytest.mark.parametrize(("need", "refusal"), [(9, None), (10, "begun")])
def test_an_application_begins_past_others_where_it_will_be_short(
    applications: Applications, call: MakeCall, need: int, refusal: str | None
) -> None:
    policy, one = policy_for(applications, short_s=0.2), call("a", max_tokens=100)
    memory = Memory(100, 45, passed=(95,), promises=(Promise(320, 0, 52),))

    # 100 tokens of 20 ms are 2 s: with a tenth of the device, 0.2 device-seconds.
    assert policy.refusal(one, need, memory) == refusal
    one.app.served_s = 0.1
    assert policy.refusal(one, need, memory) is None, "it has begun"


def test_the_share_of_a_call_is_that_of_the_whole_device(applications: Applications, call: MakeCall) -> None:
    one = call("a", max_tokens=500)

    def level(total_blocks: int) -> float:
        policy = policy_for(applications, total_blocks, short_s=1.0, head_start_s=100.0)
        return policy.rank(one, need_blocks=10, is_sibling=False)[1] - one.app.first_seen_s

    assert (level(100), level(101)) == (100.0, 0.0)


def test_a_rank_is_tenant_seniority_way_and_arrival(applications: Applications, call: MakeCall) -> None:
    one, other = call("t::a", now=5.0, remaining=2, max_tokens=1), call("u::b", now=6.0, max_tokens=1)
    other.app.tenant.served_s = 9.0
    policy = policy_for(applications, tenant_quantum_s=4.0, sibling_s=2.0)

    assert policy.rank(one, need_blocks=1, is_sibling=False) == (0, 5.0, -10.0, 1)
    assert policy.rank(other, need_blocks=1, is_sibling=True) == (2, 4.0, 0.0, 2)
    assert policy.reserve() == {"size": 0, "used": 0}


def test_the_tenant_of_a_call_that_came_since_is_ahead_of_nobody(applications: Applications, call: MakeCall) -> None:
    policy = policy_for(applications)

    assert policy.rank(call("new::a"), need_blocks=1, is_sibling=False)[0] == 0


def test_the_whole_device_is_what_calls_without_a_hint_are_measured_by(
    applications: Applications, call: MakeCall
) -> None:
    plain = call(None, prompt_tokens=160, max_tokens=100)
    plain.app.tenant.token_s = 1.0

    def level(short_s: float) -> float:
        return policy_for(applications, short_s=short_s, head_start_s=7.0).rank(plain, need_blocks=1, is_sibling=False)[
            1
        ]

    # 160 of 100 x 16 tokens for 100 s.
    assert (level(10.0), level(9.99)) == (0.0, 7.0)
