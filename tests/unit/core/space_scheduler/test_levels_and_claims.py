"""Levels of service, claims and the formula of seniority, each at its bounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tokencake.space_scheduler.applications import LiveRequest
from tokencake.space_scheduler.seniority import (
    RankContext,
    expected_service_s,
    priority_boost_s,
    rank_context,
    seniority_s,
    service_level,
)
from tokencake.space_scheduler.settings import SpaceSettings

SETTINGS = SpaceSettings(
    head_start_s=100.0,
    short_s=2.0,
    long_s=50.0,
    sibling_s=30.0,
    importance_s=10.0,
    critical_s=7.0,
    tenant_quantum_s=4.0,
)
NO_PEERS = RankContext({}, {}, {})
MakeCall = Callable[..., LiveRequest]


@pytest.mark.parametrize(
    ("served_s", "coming", "level"),
    [(0.0, 1.9, 0), (0.0, 2.0, 1), (1.0, 0.9, 0), (1.0, 1.0, 1), (49.0, 0.0, 1), (50.0, 0.0, 2), (149.0, 0.0, 3)],
)
def test_the_level_rises_at_short_and_with_each_long_service(
    call: MakeCall, served_s: float, coming: float, level: int
) -> None:
    app = call("a").app
    app.served_s = served_s

    assert service_level(app, coming, SETTINGS) == level


def test_what_is_known_to_come_is_the_answer_or_the_way_whichever_is_more(call: MakeCall) -> None:
    one = call("a", max_tokens=100)
    one.app.tenant.token_s = 0.5
    one.service_s = 20.0
    assert expected_service_s(one, 0.1) == pytest.approx(0.1 * 50.0)
    one.service_s = 80.0
    assert expected_service_s(one, 0.1) == pytest.approx(0.1 * 80.0)


def test_a_claim_is_importance_and_a_critical_path(call: MakeCall) -> None:
    assert priority_boost_s(call("a", importance=3.0), SETTINGS) == 30.0
    assert priority_boost_s(call("a", importance=0.0), SETTINGS) == 0.0
    assert priority_boost_s(call("b"), SETTINGS) == priority_boost_s(call(None), SETTINGS) == 50.0, (
        "the middle of the range"
    )
    assert priority_boost_s(call("c", importance=3.0, critical=True), SETTINGS) == 37.0


def test_seniority_adds_up_as_its_formula_says(call: MakeCall) -> None:
    one = call("t::a", now=1_000.0, importance=3.0)
    one.app.served_s = 60.0
    context = RankContext({}, {"t": 12.0}, {})

    assert seniority_s(one, SETTINGS, NO_PEERS, share=0.1, shares_prefix=False) == 1_000.0 + 200.0 - 30.0
    assert seniority_s(one, SETTINGS, NO_PEERS, share=0.1, shares_prefix=True) == 1_000.0 + 200.0 - 30.0 - 30.0
    assert seniority_s(one, SETTINGS, context, share=0.1, shares_prefix=False) == 1_000.0 + 200.0 - (30.0 - 12.0)


def test_a_call_without_a_hint_has_the_level_of_its_like_and_no_sibling(call: MakeCall) -> None:
    plain = call(None, now=1_000.0)

    for shares_prefix in (True, False):
        assert seniority_s(plain, SETTINGS, NO_PEERS, share=1.0, shares_prefix=shares_prefix) == 950.0
    context = RankContext({}, {"": 50.0}, {"": 1})
    assert seniority_s(plain, SETTINGS, context, share=0.0, shares_prefix=True) == 1_100.0


@pytest.mark.parametrize(("ahead_s", "level"), [(0.0, 0), (3.9, 0), (4.0, 1), (8.0, 2)])
def test_a_tenant_is_ahead_by_whole_quanta_over_the_least_served(call: MakeCall, ahead_s: float, level: int) -> None:
    least, ahead = call("t::a"), call("u::b")
    least.app.tenant.served_s, ahead.app.tenant.served_s = 10.0, 10.0 + ahead_s
    context = rank_context([least, ahead], [least.app.tenant, ahead.app.tenant], SETTINGS, 1_000)

    assert context.tenant_levels == {"t": 0, "u": level}


def test_the_mean_claim_is_that_of_the_tenants_live_calls(call: MakeCall) -> None:
    calls = [call("t::a", importance=2.0), call("t::b", importance=5.0, critical=True), call("u::c", importance=9.0)]
    tenants = [calls[0].app.tenant, calls[2].app.tenant]

    assert rank_context(calls, tenants, SETTINGS, 1_000).mean_boosts_s == {"t": (20.0 + 57.0) / 2, "u": 90.0}
    assert rank_context([], [], SETTINGS, 1_000) == NO_PEERS


@pytest.mark.parametrize(("prompts", "level"), [((100, 100), 0), ((100, 101), 1), ((0, 200), 0), ((150, 150), 1)])
def test_calls_without_a_hint_are_long_where_their_mean_is_more_than_short(
    call: MakeCall, prompts: tuple[int, int], level: int
) -> None:
    plain = [call(None, now=float(place), prompt_tokens=tokens, max_tokens=40) for place, tokens in enumerate(prompts)]
    tenant = plain[0].app.tenant
    tenant.token_s = 0.5
    # A prompt of 100 of 1,000 tokens for 40 tokens of 0.5 s: 2 device-seconds.
    assert rank_context([*plain, call("a")], [tenant], SETTINGS, 1_000).unhinted_levels == {"": level}
