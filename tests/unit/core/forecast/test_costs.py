"""What copies and computing cost here, learned from measurements."""

from __future__ import annotations

from math import exp, inf

import pytest

from tokencake.forecast.costs import ALPHA, QUIET_SHARE, WINDOW_S, CacheResidency, CostModel, Rate


def test_a_rate_moves_towards_what_was_measured() -> None:
    rate = Rate(1.0)
    rate.learn(10.0, 30.0)
    assert rate.seconds == pytest.approx(1.0 + ALPHA * 2.0)

    for _ in range(40):
        rate.learn(4.0, 1.0)
    assert rate.seconds == pytest.approx(0.25)


@pytest.mark.parametrize(("units", "seconds"), [(0, 1.0), (1.0, 0.0), (-1.0, 1.0), (1.0, -1.0)])
def test_a_measurement_of_nothing_teaches_nothing(units: float, seconds: float) -> None:
    rate = Rate(1.0)
    rate.learn(units, seconds)

    assert rate.seconds == 1.0


def test_costs_are_reckoned_per_block_and_per_token() -> None:
    costs = CostModel(block_bytes=12_000_000, block_tokens=16)
    assert (costs.store_s(3), costs.load_s(3)) == (pytest.approx(0.003), pytest.approx(0.003))
    assert costs.recompute_s(5) == pytest.approx(5 * 16 / 5_000)

    costs.to_host.seconds, costs.to_device.seconds, costs.prefill.seconds = 2.0, 3.0, 0.5
    assert (costs.store_s(2), costs.load_s(2), costs.recompute_s(2)) == (4.0, 6.0, 16.0)


def test_blocks_that_nobody_takes_stay_for_ever() -> None:
    assert CacheResidency().from_now_s(100, 5.0) == inf
    assert CacheResidency(seconds=7.0).from_now_s(100, 5.0) == inf


def test_blocks_stay_as_long_as_half_of_the_free_ones_last_at_the_pace_of_late() -> None:
    residency = CacheResidency(seconds=0.0)
    residency.take(40.0, now_s=100.0)
    assert residency.from_now_s(200, 100.0) == pytest.approx(QUIET_SHARE * 200 * WINDOW_S / 40.0)

    later_s = 100.0 + WINDOW_S
    assert residency.from_now_s(200, later_s) == pytest.approx(QUIET_SHARE * 200 * WINDOW_S / (40.0 * exp(-1.0)))
    residency.take(10.0, now_s=later_s)
    assert residency.taken == pytest.approx(40.0 * exp(-1.0) + 10.0)
    assert residency.since_s == later_s


def test_less_than_one_block_taken_of_late_is_not_nothing() -> None:
    residency = CacheResidency(seconds=0.0)
    residency.take(0.5, now_s=0.0)

    assert residency.from_now_s(200, 0.0) == pytest.approx(QUIET_SHARE * 200 * WINDOW_S / 0.5)


def test_blocks_stay_at_least_as_long_as_in_the_past() -> None:
    residency = CacheResidency(seconds=60.0)
    residency.take(1_000.0, now_s=0.0)

    assert residency.from_now_s(10, 0.0) == 60.0
    assert residency.from_now_s(100_000, 0.0) == pytest.approx(QUIET_SHARE * 100_000 * WINDOW_S / 1_000.0)


def test_a_clock_that_goes_back_adds_nothing_to_what_was_taken() -> None:
    residency = CacheResidency(seconds=0.0)
    residency.take(40.0, now_s=100.0)
    residency.take(1.0, now_s=50.0)

    assert residency.taken == 41.0


def test_only_a_surprise_changes_how_long_blocks_stay() -> None:
    residency = CacheResidency()
    residency.learn(5.0, was_there=True)
    assert residency.seconds == inf, "as expected"
    residency.learn(8.0, was_there=False)
    assert residency.seconds == 8.0, "the first that was gone"
    residency.learn(20.0, was_there=False)
    residency.learn(8.0, was_there=True)
    assert residency.seconds == 8.0, "older ones gone and younger ones there are no surprise"

    residency.learn(12.0, was_there=True)
    assert residency.seconds == pytest.approx(8.0 + ALPHA * 4.0)
    residency.learn(6.0, was_there=False)
    assert residency.seconds == pytest.approx(10.0 - ALPHA * 4.0)
    residency.learn(8.0, was_there=False)
    assert residency.seconds == pytest.approx(8.0), "gone at the very age to which they stay"
