"""What a policy says when a call ends, in seconds."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import pytest

from tokencake.forecast.costs import CostModel
from tokencake.forecast.durations import Forecast
from tokencake.forecast.reuse import ReuseProbability
from tokencake.forecast.roles import Role
from tokencake.policies.default_time import DefaultTimePolicy
from tokencake.policies.eviction import LeastRecentlyUsed, NextUse, distance_s
from tokencake.policies.paper_time import PaperTimePolicy
from tokencake.policies.registry import EVICTION, OFFLOAD
from tokencake.protocol import Hint
from tokencake.settings import SettingsError, section
from tokencake.time_scheduler.host_tier import HostTier
from tokencake.time_scheduler.policy import EvictionInputs, FinishedRequest, PaperInputs
from tokencake.time_scheduler.prefixes import PrefixIndex
from tokencake.time_scheduler.settings import TimeSettings

SETTINGS = TimeSettings()
BLOCK_BYTES = 3 * 2**20


def cost_model() -> CostModel:
    """3 MiB blocks, 25 GB/s each way, 7,500 tokens/s."""
    made = CostModel(BLOCK_BYTES, 16)
    made.to_host.seconds = made.to_device.seconds = BLOCK_BYTES / 25e9
    made.prefill.seconds = 1 / 7_500
    return made


QUIET: dict[str, Any] = {
    "waiting_blocks": 0,
    "fitting_blocks": 0,
    "host_free": 10_000,
    "importance": 0.0,
    "is_near_end": False,
    "recent_stores": 0,
}


def finished(stall_s: float = 8.0, **changed: Any) -> FinishedRequest:
    """A call of 9,000 tokens that asked for a tool on a busy device."""
    pressure = {name: changed.pop(name) for name in tuple(changed) if name in QUIET}
    inputs = PaperInputs(**{**QUIET, **pressure})
    usual = FinishedRequest(
        claim=None,
        remaining=Forecast().stall(Role(), None, stall_s),
        queue_s=0.0,
        blocks=563,
        missing=563,
        device_blocks=3_049,
        free_blocks=700,
        pinned_blocks=0,
        waiting_calls=0,
        residency_s=inf,
        paper_inputs=lambda: inputs,
    )
    return replace(usual, **changed)


def ours(call: FinishedRequest, settings: TimeSettings = SETTINGS) -> str:
    return DefaultTimePolicy().on_finish(call, cost_model(), settings).action


def paper(call: FinishedRequest) -> tuple[str, str]:
    decision = PaperTimePolicy().on_finish(call, cost_model(), SETTINGS)
    return decision.action, decision.why


def test_a_long_stall_pays_for_the_round_trip() -> None:
    assert ours(finished(8.0)) == "offload"


def test_a_final_answer_is_dropped() -> None:
    assert ours(finished(claim="final")) == "drop"
    assert ours(finished(claim="over")) == "drop"


def test_a_short_stall_is_kept_where_there_is_room() -> None:
    assert ours(finished(0.05)) == "keep"


@pytest.mark.parametrize(
    "tight", [{"pinned_blocks": 800}, {"free_blocks": 500}], ids=["the budget is spent", "nobody else would fit"]
)
def test_a_short_stall_is_left_alone_where_there_is_none(tight: dict[str, int]) -> None:
    assert ours(finished(0.05, **tight)) == "leave"


def test_a_short_stall_before_a_long_queue_is_a_long_gap() -> None:
    assert ours(finished(0.05, queue_s=30.0, waiting_calls=40)) == "offload"


def test_a_slow_link_makes_a_stall_short() -> None:
    slow = cost_model()
    slow.to_host.seconds = slow.to_device.seconds = BLOCK_BYTES / 0.5e9
    assert DefaultTimePolicy().on_finish(finished(2.0), slow, SETTINGS).action in ("keep", "leave")


def test_what_is_cheaper_to_compute_than_to_copy_is_not_copied() -> None:
    slow = cost_model()
    slow.to_host.seconds = slow.to_device.seconds = 0.01
    decision = DefaultTimePolicy().on_finish(finished(600.0), slow, SETTINGS)
    assert (decision.action, decision.why) == ("leave", "recompute is cheaper")


def test_the_upload_begins_before_the_early_quantile() -> None:
    remaining = Forecast().stall(Role(), None, 8.0)
    due_s = DefaultTimePolicy().upload_in_s(remaining, 563, cost_model(), SETTINGS)
    assert due_s == pytest.approx(remaining.quantile(0.2) - 0.1, abs=0.01)
    assert DefaultTimePolicy().upload_in_s(Forecast().stall(Role(), None, 0.1), 563, cost_model(), SETTINGS) == 0.0


# --- the published gate -----------------------------------------------------------------------------

BUSY = {"free_blocks": 600, "waiting_calls": 10, "waiting_blocks": 5_000, "fitting_blocks": 570}


def test_paper_offloads_where_somebody_waits_who_fits() -> None:
    assert paper(finished(8.0, **BUSY)) == ("offload", "pays")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"fitting_blocks": 0}, "no waiting demand"),
        ({"host_free": 10}, "host is full"),
        ({"free_blocks": 2_000, "waiting_blocks": 100, "fitting_blocks": 100}, "low pressure"),
        ({"importance": 10.0, "is_near_end": True}, "important"),
        ({"claim": "final"}, "not eligible"),
    ],
)
def test_paper_rejects_in_the_published_order(change: dict[str, Any], why: str) -> None:
    assert paper(finished(8.0, **{**BUSY, **change})) == ("leave", why)


def test_paper_rejects_a_stall_shorter_than_the_transfer() -> None:
    assert paper(finished(0.05, **BUSY)) == ("leave", "stall too short")
    assert paper(finished(0.25, **BUSY)) == ("leave", "window too short")


def test_paper_scores_with_the_published_constants() -> None:
    call = finished(**{**BUSY, "importance": 2.0})
    # stall 6, pressure 1.5, waiting 2, fit 570 of 563, upload is safe 1, room on the host 1, importance 0.7
    assert PaperTimePolicy.score(call, call.paper_inputs(), 3.5, 0.5, 0.85) == pytest.approx(
        6 + 1.5 + 2 + 570 / 563 + 1 + 1 - 0.7
    )


def test_paper_uploads_a_fixed_lead_before_the_predicted_end() -> None:
    remaining = Forecast().stall(Role(), None, 8.0)
    assert PaperTimePolicy().upload_in_s(remaining, 563, cost_model(), SETTINGS) == pytest.approx(
        remaining.mean_s - 0.1
    )


# --- replacement and settings -------------------------------------------------------------------------


def test_the_queue_comes_before_the_stalled_and_these_before_the_running() -> None:
    waiting = [distance_s("waiting", place, 0.0, 5, 2.0) for place in range(5)]
    stalled = [distance_s("stalled", 5, remaining_s, 5, 2.0) for remaining_s in (0.0, 8.0)]
    running = distance_s("running", 5, 1.0, 5, 2.0)
    assert [*waiting, *stalled] == sorted([*waiting, *stalled])
    assert waiting[-1] < stalled[0] < running


def test_what_a_waiting_call_reads_is_sure_whatever_came_of_calls_like_it() -> None:
    reuse, prefixes, tier = ReuseProbability(), PrefixIndex(), HostTier(8)
    hint = Hint(session="s", agent="last")
    for _ in range(50):
        reuse.learn(hint, came=False)
    keys = {name: [name + bytes([place]) for place in range(4)] for name in (b"waits", b"stalled")}
    for name, prefix in keys.items():
        prefixes.arrive(name.decode(), prefix, hint, 0.0)
        tier.settle(tier.reserve(prefix, 0.0, lambda block: 0.0), ok=True)
    prefixes.stall("stalled", keys[b"stalled"], 0.0)
    inputs = EvictionInputs(prefixes.by_id["stalled"], prefixes, tier, reuse, 0.0, 2.0, lambda: {"waits": 3})
    distance, own_s = NextUse().distances(inputs)
    ends = {block.key: distance(block) for block in tier.ready(keys[b"waits"]) + tier.ready(keys[b"stalled"])}
    assert ends[keys[b"waits"][-1]] == 6.0
    assert ends[keys[b"stalled"][-1]] == own_s > 10.0


def test_the_policy_is_taken_by_its_name() -> None:
    assert isinstance(OFFLOAD[settings_of(policy="paper").policy](), PaperTimePolicy)
    assert isinstance(OFFLOAD[settings_of(policy="ours").policy](), DefaultTimePolicy)
    lru = settings_of(policy="lru")
    assert isinstance(OFFLOAD[lru.policy](), DefaultTimePolicy)
    assert isinstance(EVICTION[lru.eviction](), LeastRecentlyUsed)


def settings_of(**raw: object) -> TimeSettings:
    return section({"tokencake": {"time": raw}}, "time", TimeSettings)


def test_settings_have_defaults() -> None:
    assert settings_of() == TimeSettings()
    assert settings_of(host_kv_gib=100, policy="paper").host_kv_gib == 100.0


@pytest.mark.parametrize(
    "raw", [{"polcy": "ours"}, {"policy": "best"}, {"host_kv_gib": -1}, {"upload_quantile": 2}, {"enabled": 1}]
)
def test_bad_settings_are_refused(raw: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=r"tokencake\.time\."):
        settings_of(**raw)


def test_an_unknown_key_is_answered_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="host_kv_gib"):
        settings_of(host_gib=1)


def test_an_upload_that_would_be_gone_before_the_agent_is_back_is_not_begun() -> None:
    remaining = Forecast().stall(Role(), None, 8.0)
    assert DefaultTimePolicy().may_upload(remaining, 1.0, 60.0)
    assert not DefaultTimePolicy().may_upload(remaining, 1.0, 4.0)
    assert not DefaultTimePolicy().may_upload(remaining, 0.4, inf)
    assert PaperTimePolicy().may_upload(remaining, 0.4, 4.0)


def test_a_short_stall_whose_blocks_would_be_gone_by_its_end_is_copied() -> None:
    crowded = finished(0.05, free_blocks=100, residency_s=0.01)
    assert ours(crowded) == "offload"
    assert ours(replace(crowded, residency_s=5.0)) == "leave"
    assert ours(replace(crowded, residency_s=5.0, waiting_calls=1)) == "offload"
    assert ours(replace(crowded, missing=0)) == "leave"
