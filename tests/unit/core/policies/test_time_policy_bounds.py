"""What a policy decides for a finished call, on both sides of each of its bounds."""

from __future__ import annotations

from dataclasses import replace
from math import exp, inf
from typing import Any

import pytest

from tokencake.forecast.costs import CostModel
from tokencake.forecast.durations import BINS, BINS_PER_E, SHORTEST_S, DurationDistribution
from tokencake.policies.default_time import DefaultTimePolicy
from tokencake.policies.paper_time import PaperTimePolicy
from tokencake.time_scheduler.policy import FinishedRequest, PaperInputs
from tokencake.time_scheduler.settings import TimeSettings

SETTINGS = TimeSettings(short_stall_s=0.2, keep_share=0.3, upload_lead_s=0.1, upload_quantile=0.2)


def cost_model(copy_s: float = 0.001, prefill_s: float = 0.01) -> CostModel:
    """Seconds of copying one block either way, and of computing one token."""
    made = CostModel(1, 16)
    made.to_host.seconds = made.to_device.seconds = copy_s
    made.prefill.seconds = prefill_s
    return made


def evenly(seconds: float) -> DurationDistribution:
    """A stall that lasts about as long as this, in one bin."""
    index = next(index for index in range(BINS) if SHORTEST_S * exp((index + 1) / BINS_PER_E) > seconds)
    return DurationDistribution(tuple(float(place == index) for place in range(BINS)))


QUIET: dict[str, Any] = {
    "waiting_blocks": 0,
    "fitting_blocks": 0,
    "host_free": 1_000,
    "importance": 0.0,
    "is_near_end": False,
    "recent_stores": 0,
}


def finished(**changed: Any) -> FinishedRequest:
    """A call of 100 blocks, none of them on the host, on a device of 1,000 of which 300 are free."""
    pressure = {name: changed.pop(name) for name in tuple(changed) if name in QUIET}
    inputs = PaperInputs(**{**QUIET, **pressure})
    usual = FinishedRequest(
        claim=None,
        remaining=evenly(8.0),
        queue_s=0.0,
        blocks=100,
        missing=100,
        device_blocks=1_000,
        free_blocks=300,
        pinned_blocks=0,
        waiting_calls=0,
        residency_s=inf,
        paper_inputs=lambda: inputs,
    )
    return replace(usual, **changed)


def ours(call: FinishedRequest, costs: CostModel | None = None) -> tuple[str, str]:
    decision = DefaultTimePolicy().on_finish(call, costs or cost_model(), SETTINGS)
    return decision.action, decision.why


def paper(call: FinishedRequest, costs: CostModel | None = None) -> tuple[str, str]:
    decision = PaperTimePolicy().on_finish(call, costs or cost_model(), SETTINGS)
    return decision.action, decision.why


# --- the default ------------------------------------------------------------------------------------


def test_a_gap_no_longer_than_the_round_trip_is_short() -> None:
    gap_s = evenly(8.0).quantile(0.9)
    # Out and in: 100 blocks each way.
    assert ours(finished(), cost_model(copy_s=gap_s / 200 * 1.001, prefill_s=99)) == ("keep", "short")
    assert ours(finished(), cost_model(copy_s=gap_s / 200 * 0.999, prefill_s=99)) == ("offload", "reusable")
    assert ours(finished(missing=50), cost_model(copy_s=gap_s / 200 * 1.001, prefill_s=99)) == ("offload", "reusable")
    assert ours(finished(queue_s=1.0), cost_model(copy_s=gap_s / 200 * 1.001, prefill_s=99)) == ("offload", "reusable")


def test_a_gap_no_longer_than_the_short_stall_is_short_however_fast_copies_are() -> None:
    remaining = evenly(0.15)
    assert remaining.quantile(0.9) < 0.2
    assert ours(finished(remaining=remaining)) == ("keep", "short")
    assert ours(finished(remaining=remaining, queue_s=0.2)) == ("offload", "reusable")
    assert ours(finished(remaining=remaining, queue_s=0.2 - remaining.quantile(0.9))) == ("keep", "short")


@pytest.mark.parametrize(
    ("changed", "action"),
    [
        ({"pinned_blocks": 200}, "keep"),
        ({"pinned_blocks": 201}, "leave"),
        ({"free_blocks": 100}, "keep"),
        ({"free_blocks": 99}, "leave"),
        ({"waiting_calls": 1, "missing": 0}, "leave"),
    ],
)
def test_a_short_stall_is_pinned_within_the_budget_and_beside_another_call(
    changed: dict[str, int], action: str
) -> None:
    assert ours(finished(remaining=evenly(0.05), **changed)) == (action, "short")


def test_what_is_lost_if_it_is_left_is_copied() -> None:
    remaining = evenly(0.05)
    full = finished(remaining=remaining, free_blocks=0)
    gap_s = remaining.quantile(0.9)

    assert ours(replace(full, residency_s=gap_s)) == ("leave", "short")
    assert ours(replace(full, residency_s=gap_s * 0.99)) == ("offload", "reusable")
    assert ours(replace(full, waiting_calls=1)) == ("offload", "reusable")
    assert ours(replace(full, waiting_calls=1, missing=0)) == ("leave", "short")


def test_what_costs_as_much_to_copy_as_to_compute_is_left() -> None:
    # 100 blocks of 16 tokens, against 100 out and 100 in.
    for prefill_s, decision in ((0.124, ("leave", "recompute is cheaper")), (0.126, ("offload", "reusable"))):
        assert ours(finished(remaining=evenly(900.0)), cost_model(copy_s=1.0, prefill_s=prefill_s)) == decision
    equal = cost_model(copy_s=1.0, prefill_s=0.125)
    assert ours(finished(remaining=evenly(900.0)), equal) == ("leave", "recompute is cheaper")
    assert ours(finished(missing=0)) == ("offload", "on host already")


def test_an_upload_starts_a_copy_and_a_quarter_before_the_early_quantile_or_by_the_margin() -> None:
    remaining = evenly(8.0)
    early_s = remaining.quantile(0.2)

    assert DefaultTimePolicy().upload_in_s(remaining, 100, cost_model(copy_s=0.01), SETTINGS) == pytest.approx(
        early_s - 1.25
    )
    assert DefaultTimePolicy().upload_in_s(remaining, 100, cost_model(copy_s=0.0001), SETTINGS) == pytest.approx(
        early_s - 0.1
    )
    assert DefaultTimePolicy().upload_in_s(remaining, 100, cost_model(copy_s=1.0), SETTINGS) == 0.0


def test_an_upload_begins_where_it_is_used_in_four_of_five_cases_and_a_call_is_likely() -> None:
    remaining = evenly(8.0)

    def may(probability: float, share: float) -> bool:
        return DefaultTimePolicy().may_upload(remaining, probability, remaining.quantile(share) * (1 + 1e-9))

    assert may(1.0, 0.8)
    assert not may(1.0, 0.79)
    assert may(0.9, 0.9)
    assert not may(0.9, 0.88)
    assert not may(0.5, 1.0)
    assert not may(0.49, 1.0)


def test_policies_differ_in_whether_they_wait_for_demand() -> None:
    assert (DefaultTimePolicy.waits_for_demand, PaperTimePolicy.waits_for_demand) == (False, True)


# --- the published gate -----------------------------------------------------------------------------

BUSY: dict[str, Any] = {
    "free_blocks": 100,
    "waiting_calls": 2,
    "waiting_blocks": 500,
    "fitting_blocks": 100,
    "host_free": 100,
}
STALL_S = evenly(8.0).mean_s


def gate(copy_s: float = 0.001, **changed: Any) -> tuple[str, str]:
    return paper(finished(**{**BUSY, **changed}), cost_model(copy_s=copy_s))


def test_the_gate_copies_where_the_room_is_used_meanwhile() -> None:
    assert gate() == ("offload", "emergency"), "nine tenths are in use and the window is long"
    assert gate(free_blocks=200) == ("offload", "pays")
    assert gate(blocks=0) == ("leave", "not eligible")
    assert gate(claim="over") == ("leave", "not eligible")
    assert gate(missing=0) == ("offload", "on host already")


@pytest.mark.parametrize(
    ("copies", "why"), [(1.001, "stall too short"), (0.999, "window too short"), (0.334, "window too short")]
)
def test_a_transfer_of_the_whole_stall_or_a_third_of_it_is_too_long(copies: float, why: str) -> None:
    # 100 missing out, 100 in.
    assert gate(STALL_S / 200 * copies, free_blocks=200) == ("leave", why)
    assert gate(STALL_S / 200 * 0.332, free_blocks=200) == ("offload", "pays")


def test_only_what_is_missing_goes_out_but_all_comes_in() -> None:
    copy_s = STALL_S / 200 * 0.4
    assert gate(copy_s, free_blocks=200) == ("leave", "window too short")
    assert gate(copy_s, free_blocks=200, missing=50) == ("offload", "pays")


def test_the_window_is_at_least_fifty_milliseconds() -> None:
    remaining = evenly(0.04)
    assert remaining.mean_s < 0.05
    assert gate(1e-6, remaining=remaining, free_blocks=200) == ("leave", "window too short")
    assert gate(1e-6, remaining=evenly(0.06), free_blocks=200) == ("offload", "pays")


def test_the_host_must_have_room_for_what_is_missing() -> None:
    assert gate(host_free=99) == ("leave", "host is full")
    assert gate(host_free=99, missing=99)[0] == "offload"


@pytest.mark.parametrize(
    ("changed", "decision"),
    [
        ({"free_blocks": 400}, ("offload", "pays")),
        ({"free_blocks": 401}, ("offload", "pays")),
        ({"free_blocks": 500}, ("leave", "low pressure")),
        ({"free_blocks": 499}, ("offload", "pays")),
        ({"free_blocks": 401, "fitting_blocks": 99}, ("leave", "low pressure")),
        ({"free_blocks": 400, "fitting_blocks": 99}, ("offload", "pays")),
        ({"free_blocks": 401, "waiting_calls": 0}, ("leave", "low pressure")),
        ({"fitting_blocks": 0}, ("leave", "no waiting demand")),
    ],
)
def test_pressure_is_a_full_device_or_a_queue_that_wants_more_than_is_free(
    changed: dict[str, int], decision: tuple[str, str]
) -> None:
    assert gate(**changed) == decision


@pytest.mark.parametrize(
    ("importance", "is_near_end", "copies", "why"),
    [
        (8.0, True, 0.1, "important"),
        (7.9, True, 0.1, "pays"),
        (8.0, False, 0.1, "pays"),
        (8.0, False, 0.12, "important"),
        (8.0, False, 0.110, "pays"),
    ],
)
def test_an_important_call_is_shielded_near_its_end_or_where_the_window_is_not_eight_transfers(
    importance: float, is_near_end: bool, copies: float, why: str
) -> None:
    # The window is eight transfers where a transfer is a ninth of the stall.
    found = gate(STALL_S / 200 * copies, free_blocks=200, importance=importance, is_near_end=is_near_end)
    assert found[1] == why


def test_an_important_call_is_shielded_where_the_window_is_not_half_a_second() -> None:
    short = {"free_blocks": 200, "importance": 8.0, "fitting_blocks": 400, "waiting_blocks": 900}
    for seconds, why in ((0.4, "important"), (0.6, "pays")):
        remaining = evenly(seconds)
        assert (remaining.mean_s < 0.5) == (why == "important")
        assert gate(1e-6, remaining=remaining, **short)[1] == why


@pytest.mark.parametrize(
    ("changed", "copies", "why"),
    [
        ({"free_blocks": 150}, 0.001, "emergency"),
        ({"free_blocks": 151}, 0.001, "pays"),
        ({"waiting_calls": 0}, 0.001, "pays"),
        ({"remaining": evenly(4.0)}, 0.001, "pays"),
        ({}, 0.199, "emergency"),
        ({}, 0.201, "pays"),
    ],
)
def test_an_emergency_is_a_full_device_a_queue_and_a_long_window(
    changed: dict[str, Any], copies: float, why: str
) -> None:
    # The window is four transfers where a transfer is a fifth of the stall.
    long_s = evenly(40.0).mean_s
    assert gate(long_s / 200 * copies, **{"remaining": evenly(40.0), **changed})[1] == why


def test_an_emergency_goes_before_shield_and_score() -> None:
    assert gate(importance=10.0, is_near_end=True, recent_stores=10_000) == ("offload", "emergency")
    assert gate(importance=10.0, is_near_end=True, free_blocks=151) == ("leave", "important")
    assert gate(recent_stores=10_000, importance=7.0, is_near_end=True, free_blocks=151) == ("offload", "pays")


def test_a_call_whose_score_is_too_low_stays() -> None:
    # 6 + 0 + ... with all that takes off: churn 4, importance 0.35 x 7, near its end 2.
    low = {"free_blocks": 400, "importance": 7.9, "is_near_end": True, "recent_stores": 1_000}
    call = finished(**{**BUSY, **low, "waiting_blocks": 20, "fitting_blocks": 20})
    copy_s = STALL_S / 200 * 0.33
    transfer_s = 200 * copy_s
    score = PaperTimePolicy.score(call, call.paper_inputs(), STALL_S, transfer_s, 0.6)

    assert score < 1.0
    assert paper(call, cost_model(copy_s=copy_s)) == ("leave", "score")
    calm = replace(call.paper_inputs(), recent_stores=0)
    better = replace(call, paper_inputs=lambda: calm)
    assert PaperTimePolicy.score(better, better.paper_inputs(), STALL_S, transfer_s, 0.6) == pytest.approx(score + 4.0)
    assert paper(better, cost_model(copy_s=copy_s))[0] == ("offload" if score + 4.0 >= 1.0 else "leave")


def score(stall_s: float = 1.0, transfer_s: float = 0.5, use: float = 0.0, **changed: Any) -> float:
    call = finished(**{"host_free": 100, **changed})
    return PaperTimePolicy.score(call, call.paper_inputs(), stall_s, transfer_s, use)


BASE_SCORE = 1.0 + 1.0 + 1.0
"""Window / transfer, upload is safe, room on the host."""


@pytest.mark.parametrize(
    ("terms", "points"),
    [
        ({}, 0.0),
        ({"stall_s": 2.0}, 2.0),
        ({"stall_s": 3.5}, 5.0),
        ({"stall_s": 9.5}, 5.0),
        ({"stall_s": 0.9}, -0.2 - 2.0),
        ({"transfer_s": 0.1}, 0.9 / 0.25 - 1.0),
        ({"use": 0.6}, 0.0),
        ({"use": 0.8}, 1.2),
        ({"waiting_blocks": 101}, 1.0),
        ({"waiting_blocks": 900}, 2.0),
        ({"fitting_blocks": 50}, 0.5),
        ({"fitting_blocks": 900}, 2.0),
        ({"fitting_blocks": 1, "blocks": 0}, 1.0),
        ({"host_free": 99}, -5.0),
        ({"importance": 2.0}, -0.7),
        ({"importance": 20.0}, -3.5),
        ({"is_near_end": True}, -2.0),
        ({"recent_stores": 64}, 0.0),
        ({"recent_stores": 65}, -1 / 8),
        ({"recent_stores": 96}, -4.0),
        ({"recent_stores": 900}, -4.0),
    ],
)
def test_each_term_of_the_score_counts_as_published(terms: dict[str, Any], points: float) -> None:
    assert score(**terms) == pytest.approx(BASE_SCORE + points)


def test_the_published_upload_starts_a_copy_and_a_quarter_before_the_mean() -> None:
    remaining = evenly(8.0)

    assert PaperTimePolicy().upload_in_s(remaining, 100, cost_model(copy_s=0.01), SETTINGS) == pytest.approx(
        STALL_S - 1.25
    )
    assert PaperTimePolicy().upload_in_s(remaining, 100, cost_model(copy_s=0.0001), SETTINGS) == pytest.approx(
        STALL_S - 0.1
    )
    assert PaperTimePolicy().upload_in_s(remaining, 100, cost_model(copy_s=1.0), SETTINGS) == 0.0
