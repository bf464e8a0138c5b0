"""Conformance of every registered policy with its contract."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isfinite
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokencake.forecast.costs import CostModel
from tokencake.forecast.durations import Forecast
from tokencake.forecast.reuse import ReuseProbability
from tokencake.forecast.roles import Role
from tokencake.policies.registry import ADMISSION, BY_SETTING, EVICTION, OFFLOAD
from tokencake.protocol import Hint
from tokencake.space_scheduler.applications import AppTracker, LiveRequest
from tokencake.space_scheduler.growth import GrowthReservation
from tokencake.space_scheduler.policy import REFUSALS, AdmissionState
from tokencake.space_scheduler.settings import SpaceSettings
from tokencake.time_scheduler.host_tier import HostTier
from tokencake.time_scheduler.policy import Action, EvictionInputs, FinishedRequest, PaperInputs
from tokencake.time_scheduler.prefixes import PrefixIndex
from tokencake.time_scheduler.settings import TimeSettings

BLOCKS = st.integers(0, 5_000)


def test_every_setting_that_names_a_policy_has_its_registry() -> None:
    assert BY_SETTING == {"space.policy": ADMISSION, "time.policy": OFFLOAD, "time.eviction": EVICTION}


@pytest.mark.parametrize("name", OFFLOAD)
@given(
    stall_s=st.floats(0.001, 10_000),
    blocks=BLOCKS,
    missing=BLOCKS,
    free_blocks=BLOCKS,
    waiting_calls=st.integers(0, 50),
    claim=st.sampled_from([None, "final", "over"]),
)
def test_an_offload_policy_decides_for_every_finished_request_and_times_every_upload(
    name: str, stall_s: float, blocks: int, missing: int, free_blocks: int, waiting_calls: int, claim: str | None
) -> None:
    policy, costs, remaining = OFFLOAD[name](), CostModel(3 * 2**20, 16), Forecast().stall(Role(), None, stall_s)
    request = FinishedRequest(
        claim=claim,  # type: ignore[arg-type]
        remaining=remaining,
        queue_s=0.0,
        blocks=max(blocks, missing),
        missing=missing,
        device_blocks=5_000,
        free_blocks=free_blocks,
        pinned_blocks=0,
        waiting_calls=waiting_calls,
        residency_s=inf,
        paper_inputs=lambda: PaperInputs(
            waiting_calls * 10, waiting_calls, 100, 0.0, is_near_end=False, recent_stores=0
        ),
    )

    assert policy.on_finish(request, costs, TimeSettings()).action in get_args(Action)
    assert 0.0 <= policy.upload_in_s(remaining, blocks, costs, TimeSettings()) < inf
    assert policy.may_upload(remaining, 1.0, inf), "what is surely used and stays"


@pytest.mark.parametrize("name", EVICTION)
def test_an_eviction_policy_gives_every_block_a_distance(name: str) -> None:
    prefixes, tier = PrefixIndex(), HostTier(16)
    for request, phase in (("waits", "waiting"), ("runs", "running"), ("stalls", "stalled")):
        keys = [f"{request}{number}".encode() for number in range(4)]
        prefixes.arrive(request, keys, Hint(session=request), 0.0)
        if phase == "stalled":
            prefixes.stall(request, keys, 0.0)
        prefixes.by_id[request].phase = phase  # type: ignore[assignment]
        tier.settle(tier.reserve(keys, 0.0, lambda _: 0.0), ok=True)
    own = prefixes.by_id["stalls"]
    inputs = EvictionInputs(own, prefixes, tier, ReuseProbability(), 5.0, 0.5, lambda: {"waits": 0})

    distance, own_distance = EVICTION[name]().distances(inputs)

    assert own_distance < inf
    ends = [tier.ready(prefix.block_hashes)[-1] for prefix in prefixes]
    assert all(isfinite(distance(end)) for end in ends)


@pytest.mark.parametrize("name", ADMISSION)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(need=st.integers(1, 100), free=st.integers(0, 100), bypassed=st.lists(st.integers(1, 100), max_size=4))
def test_an_admission_policy_ranks_all_calls_and_refuses_with_a_declared_reason(
    name: str, applications: AppTracker, call: Callable[..., LiveRequest], need: int, free: int, bypassed: list[int]
) -> None:
    calls = [call("a", agent="writer"), call("b", now=1.0, importance=9.0), call(None, now=2.0)]
    policy = ADMISSION[name](SpaceSettings())
    reservations = (GrowthReservation(40, 0, 10),)
    state = AdmissionState(100, free, reservations=reservations, bypassed=tuple(bypassed))
    policy.begin(applications, state, now=3.0)
    ranks = [policy.rank(one, need_blocks=need, shares_prefix=False) for one in calls]

    assert len(set(ranks)) == len(ranks)
    assert {len(rank) for rank in ranks} == {len(policy.rank_reasons)}, "a reason for each part"
    assert all(policy.refusal(one, need, state) in (None, *REFUSALS) for one in calls)
    assert policy.reserve().keys() == {"size", "used"}
    assert isinstance(policy.swaps, bool)
    for one in calls:
        applications.end(one.request_id, 1, is_aborted=True, now=3.0)
