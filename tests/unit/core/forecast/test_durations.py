"""How long a stall will still last: robust, online, bounded."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokencake.forecast.durations import MAX_KEYS, Forecast
from tokencake.forecast.roles import Role


def test_nothing_known_is_about_a_second() -> None:
    assert Forecast().stall(Role("a"), "t").quantile(0.5) == pytest.approx(1.0, rel=0.3)


def test_an_estimate_alone_is_believed() -> None:
    assert Forecast().stall(Role("a"), "t", 20.0).quantile(0.5) == pytest.approx(20.0, rel=0.2)


def test_estimate_and_history_share_while_there_is_little_data() -> None:
    forecast = Forecast()
    forecast.learn(Role("a"), "t", 1.0)
    stall = forecast.stall(Role("a"), "t", 100.0)
    assert stall.quantile(0.45) < 2.0
    assert stall.quantile(0.75) > 50.0


def test_with_enough_data_the_estimate_is_not_asked() -> None:
    forecast = Forecast()
    for _ in range(20):
        forecast.learn(Role("a"), "t", 3.0)
    assert forecast.stall(Role("a"), "t", 100.0).quantile(0.9) == pytest.approx(3.0, rel=0.3)


def test_an_outlier_does_not_move_the_median() -> None:
    forecast = Forecast()
    for _ in range(20):
        forecast.learn(Role("a"), "t", 2.0)
    forecast.learn(Role("a"), "t", 3_600.0)
    assert forecast.stall(Role("a"), "t").quantile(0.5) == pytest.approx(2.0, rel=0.3)


def test_a_tool_that_changed_is_believed() -> None:
    forecast = Forecast()
    for _ in range(100):
        forecast.learn(Role("a"), "t", 1.0)
    for _ in range(100):
        forecast.learn(Role("a"), "t", 30.0)
    assert forecast.stall(Role("a"), "t").quantile(0.5) == pytest.approx(30.0, rel=0.3)


def test_quantiles_of_a_lognormal_are_found() -> None:
    forecast, draw = Forecast(), random.Random(1)
    for _ in range(2_000):
        forecast.learn(Role("a"), "t", draw.lognormvariate(1.0, 0.5))
    stall = forecast.stall(Role("a"), "t")
    assert stall.quantile(0.5) == pytest.approx(2.72, rel=0.25)
    assert stall.quantile(0.9) == pytest.approx(5.16, rel=0.35)
    assert stall.mean_s == pytest.approx(3.08, rel=0.25)


def test_what_was_waited_is_taken_into_account() -> None:
    forecast = Forecast()
    for seconds in [1.0] * 10 + [60.0] * 10:
        forecast.learn(Role("a"), "t", seconds)
    stall = forecast.stall(Role("a"), "t")
    assert stall.quantile(0.4) < 2.0
    assert stall.given_elapsed(5.0).quantile(0.5) == pytest.approx(55.0, rel=0.25)


def test_a_stall_that_outlived_everything_lasts_as_long_again() -> None:
    stall = Forecast().stall(Role("a"), "t", 1.0).given_elapsed(100.0)
    assert 20.0 < stall.quantile(0.5) < 200.0


def test_agents_and_tools_are_told_apart() -> None:
    forecast = Forecast()
    for _ in range(20):
        forecast.learn(Role("a"), "t", 1.0)
        forecast.learn(Role("b"), "t", 9.0)
    assert forecast.stall(Role("b"), "t").quantile(0.5) > 5 * forecast.stall(Role("a"), "t").quantile(0.5)


def test_memory_is_bounded_and_the_oldest_goes() -> None:
    forecast = Forecast()
    for number in range(MAX_KEYS + 10):
        forecast.learn(Role("a"), str(number), 1.0)
    assert len(forecast) == MAX_KEYS


def test_what_was_learned_survives_a_restart() -> None:
    forecast, again = Forecast(), Forecast()
    for seconds in (1.0, 2.0, 4.0, 8.0) * 5:
        forecast.learn(Role("a"), "t", seconds)
    again.restore(json.loads(json.dumps(forecast.dump())))
    assert again.stall(Role("a"), "t").quantile(0.5) == pytest.approx(
        forecast.stall(Role("a"), "t").quantile(0.5), rel=0.01
    )


@pytest.mark.parametrize(
    "junk",
    [
        [1],
        ["a"],
        [["a", "t", {"5": 1.0}]],
        [[*Role("a"), "t", {"x": 1, "5": "y", "7": -1}]],
        [[*Role("a"), "t", {"999": 1.0}]],
    ],
)
def test_a_file_that_makes_no_sense_is_left_out(junk: list[object]) -> None:
    forecast = Forecast()
    forecast.restore(junk)
    assert len(forecast) == 0


@given(
    st.lists(st.floats(0, 1e7), max_size=30),
    st.one_of(st.none(), st.floats(0, 1e6)),
    st.floats(0, 1e6),
    st.floats(0, 1),
)
def test_quantiles_are_ordered_and_never_negative(
    seen: list[float], estimate_s: float | None, elapsed_s: float, share: float
) -> None:
    forecast = Forecast()
    for seconds in seen:
        forecast.learn(Role("a"), "t", seconds)
    stall = forecast.stall(Role("a"), "t", estimate_s).given_elapsed(elapsed_s)
    low, high = sorted((stall.quantile(share), stall.quantile(min(1.0, share + 0.2))))
    assert 0.0 <= low <= high
    assert stall.quantile(min(1.0, share + 0.2)) >= stall.quantile(share) - 1e-6
    assert stall.mean_s >= 0.0


def test_what_has_outlived_nearly_everything_may_last_as_long_again() -> None:
    forecast = Forecast()
    for _ in range(20):
        forecast.learn(Role("a"), "t", 10.0)
    overdue = forecast.stall(Role("a"), "t").given_elapsed(11.3)
    assert overdue.quantile(0.9) > 5.0
    assert forecast.stall(Role("a"), "t").quantile(0.9) == pytest.approx(10.0, rel=0.3)


def test_the_share_within_is_the_inverse_of_the_quantile() -> None:
    remaining = Forecast().stall(Role(), None, 8.0).given_elapsed(3.0)
    for share in (0.1, 0.5, 0.9):
        assert remaining.cdf(remaining.quantile(share)) == pytest.approx(share, abs=0.01)
