"""What is learned of one agent says nothing about another, although the prebuilt agents name their nodes alike."""

from __future__ import annotations

import pytest

from tokencake import protocol
from tokencake.forecast.roles import NodeKey, Role, role_of
from tokencake.protocol import Hint
from tokencake.registry.registry import Registry
from tokencake.space_scheduler.applications import AppTracker
from tokencake.time_scheduler.expected_stall import AFTER_TOOLS, ANSWER
from tokencake.time_scheduler.stall_tracker import StallTracker


def hint_of(agent: str, number: int = 0, **fields: object) -> Hint:
    """The hint of a call of a `create_agent` agent: its node is `model`, whatever its name is."""
    return Hint(session=f"run-{number}//{agent}", call=f"{agent}-{number}", agent=agent, node="model", **fields)


@pytest.fixture(scope="module")
def tracker() -> StallTracker:
    """The researcher has called ten times: a tool of 20 s each time, and never a next call."""
    registry = Registry()
    tracker = StallTracker(registry)
    for number in range(10):
        hint = hint_of("researcher", number)
        call, keys = hint.call or "", [bytes([number, 1]), bytes([number, 2])]
        registry.add_call(call, hint, 64, 0.0)
        tracker.arrive(call, keys, hint, 0.0)
        tracker.start(call, 0.0)
        registry.schedule_call(call, 0, 0, 0.0)
        registry.finish_call(call, 5, False, 30.0)
        tracker.finish(call, keys, 30.0)
        end = protocol.ToolEnd(call, "t", tool="search", duration_s=20.0)
        registry.apply(end, 50.0)
        tracker.on_event(end)
        if number < 5:  # these come back after 40 s more
            again = hint_of("researcher", number, parent_call=None)
            tracker.arrive(f"{call}-again", [*keys, b"more"], again, 90.0)
            tracker.prefixes.remove(f"{call}-again")
        else:
            for prefix in tracker.stalled_at(call):
                tracker.drop(prefix)
    return tracker


def test_the_chance_of_a_next_call_is_learned_by_agent(tracker: StallTracker) -> None:
    assert tracker.reuse.probability(hint_of("researcher")) != tracker.reuse.probability(hint_of("writer"))
    assert tracker.reuse.probability(hint_of("writer")) == tracker.reuse.probability(Hint(session="s", agent="nobody"))


@pytest.mark.parametrize("tool", ["search", ANSWER])
def test_durations_of_tools_and_answers_are_learned_by_agent(tracker: StallTracker, tool: str) -> None:
    assert tracker.forecast.knows(Role("researcher"), tool)
    assert not tracker.forecast.knows(Role("writer"), tool)
    assert not tracker.forecast.knows(Role(), tool)


def test_the_gap_after_tools_is_learned_by_agent_and_node(tracker: StallTracker) -> None:
    assert tracker.forecast.knows(Role("researcher", node="model"), AFTER_TOOLS)
    assert not tracker.forecast.knows(Role("writer", node="model"), AFTER_TOOLS)
    assert not tracker.forecast.knows(Role(node="model"), AFTER_TOOLS)


def run_call(applications: AppTracker, hint: Hint, tokens: int, at_s: float) -> NodeKey:
    call = applications.add(hint.call or "", hint, prompt_tokens=10, max_tokens=10_000, now=at_s)
    applications.start(call.request_id, at_s)
    applications.end(call.request_id, tokens, is_aborted=False, now=at_s + tokens)
    assert call.branch is not None
    return call.branch.node_key


def test_answer_lengths_and_times_of_calls_are_learned_by_agent() -> None:
    applications = AppTracker({}.get, answer_quantile=0.8)
    for number in range(8):
        app = f"app-{number}"
        first = run_call(applications, hint_of("researcher", number, app=app), 900, 0.0)
        second = run_call(applications, hint_of("writer", number, app=app), 30, 1_000.0)
    assert applications.lengths.quantile(role_of(hint_of("researcher")), 0.5) == 900
    assert applications.lengths.quantile(role_of(hint_of("writer")), 0.5) == 30
    graph_stats = applications.tenants.get("").graph_stats
    assert graph_stats.service_s(first) > 10 * graph_stats.service_s(second)


def test_nodes_of_one_agent_are_told_apart() -> None:
    summary = Hint(session="s", agent="researcher", node="SummarizationMiddleware.before_model")
    assert role_of(summary) != role_of(hint_of("researcher"))
    assert role_of(summary).label != role_of(hint_of("researcher")).label
    assert role_of(summary).of_agent == role_of(hint_of("researcher")).of_agent
