"""Forecast of the remaining stall of an agent, from its events or, before they came, from the hint of its last call.

A stall begins when the call finishes or with an event, and ends with an event or the next call, whichever is first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from tokencake.forecast.durations import BACK_NOW, DurationDistribution, Forecast
from tokencake.forecast.roles import Role, role_of
from tokencake.registry.records import CallRecord, Session, ToolCall
from tokencake.time_scheduler.prefixes import CachedPrefix, PrefixIndex

GIVE_UP_TIMES: Final = 4.0
GIVE_UP_MIN_S: Final = 60.0
GIVE_UP_MAX_S: Final = 3_600.0
"""A stall is given up after `clamp(4 x its 90 % quantile, 60 s, 1 h)`."""
AFTER_TOOLS: Final = "(after its tools)"
"""Instead of a tool's name: from the end of the last tool to the next call, which may wait at a join."""
ANSWER: Final = "(answer)"
"""Instead of a tool's name: from a call's first slot to its end."""


def expected_remaining(
    prefix: CachedPrefix,
    call: CallRecord | None,
    session: Session | None,
    prefixes: PrefixIndex,
    forecast: Forecast,
    now_s: float,
) -> DurationDistribution:
    """The remaining stall of `prefix`, from its events or, before they came, from the hint.

    With several open tools the longest counts: the agent continues when the last has ended. A tool inside which
    sub-agents work lasts as long as they do. After the last tool a branch may have to wait for its join peers.
    """
    agent = role_of(prefix.hint).of_agent
    tools = call.tools if call else {}
    subagents = prefixes.subagents_of(prefix)
    # The answer of the last sub-agent tells better than the tool's history when such a tool ends.
    ending = {h.hint.parent_tool_call for h in subagents if h.hint} - {
        h.hint.parent_tool_call for h in subagents if h.hint and h.hint.reuse != "final"
    }
    candidates = [
        _tool_remaining(tool, agent, forecast, now_s)
        for name, tool in tools.items()
        if tool.is_open and name not in ending
    ]
    candidates += [_call_remaining(h, forecast, now_s) for h in subagents]
    for kind, wait in (session.waits if session else {}).items():
        if wait.ended_s is None:
            candidates.append(
                forecast.stall(agent, kind, wait.estimate_s).given_elapsed(max(0.0, now_s - wait.started_s))
            )
    if candidates:
        return _latest(candidates)
    if (over_s := ended_s(prefix, tools.values(), session)) is not None:
        return _remaining_after_tools(prefix, over_s, prefixes, forecast, now_s)
    elapsed_s = max(0.0, now_s - prefix.since_s)
    expects = prefix.hint.expects_tools if prefix.hint else None
    if expects:
        return _latest([forecast.stall(agent, tool, estimate_s) for tool, estimate_s in expects.items()]).given_elapsed(
            elapsed_s
        )
    return forecast.stall(agent, None, None).given_elapsed(elapsed_s)


def ended_s(prefix: CachedPrefix, tools: Iterable[ToolCall], session: Session | None) -> float | None:
    """When the last of the tools and waits of the agent ended; None where none is known."""
    ends = [tool.ended_s for tool in tools if tool.ended_s is not None]
    waits = session.waits.values() if session else ()
    ends += [wait.ended_s for wait in waits if wait.ended_s is not None and wait.ended_s >= prefix.since_s]
    return max(ends, default=None)


def _remaining_after_tools(
    prefix: CachedPrefix, over_s: float, prefixes: PrefixIndex, forecast: Forecast, now_s: float
) -> DurationDistribution:
    hint = prefix.hint
    if hint is None:
        return BACK_NOW
    if forecast.knows(role_of(hint), AFTER_TOOLS):
        return forecast.stall(role_of(hint), AFTER_TOOLS).given_elapsed(max(0.0, now_s - over_s))
    return _latest([_call_remaining(sibling, forecast, now_s) for sibling in prefixes.join_peers(prefix)] or [BACK_NOW])


def _call_remaining(prefix: CachedPrefix, forecast: Forecast, now_s: float) -> DurationDistribution:
    """Until another call that this agent waits for is over: its own stall, or its answer."""
    if prefix.phase == "stalled":
        return Forecast().stall(Role(), None, prefix.remaining_s(now_s))
    agent = role_of(prefix.hint).of_agent
    return forecast.stall(agent, ANSWER).given_elapsed(
        max(0.0, now_s - prefix.since_s) if prefix.phase == "running" else 0.0
    )


def _tool_remaining(tool: ToolCall, agent: Role, forecast: Forecast, now_s: float) -> DurationDistribution:
    elapsed_s = max(0.0, now_s - tool.started_s) if tool.started_s is not None else 0.0
    estimate_s = tool.estimate_s
    if estimate_s is None and tool.stages:
        known = [stage.estimate_s for stage in tool.stages if stage.estimate_s is not None]
        estimate_s = sum(known) if known else None
    if tool.fraction and elapsed_s:
        # The reported fraction tells the pace better than the tool's history.
        return Forecast().stall(Role(), None, elapsed_s / tool.fraction).given_elapsed(elapsed_s)
    if tool.stage and tool.stages and (remaining_s := _remaining_stages_s(tool)) is not None:
        return Forecast().stall(Role(), None, elapsed_s + remaining_s).given_elapsed(elapsed_s)
    return forecast.stall(agent, tool.tool, estimate_s).given_elapsed(elapsed_s)


def _remaining_stages_s(tool: ToolCall) -> float | None:
    names = [stage.name for stage in tool.stages or ()]
    if tool.stage not in names:
        return None
    remaining = [stage.estimate_s for stage in (tool.stages or ())[names.index(tool.stage) :]]
    return sum(seconds for seconds in remaining if seconds is not None)


def _latest(candidates: Iterable[DurationDistribution]) -> DurationDistribution:
    return max(candidates, key=_median)


def _median(remaining: DurationDistribution) -> float:
    return remaining.quantile(0.5)


def give_up_after(remaining: DurationDistribution, deadlines_s: Iterable[float | None]) -> float:
    """Seconds after which no call is expected any more: the latest deadline, else a multiple of the late quantile."""
    known_s = [seconds for seconds in deadlines_s if seconds is not None]
    if known_s:
        return min(GIVE_UP_MAX_S, max(known_s))
    return min(GIVE_UP_MAX_S, max(GIVE_UP_MIN_S, GIVE_UP_TIMES * remaining.quantile(0.9)))
