"""Forecast of the remaining stall of an agent, from its events or, before they came, from the hint of its last call.

A stall begins when the call finishes or with an event, and ends with an event or the next call, whichever is first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from tokencake.forecast.durations import BACK_NOW, Forecast, Stall
from tokencake.forecast.roles import Role, role_of
from tokencake.registry.records import Call, Session, ToolCall
from tokencake.time_scheduler.prefixes import Chain, Chains

GIVE_UP_TIMES: Final = 4.0
GIVE_UP_MIN_S: Final = 60.0
GIVE_UP_MAX_S: Final = 3_600.0
"""A stall is given up after `clamp(4 x its 90 % quantile, 60 s, 1 h)`."""
AFTER_TOOLS: Final = "(after its tools)"
"""In place of a tool's name: from the end of the last tool to the next call, which may wait at a join."""
ANSWER: Final = "(answer)"
"""In place of a tool's name: from a call's first slot to its end."""


def expected_rest(
    chain: Chain, call: Call | None, session: Session | None, chains: Chains, forecast: Forecast, now_s: float
) -> Stall:
    """The rest of the stall of `chain`, from what events have told or, before they came, from the hint.

    With several tools open it is the longest that counts: the agent goes on when the last has ended. A tool inside
    which sub-agents work lasts as long as they do. Behind the last tool a branch may have to wait for its siblings.
    """
    agent = role_of(chain.hint).of_agent
    tools = call.tools if call else {}
    hired = chains.hired_by(chain)
    # The answer of the last sub-agent says better than any past when such a tool ends.
    ending = {h.hint.parent_tool_call for h in hired if h.hint} - {
        h.hint.parent_tool_call for h in hired if h.hint and h.hint.reuse != "final"
    }
    rests = [
        _tool_rest(tool, agent, forecast, now_s) for name, tool in tools.items() if tool.is_open and name not in ending
    ]
    rests += [_call_rest(h, forecast, now_s) for h in hired]
    for kind, wait in (session.waits if session else {}).items():
        if wait.ended_s is None:
            rests.append(forecast.stall(agent, kind, wait.estimate_s).after(max(0.0, now_s - wait.started_s)))
    if rests:
        return _latest(rests)
    if (over_s := ended_s(chain, tools.values(), session)) is not None:
        return _rest_after_tools(chain, over_s, chains, forecast, now_s)
    waited_s = max(0.0, now_s - chain.since_s)
    expects = chain.hint.expects_tools if chain.hint else None
    if expects:
        return _latest([forecast.stall(agent, tool, estimate_s) for tool, estimate_s in expects.items()]).after(
            waited_s
        )
    return forecast.stall(agent, None, None).after(waited_s)


def ended_s(chain: Chain, tools: Iterable[ToolCall], session: Session | None) -> float | None:
    """When the last of what the agent is known to have waited for ended; None where nothing is known."""
    ends = [tool.ended_s for tool in tools if tool.ended_s is not None]
    waits = session.waits.values() if session else ()
    ends += [wait.ended_s for wait in waits if wait.ended_s is not None and wait.ended_s >= chain.since_s]
    return max(ends, default=None)


def _rest_after_tools(chain: Chain, over_s: float, chains: Chains, forecast: Forecast, now_s: float) -> Stall:
    hint = chain.hint
    if hint is None:
        return BACK_NOW
    if forecast.knows(role_of(hint), AFTER_TOOLS):
        return forecast.stall(role_of(hint), AFTER_TOOLS).after(max(0.0, now_s - over_s))
    return _latest([_call_rest(sibling, forecast, now_s) for sibling in chains.siblings_of(chain)] or [BACK_NOW])


def _call_rest(chain: Chain, forecast: Forecast, now_s: float) -> Stall:
    """Until another call, which this agent waits for, is over: its own stall, or its answer."""
    if chain.phase == "stalled":
        return Forecast().stall(Role(), None, chain.rest_s(now_s))
    agent = role_of(chain.hint).of_agent
    return forecast.stall(agent, ANSWER).after(max(0.0, now_s - chain.since_s) if chain.phase == "running" else 0.0)


def _tool_rest(tool: ToolCall, agent: Role, forecast: Forecast, now_s: float) -> Stall:
    waited_s = max(0.0, now_s - tool.started_s) if tool.started_s is not None else 0.0
    estimate_s = tool.estimate_s
    if estimate_s is None and tool.stages:
        known = [stage.estimate_s for stage in tool.stages if stage.estimate_s is not None]
        estimate_s = sum(known) if known else None
    if tool.fraction and waited_s:
        # What has been done tells the pace better than any past.
        return Forecast().stall(Role(), None, waited_s / tool.fraction).after(waited_s)
    if tool.stage and tool.stages and (rest_s := _rest_of_stages(tool)) is not None:
        return Forecast().stall(Role(), None, waited_s + rest_s).after(waited_s)
    return forecast.stall(agent, tool.tool, estimate_s).after(waited_s)


def _rest_of_stages(tool: ToolCall) -> float | None:
    names = [stage.name for stage in tool.stages or ()]
    if tool.stage not in names:
        return None
    rest = [stage.estimate_s for stage in (tool.stages or ())[names.index(tool.stage) :]]
    return sum(seconds for seconds in rest if seconds is not None)


def _latest(rests: Iterable[Stall]) -> Stall:
    return max(rests, key=_median)


def _median(rest: Stall) -> float:
    return rest.quantile(0.5)


def give_up_after(rest: Stall, deadlines_s: Iterable[float | None]) -> float:
    """Seconds after which nobody is expected to come any more."""
    told = [seconds for seconds in deadlines_s if seconds is not None]
    if told:
        return min(GIVE_UP_MAX_S, max(told))
    return min(GIVE_UP_MAX_S, max(GIVE_UP_MIN_S, GIVE_UP_TIMES * rest.quantile(0.9)))
