"""Paths, promises, answer lengths and the decision log, from values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokencake.forecast.output_lengths import OutputLengthHistory
from tokencake.forecast.roles import Role
from tokencake.settings import SettingsError, section
from tokencake.space_scheduler.decision_log import DecisionLog, ExplainedDecision
from tokencake.space_scheduler.growth import GrowthReservation, peak_blocks, tokens_until_free, would_delay
from tokencake.space_scheduler.settings import SpaceSettings

WRITER = Role("writer")


def test_a_call_holds_back_what_it_needs_until_its_end_only():
    short, long = GrowthReservation(16, 0, 10), GrowthReservation(160, 0, 0)

    # At 16 tokens both have grown by a block; the ten that the short one gives back are the long one's room.
    assert peak_blocks([short, long], 16) == 2
    assert peak_blocks([long], 16) == 10
    assert peak_blocks([], 16) == 0


def test_blocks_come_free_with_the_ends_of_calls():
    reservations = [GrowthReservation(32, 0, 5), GrowthReservation(64, 0, 5)]

    assert tokens_until_free(reservations, 3, 3, 16) == 0
    assert tokens_until_free(reservations, 4, 3, 16) == 32
    assert tokens_until_free(reservations, 12, 3, 16) == 64


@given(st.lists(st.builds(GrowthReservation, st.integers(1, 500), st.integers(0, 40), st.integers(0, 40)), max_size=12))
def test_one_promise_more_never_lowers_the_peak_of_those_that_end_before_it(reservations):
    last = GrowthReservation(1_000, 3, 0)

    assert peak_blocks([*reservations, last], 16) >= peak_blocks(reservations, 16)


def test_a_call_delays_those_before_it_if_it_still_holds_what_they_could_have():
    running = [GrowthReservation(32, 0, 50), GrowthReservation(64, 0, 30)]

    # 20 are free: 70 come together after 32 tokens and 100 after 64.
    assert not would_delay(GrowthReservation(16, 10, 0), [60], running, 20, 16)
    assert would_delay(GrowthReservation(48, 10, 0), [65], running, 20, 16)
    assert not would_delay(GrowthReservation(48, 10, 0), [55], running, 20, 16), "both fit"
    assert would_delay(GrowthReservation(80, 10, 0), [55, 40], running, 20, 16), "the second one could begin after 64"


def test_lengths_are_a_quantile_once_enough_are_known():
    lengths = OutputLengthHistory()
    for tokens in (10, 20, 30):
        lengths.learn(WRITER, tokens)
    assert lengths.quantile(WRITER, 0.5) is None

    lengths.learn(WRITER, 400)

    assert lengths.quantile(WRITER, 0.5) == 30
    assert lengths.quantile(WRITER, 1.0) == 400


def test_the_log_keeps_the_same_words_about_a_call_once_and_is_bounded():
    log = DecisionLog(2)

    def add(request, reason, at):
        return log.add(ExplainedDecision(at, request, request, "app", None, "", "refused", reason), reason)

    assert [add("a", "x", 1.0), add("a", "x", 2.0), add("a", "y", 3.0), add("b", "x", 4.0)] == [True, False, True, True]
    words = [entry["words"] for entry in log.view(100.0, call=None, app=None, limit=10)["decisions"]]
    assert [sentence.partition(";")[0] for sentence in words] == ["skipped: y", "skipped: x"]
    assert [entry["at"] for entry in log.view(100.0, call="b", app=None, limit=10)["decisions"]] == [104.0]
    assert log.view(0.0, call=None, app="other", limit=10)["decisions"] == []


def test_settings_refuse_what_they_do_not_know():
    assert section({"tokencake": {"space": {"policy": "paper"}}}, "space", SpaceSettings).policy == "paper"
    with pytest.raises(SettingsError, match="one of default, paper"):
        section({"tokencake": {"space": {"policy": "fair"}}}, "space", SpaceSettings)
    with pytest.raises(SettingsError, match=r"the settings are enabled, .*those under advanced are answer_quantile"):
        section({"tokencake": {"space": {"reserve": 1}}}, "space", SpaceSettings)
