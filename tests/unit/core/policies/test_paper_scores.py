"""The published scores, term by term."""

from __future__ import annotations

from collections.abc import Callable
from math import log1p
from typing import Any

import pytest

from tokencake.policies.paper_scores import AgentType, request_score
from tokencake.space_scheduler.applications import AppTracker, LiveRequest

BASE = 20.0
"""Of a call without importance, at its arrival: its similarity."""


@pytest.mark.parametrize(
    ("fields", "points"),
    [
        ({"importance": 3.0}, 100 * 3),
        ({"depth": 1}, 15 + 4),
        ({"depth": 2}, 2 * (15 + 4) + 10),
        ({"depth": 2, "importance": None}, 2 * (100 + 15 + 4) + 10),
        ({"out_degree": 2}, 45 * 2),
        ({"remaining": 2}, 20 * 2),
        ({"remaining": 1}, 20 + 90),
        ({"remaining": 0}, 90),
        ({"fan_out": 4}, 20 / 4 - 20 + 120 * 3 + 12 * 3),
        ({"fan_out": 1}, 0),
        ({"critical": True}, 180),
        ({"critical": False}, 0),
        ({"join": "j"}, 20),
        ({"max_depth": 9}, 0),
    ],
)
def test_each_field_of_the_hint_counts_as_published(
    call: Callable[..., LiveRequest], fields: dict[str, Any], points: float
) -> None:
    one = call("a", **{"importance": 0.0, **fields})

    assert request_score(one, 0.0, 0.0) == pytest.approx(BASE + points)


@pytest.mark.parametrize(
    ("elapsed_s", "waited_s", "points"),
    [
        (10.0, 10.0, 5 * 10 + 8 * 10),
        (10.0, 4.0, 5 * 10 + 8 * 4),
        (300.0, 0.0, 5 * 300),
        (301.0, 0.0, 5 * 300),
        (180.0, 180.0, (5 + 8) * 180),
        (181.0, 181.0, 5 * 181 + 8 * 180),
    ],
)
def test_ages_count_up_to_their_bounds(
    call: Callable[..., LiveRequest], elapsed_s: float, waited_s: float, points: float
) -> None:
    call("a", now=0.0)
    one = call("a", now=elapsed_s - waited_s, importance=0.0)

    assert request_score(one, 0.0, elapsed_s) == pytest.approx(BASE + points)


def test_ages_count_more_the_more_is_left_and_the_deeper_the_call_is(call: Callable[..., LiveRequest]) -> None:
    unknown = call("d", importance=0.0, remaining=1)
    assert request_score(unknown, 0.0, 10.0) - request_score(unknown, 0.0, 0.0) == pytest.approx(50 * 1.75 + 80 * 1.5)
    at_rest = call("a", importance=0.0, remaining=2, max_depth=4)
    deep = call("b", importance=0.0, depth=1, max_depth=4)
    beyond = call("c", importance=0.0, depth=8, remaining=8, max_depth=4)

    assert request_score(at_rest, 0.0, 10.0) - request_score(at_rest, 0.0, 0.0) == pytest.approx(
        5 * 10 * (1 + 0.75 * 0.5) + 8 * 10 * (1 + 0.5 * 0.5)
    )
    assert request_score(deep, 0.0, 10.0) - request_score(deep, 0.0, 0.0) == pytest.approx(50 + 80 + 5 * 10 * 0.25)
    assert request_score(deep, 0.0, 240.0) - request_score(deep, 0.0, 230.0) == pytest.approx(50 + 5 * 10 * 0.25)
    assert request_score(deep, 0.0, 250.0) - request_score(deep, 0.0, 240.0) == pytest.approx(5 * 10), "no more place"
    assert request_score(beyond, 0.0, 10.0) - request_score(beyond, 0.0, 0.0) == pytest.approx(
        50 * 1.75 + 80 * 1.5 + 50
    )


def test_an_application_that_came_later_scores_more_up_to_a_minute(call: Callable[..., LiveRequest]) -> None:
    scores = [
        request_score(call(f"a{seen_s}", now=seen_s, importance=0.0), 100.0, seen_s)
        for seen_s in (100.0, 130.0, 160.0, 161.0)
    ]

    assert scores == pytest.approx([BASE, BASE + 6 * 30, BASE + 6 * 60, BASE + 6 * 60])


def test_a_call_without_a_hint_scores_less_than_any(call: Callable[..., LiveRequest]) -> None:
    assert request_score(call(None), 0.0, 50.0) == -1.0


def test_a_type_scores_by_the_means_of_its_calls() -> None:
    agent_type = AgentType(
        calls=4,
        importance=12.0,
        depth=6.0,
        out_degree=10.0,
        remaining=20.0,
        elapsed_s=80.0,
        tokens=4_000.0,
        waited_s=30.0,
        waiting=3,
        refusals=5,
        preemptions=2,
        call_s=2.5,
    )
    urgency = log1p(30 / 3) + log1p(3) + log1p(5) + 1.5 * log1p(2)
    recompute = log1p(1_000) + log1p(2.5) + log1p(1_000 / 2.5)
    graph = 0.7 * 1.5 + 0.5 * 2.5 + 0.25 + 0.2 * 5 + 0.1 * 20

    assert agent_type.score() == pytest.approx(2 * 3 + urgency + 0.5 * recompute + graph)


def test_a_type_is_deep_where_its_mean_depth_is_more_than_one() -> None:
    def graph_part(depth: float) -> float:
        return AgentType(calls=2, importance=10.0, depth=depth).score() - 10.0 - 0.7 * depth / 2

    assert graph_part(2.0) == pytest.approx(0.0)
    assert graph_part(2.5) == pytest.approx(0.25)


def test_the_age_of_a_type_counts_up_to_three_minutes_and_its_score_is_at_least_one() -> None:
    def score(elapsed_s: float) -> float:
        return AgentType(calls=1, importance=5.0, elapsed_s=elapsed_s).score()

    assert (score(180.0), score(181.0)) == (pytest.approx(10 + 18), pytest.approx(10 + 18))
    assert score(100.0) == pytest.approx(10 + 10)
    assert AgentType().score() == 1.0
    assert AgentType(calls=1, importance=0.25).score() == 1.0
    assert AgentType(importance=2.0, tokens=9.0, waited_s=3.0).score() == pytest.approx(
        4 + log1p(3) + 0.5 * (log1p(9) + log1p(9 / 1e-3))
    ), "nothing is divided by no call, no waiting call or no time"


def test_a_type_adds_up_its_live_calls(applications: AppTracker, call: Callable[..., LiveRequest]) -> None:
    waiting = call("a", now=10.0, prompt_tokens=100, depth=2, out_degree=3, remaining=4)
    running = call("a", now=14.0, prompt_tokens=50, importance=7.0)
    running.preemptions = 2
    applications.start(running.request_id, 15.0)
    agent_type = AgentType()
    for one in (waiting, running, call(None)):
        agent_type.note(one, 20.0)

    assert (agent_type.calls, agent_type.importance, agent_type.depth, agent_type.out_degree, agent_type.remaining) == (
        2,
        9.0,
        2.0,
        3.0,
        4.0,
    )
    assert (agent_type.elapsed_s, agent_type.tokens, agent_type.preemptions) == (10.0 + 10.0, 150.0, 2)
    assert (agent_type.waiting, agent_type.waited_s) == (1, 10.0)
    assert agent_type.call_s == waiting.app.tenant.graph_stats.call_s
