"""The rest of a stall, given what has been waited already: exactly, with forecasts of one known median."""

from __future__ import annotations

import pytest

from tokencake.forecast.durations import BACK_NOW, DurationDistribution, Forecast
from tokencake.forecast.roles import Role
from tokencake.protocol import Hint, Stage
from tokencake.registry.records import CallRecord, Session, ToolCall, Wait
from tokencake.time_scheduler.expected_stall import (
    AFTER_TOOLS,
    ANSWER,
    GIVE_UP_MAX_S,
    GIVE_UP_MIN_S,
    ended_s,
    expected_remaining,
    give_up_after,
)
from tokencake.time_scheduler.prefixes import CachedPrefix, PrefixIndex

AGENT = Role("a")
KEYS = [b"1", b"2"]


def prefix(since_s: float = 0.0, name: str = "c", **fields: object) -> CachedPrefix:
    return CachedPrefix(name, KEYS, Hint(**{"session": "s", "call": name, "agent": "a", **fields}), "stalled", since_s)


def remaining(
    given: CachedPrefix,
    now_s: float,
    tools: dict[str, ToolCall] | None = None,
    waits: dict[str, Wait] | None = None,
    prefixes: PrefixIndex | None = None,
    forecast: Forecast | None = None,
) -> DurationDistribution:
    call = CallRecord(given.id, given.hint or Hint(session="s"), 0.0, 10, tools=tools or {})
    session = None if waits is None else Session("s", "a", None, "", 0.0, waits=waits)
    return expected_remaining(given, call, session, prefixes or PrefixIndex(), forecast or Forecast(), now_s)


def told(seconds: float, waited_s: float = 0.0) -> DurationDistribution:
    """What is expected of a stall of which an estimate was given."""
    return Forecast().stall(AGENT, "t", seconds).given_elapsed(waited_s)


def test_a_tool_that_has_run_for_some_time_has_the_rest_of_its_distribution_left() -> None:
    tool = ToolCall("t", started_s=3.0, estimate_s=20.0)

    assert remaining(prefix(), 3.0, {"t": tool}) == told(20.0)
    assert remaining(prefix(), 10.0, {"t": tool}) == told(20.0, 7.0)
    assert remaining(prefix(), 1.0, {"t": tool}) == told(20.0), "a clock of another process may be ahead"
    tool.started_s = None
    assert remaining(prefix(), 10.0, {"t": tool}) == told(20.0)


def test_a_wait_that_has_lasted_for_some_time_has_the_rest_of_its_distribution_left() -> None:
    waits = {"human": Wait(5.0, 60.0)}

    assert remaining(prefix(), 25.0, waits=waits) == told(60.0, 20.0)
    assert remaining(prefix(), 4.0, waits=waits) == told(60.0)
    waits["human"].ended_s = 6.0
    assert remaining(prefix(), 25.0, waits=waits) != told(60.0, 20.0)


def test_before_events_what_was_waited_counts_from_the_end_of_the_call() -> None:
    assert remaining(prefix(2.0, expects_tools={"x": 5.0, "y": 30.0}), 12.0) == told(30.0, 10.0)
    assert remaining(prefix(2.0, expects_tools={"x": 5.0}), 1.0) == told(5.0)
    assert remaining(prefix(2.0), 12.0) == Forecast().stall(AGENT, None).given_elapsed(10.0)
    assert remaining(prefix(2.0), 1.0) == Forecast().stall(AGENT, None)


def test_behind_its_tools_what_was_waited_counts_from_the_last_end() -> None:
    forecast = Forecast()
    for _ in range(10):
        forecast.learn(AGENT, AFTER_TOOLS, 12.0)
    tools = {"x": ToolCall("x", started_s=0.0, ended_s=4.0), "y": ToolCall("y", started_s=0.0, ended_s=6.0)}
    known = forecast.stall(AGENT, AFTER_TOOLS)

    assert remaining(prefix(), 9.0, tools, forecast=forecast) == known.given_elapsed(3.0)
    assert remaining(prefix(), 5.0, tools, forecast=forecast) == known
    assert remaining(prefix(), 9.0, tools) == BACK_NOW, "nothing is known of it, and no sibling is waited for"
    plain = CachedPrefix("c", KEYS, None, "stalled", 0.0)
    assert remaining(plain, 9.0, tools, forecast=forecast) == BACK_NOW


def test_a_fraction_tells_what_the_whole_takes_of_which_some_is_over() -> None:
    tool = ToolCall("t", started_s=10.0, estimate_s=1.0, fraction=0.25)

    assert remaining(prefix(), 20.0, {"t": tool}) == told(40.0, 10.0)
    assert remaining(prefix(), 10.0, {"t": tool}) == told(1.0), "no time has passed: it tells no pace"
    tool.fraction = 0.0
    assert remaining(prefix(), 20.0, {"t": tool}) == told(1.0, 10.0)


def test_a_stage_tells_what_is_left_from_its_begin_on() -> None:
    stages = (Stage("query", 2.0), Stage("embed", None), Stage("rank", 3.0), Stage("write", 20.0))
    tool = ToolCall("t", started_s=0.0, stages=stages)
    assert remaining(prefix(), 4.0, {"t": tool}) == told(25.0, 4.0)
    tool.stage = "embed"
    assert remaining(prefix(), 4.0, {"t": tool}) == told(4.0 + 23.0, 4.0)
    tool.stage = "write"
    assert remaining(prefix(), 4.0, {"t": tool}) == told(4.0 + 20.0, 4.0)
    tool.stage = "another"
    assert remaining(prefix(), 4.0, {"t": tool}) == told(25.0, 4.0)
    tool.estimate_s = 7.0
    assert remaining(prefix(), 4.0, {"t": tool}) == told(7.0, 4.0), (
        "the estimate of the whole goes before that of parts"
    )
    assert remaining(
        prefix(), 0.0, {"t": ToolCall("t", started_s=0.0, stages=(Stage("x", None),))}
    ) == Forecast().stall(AGENT, "t")


def test_the_agent_goes_on_when_the_last_of_all_it_waits_for_is_over() -> None:
    tools = {"x": ToolCall("x", started_s=0.0, estimate_s=2.0), "y": ToolCall("y", started_s=0.0, estimate_s=40.0)}
    waits = {"human": Wait(0.0, 300.0)}

    assert remaining(prefix(), 0.0, tools) == told(40.0)
    assert remaining(prefix(), 0.0, tools, waits) == told(300.0)
    tools["y"].ended_s = 1.0
    assert remaining(prefix(), 1.5, tools) == told(2.0, 1.5), "one is open still"


def sub_agents(*phases: tuple[str, str, str]) -> PrefixIndex:
    """Chains of sub-agents inside tool calls of "c": phase, tool call, reuse."""
    prefixes = PrefixIndex()
    for number, (phase, tool_call, reuse) in enumerate(phases):
        hint = Hint(session=f"w{number}", agent="w", parent_call="c", parent_tool_call=tool_call, reuse=reuse)
        prefixes.arrive(f"w{number}", [f"{number}".encode()], hint, 10.0)
        prefixes.by_id[f"w{number}"].phase = phase  # type: ignore[assignment]
    return prefixes


def test_a_sub_agent_that_answers_for_the_last_time_says_better_than_the_past_when_its_tool_ends() -> None:
    forecast = Forecast()
    for _ in range(10):
        forecast.learn(Role("w"), ANSWER, 2.0)
    answer = forecast.stall(Role("w"), ANSWER)
    tools = {"t": ToolCall("delegate", started_s=0.0, estimate_s=100.0)}

    def found(*phases: tuple[str, str, str]) -> DurationDistribution:
        return remaining(prefix(), 11.0, tools, prefixes=sub_agents(*phases), forecast=forecast)

    assert found(("running", "t", "final")) == answer.given_elapsed(1.0)
    assert found(("waiting", "t", "final")) == answer, "it has not begun to answer"
    assert found(("running", "t", "extends")) == told(100.0, 11.0), "it will call again"
    assert found(("running", "t", "final"), ("running", "t", "extends")) == told(100.0, 11.0)
    assert found(("running", "other", "final")) == told(100.0, 11.0), "it works in another tool"


def test_a_sub_agent_that_is_stalled_itself_is_waited_for_as_long_as_it_stalls() -> None:
    prefixes = sub_agents(("stalled", "t", "final"))
    prefixes.by_id["w0"].back_s = 41.0

    assert remaining(prefix(), 11.0, prefixes=prefixes) == Forecast().stall(Role(), None, 30.0)


def test_the_last_end_counts_where_anything_has_ended() -> None:
    given = prefix(since_s=5.0)
    tools = [ToolCall("x", ended_s=7.0), ToolCall("y", ended_s=9.0), ToolCall("z")]

    def session(*ends: float | None) -> Session:
        waits = {str(number): Wait(0.0, ended_s=end) for number, end in enumerate(ends)}
        return Session("s", "a", None, "", 0.0, waits=waits)

    assert ended_s(given, [], None) is None
    assert ended_s(given, tools, None) == 9.0
    assert ended_s(given, [tools[2]], None) is None
    assert ended_s(given, tools, session(12.0, None)) == 12.0
    assert ended_s(given, [], session(4.0)) is None, "that was before this stall"
    assert ended_s(given, [], session(5.0)) == 5.0


@pytest.mark.parametrize(
    ("deadlines_s", "seconds"),
    [([50.0, None], 50.0), ([50.0, 70.0], 70.0), ([1.0], 1.0), ([9_000.0], GIVE_UP_MAX_S)],
)
def test_a_deadline_says_when_a_stall_is_given_up(deadlines_s: list[float | None], seconds: float) -> None:
    assert give_up_after(told(100.0), deadlines_s) == seconds


def test_without_a_deadline_a_stall_is_given_up_after_a_multiple_of_a_late_quantile_within_bounds() -> None:
    assert give_up_after(told(100.0), [None]) == pytest.approx(4 * told(100.0).quantile(0.9))
    assert give_up_after(told(1.0), []) == GIVE_UP_MIN_S
    assert give_up_after(told(5_000.0), []) == GIVE_UP_MAX_S


def test_an_overdue_agent_is_expected_in_as_long_as_it_is_late() -> None:
    given = prefix()
    given.back_s = 30.0

    assert [given.remaining_s(now_s) for now_s in (10.0, 30.0, 45.0)] == [20.0, 0.0, 15.0]
