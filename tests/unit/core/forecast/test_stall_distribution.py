"""The distribution of the rest of a stall, in its own terms: what is over by when, and what has been waited already."""

from __future__ import annotations

from math import exp

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokencake.forecast.durations import (
    BACK_NOW,
    BINS,
    BINS_PER_E,
    ENOUGH,
    FADE,
    SHORTEST_S,
    DurationDistribution,
    Forecast,
)
from tokencake.forecast.roles import Role

ROLE = Role("writer")
SECONDS = st.floats(0.002, 10_000.0)


def edge(index: float) -> float:
    return SHORTEST_S * exp(index / BINS_PER_E)


def one_bin(index: int, elapsed_s: float = 0.0) -> DurationDistribution:
    return DurationDistribution(tuple(float(place == index) for place in range(BINS)), elapsed_s)


def two_bins(first: int, second: int, share: float) -> DurationDistribution:
    weights = [0.0] * BINS
    weights[first], weights[second] = share, 1.0 - share
    return DurationDistribution(tuple(weights))


def test_a_quantile_lies_in_its_bin_as_far_along_as_its_share() -> None:
    low, high = edge(40), edge(41)

    assert one_bin(40).quantile(0.25) == pytest.approx(low + 0.25 * (high - low))
    assert one_bin(40).quantile(1.0) == pytest.approx(high)
    assert one_bin(40).quantile(0.0) == 0.0
    assert two_bins(20, 40, 0.5).quantile(0.5) == pytest.approx(edge(21))
    assert two_bins(20, 40, 0.5).quantile(0.75) == pytest.approx(low + 0.5 * (high - low))


def test_what_has_been_waited_is_taken_off_the_quantile() -> None:
    low, high = edge(40), edge(41)
    waited = one_bin(40).given_elapsed(low - 1.0)

    assert waited.elapsed_s == low - 1.0
    assert waited.quantile(0.5) == pytest.approx((low + high) / 2 - (low - 1.0))


def test_within_its_bin_only_what_is_left_of_it_counts() -> None:
    low, high = edge(40), edge(41)
    middle = (low + high) / 2
    remaining = one_bin(40).given_elapsed(middle)

    # Half of the bin is outlived, so a 20th of that half goes to durations never seen; the rest is still in the bin.
    assert remaining.cdf(high - middle) == pytest.approx(1.0, abs=0.05)
    assert 0.0 < remaining.quantile(0.5) < high - middle


def test_the_share_within_a_time_grows_evenly_through_a_bin() -> None:
    low, high = edge(40), edge(41)
    stall = one_bin(40)

    assert stall.cdf(low) == 0.0
    assert stall.cdf(low + 0.25 * (high - low)) == pytest.approx(0.25)
    assert stall.cdf(high) == pytest.approx(1.0)
    assert stall.cdf(2 * high) == pytest.approx(1.0)
    assert stall.given_elapsed(low / 2).cdf(low / 2 + 0.25 * (high - low)) == pytest.approx(0.25)
    assert two_bins(20, 40, 0.3).cdf(edge(30)) == pytest.approx(0.3)


def test_the_mean_is_that_of_the_middles_of_the_bins_less_what_was_waited() -> None:
    low, high = edge(40), edge(41)

    assert one_bin(40).mean_s == pytest.approx((low + high) / 2)
    assert one_bin(40).given_elapsed(1.0).mean_s == pytest.approx((low + high) / 2 - 1.0)
    expected = 0.25 * (edge(20) + edge(21)) / 2 + 0.75 * (low + high) / 2
    assert two_bins(20, 40, 0.25).mean_s == pytest.approx(expected)


def test_a_stall_that_outlived_all_that_was_seen_may_last_as_long_again() -> None:
    outlived = one_bin(20).given_elapsed(10.0)

    assert outlived.quantile(0.5) == pytest.approx(10.0, rel=0.3)
    assert outlived.mean_s == pytest.approx(12.0, rel=0.3)
    assert 0.3 < outlived.cdf(10.0) < 0.7


@given(SECONDS, st.floats(0.0, 100_000.0), st.floats(0.05, 0.95))
def test_quantile_and_share_are_each_others_inverse(median_s: float, elapsed_s: float, share: float) -> None:
    remaining = Forecast().stall(ROLE, None, median_s).given_elapsed(elapsed_s)
    seconds = remaining.quantile(share)

    assert remaining.cdf(seconds) == pytest.approx(share, abs=1e-6)
    assert remaining.quantile(share) <= remaining.quantile(min(1.0, share + 0.05))


@given(SECONDS)
def test_an_estimate_is_the_median_of_what_is_expected(estimate_s: float) -> None:
    stall = Forecast().stall(ROLE, "search", estimate_s)

    assert stall.quantile(0.5) == pytest.approx(estimate_s, rel=0.02)
    # Log-normal with sigma 0.5: one sigma to either side.
    assert stall.quantile(0.8413) == pytest.approx(estimate_s * exp(0.5), rel=0.05)
    assert stall.quantile(0.1587) == pytest.approx(estimate_s * exp(-0.5), rel=0.05) or estimate_s < 0.01


def test_of_what_nobody_knows_a_second_is_expected_with_a_wide_spread() -> None:
    stall = Forecast().stall(ROLE, "search")

    assert stall.quantile(0.5) == pytest.approx(1.0, rel=0.02)
    assert stall.quantile(0.8413) == pytest.approx(exp(1.5), rel=0.05)


def test_who_is_back_is_back_at_once() -> None:
    assert BACK_NOW.quantile(0.9) < 0.01
    assert sum(BACK_NOW.weights) == 1.0


@pytest.mark.parametrize("seconds", [0.0, SHORTEST_S, 3.0, 7.5, 1e12])
def test_a_duration_falls_into_the_bin_between_whose_edges_it_lies(seconds: float) -> None:
    forecast = Forecast()
    for _ in range(20):
        forecast.learn(ROLE, "t", seconds)
    weights = forecast.stall(ROLE, "t").weights
    (index,) = [index for index, weight in enumerate(weights) if weight]

    assert index == 0 if seconds <= SHORTEST_S else edge(index) <= seconds or index == BINS - 1
    assert seconds < edge(index + 1) or index == BINS - 1
    assert weights[index] == pytest.approx(1.0)


def test_the_estimate_counts_half_until_enough_was_seen() -> None:
    forecast = Forecast()
    forecast.learn(ROLE, "t", 1.0)
    half = forecast.stall(ROLE, "t", 100.0)

    assert half.cdf(10.0) == pytest.approx(0.5, abs=0.01)
    assert half.cdf(1e6) == pytest.approx(1.0)
    count = next(n for n in range(1, 50) if sum(FADE**power for power in range(n)) >= ENOUGH)
    for _ in range(count - 2):
        forecast.learn(ROLE, "t", 1.0)
    assert forecast.stall(ROLE, "t", 100.0).cdf(10.0) < 0.6
    forecast.learn(ROLE, "t", 1.0)
    assert forecast.stall(ROLE, "t", 100.0).cdf(10.0) == pytest.approx(1.0)


def test_without_an_estimate_little_data_is_spread_around_its_own_centre() -> None:
    forecast = Forecast()
    forecast.learn(ROLE, "t", 10.0)
    stall = forecast.stall(ROLE, "t")

    assert stall.quantile(0.5) == pytest.approx(10.0, rel=0.15)
    assert stall.cdf(10.0 * exp(-0.75)) == pytest.approx(0.5 * 0.1587, abs=0.03)
    assert 1.0 - stall.cdf(10.0 * exp(0.75)) == pytest.approx(0.5 * 0.1587, abs=0.03)


def test_what_was_seen_long_ago_counts_less_and_is_forgotten_in_the_end() -> None:
    forecast = Forecast()
    forecast.learn(ROLE, "t", 1.0)
    for _ in range(50):
        forecast.learn(ROLE, "t", 100.0)
    old = FADE**50
    total = sum(FADE**power for power in range(51))
    assert forecast.stall(ROLE, "t").cdf(10.0) == pytest.approx(old / total)

    for _ in range(420):
        forecast.learn(ROLE, "t", 100.0)
    assert forecast.stall(ROLE, "t").cdf(10.0) == 0.0


def test_a_dump_holds_role_tool_and_weights_and_restores_to_the_same() -> None:
    forecast = Forecast()
    forecast.learn(Role("a", "g", "n", "t::"), "search", 2.0)
    forecast.learn(Role("a", "g", "n", "t::"), "search", 2.0)
    dumped = forecast.dump()
    assert dumped == [["a", "g", "n", "t::", "search", {"30": 1.98}]]

    other = Forecast()
    other.restore(dumped)
    assert len(other) == 1
    assert other.knows(Role("a", "g", "n", "t::"), "search")
    assert other.stall(Role("a", "g", "n", "t::"), "search").weights == pytest.approx(
        forecast.stall(Role("a", "g", "n", "t::"), "search").weights
    )


@pytest.mark.parametrize(
    ("weights", "is_taken"),
    [
        ({"0": 1.0}, True),
        ({str(BINS - 1): 0.5}, True),
        ({str(BINS): 1.0}, False),
        ({"-1": 1.0}, False),
        ({"1": 0}, False),
        ({"1": -2.0}, False),
        ({"1": float("inf")}, False),
        ({"1": "2"}, False),
        ({}, False),
    ],
)
def test_only_weights_that_make_sense_are_restored(weights: dict[str, object], is_taken: bool) -> None:
    forecast = Forecast()
    forecast.restore([["a", "g", "n", "", "tool", weights]])

    assert len(forecast) == is_taken


@pytest.mark.parametrize("entry", [None, {}, ["a", "g", "n", "", {"1": 1.0}], ["a", "g", "n", "", "t", 1.0], [[], {}]])
def test_an_entry_of_another_shape_is_left_out(entry: object) -> None:
    forecast = Forecast()
    forecast.restore([entry, ["a", "g", "n", "", "tool", {"1": 1.0}]])

    assert len(forecast) == 1
