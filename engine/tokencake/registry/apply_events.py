"""Application of events to the records of calls and sessions.

Events may arrive twice and in any order: each application returns an outcome of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from tokencake import protocol
from tokencake.registry.records import ToolCall, Wait

if TYPE_CHECKING:
    from tokencake.protocol import EventOutcome
    from tokencake.registry.records import CallRecord, Session

ToolEvent: TypeAlias = protocol.ToolStart | protocol.ToolProgress | protocol.ToolEnd
WaitEvent: TypeAlias = protocol.StallStart | protocol.StallEnd


def note_tool(call: CallRecord, event: ToolEvent, now: float, limit: int) -> EventOutcome:
    """Apply a tool event to `call`, which may have at most `limit` tool calls."""
    match event:
        case protocol.ToolStart():
            return _start(call, event, now, limit)
        case protocol.ToolProgress():
            return _progress(call, event)
        case protocol.ToolEnd():
            return _end(call, event, now, limit)


def _start(call: CallRecord, event: protocol.ToolStart, now: float, limit: int) -> EventOutcome:
    tool = call.tools.get(event.tool_call)
    if tool is not None and tool.is_start_seen:
        return "duplicate"
    is_late = tool is not None
    tool = tool or _new_tool(call, event, limit)
    if tool is None:
        return "invalid"
    tool.is_start_seen = True
    tool.tool, tool.estimate_s, tool.deadline_s = event.tool, event.estimate_s, event.deadline_s
    tool.stages = event.stages
    if tool.started_s is None:
        tool.started_s = now - event.ago_s
    return "late" if is_late else "applied"


def _progress(call: CallRecord, event: protocol.ToolProgress) -> EventOutcome:
    tool = call.tools.get(event.tool_call)
    if tool is None:
        return "unknown"
    fraction = tool.fraction if event.fraction is None else event.fraction
    stage = event.stage or tool.stage
    if not tool.is_open or (fraction or 0) < (tool.fraction or 0):
        return "late"
    if (stage, fraction) == (tool.stage, tool.fraction):
        return "duplicate"
    tool.stage, tool.fraction = stage, fraction
    return "applied"


def _end(call: CallRecord, event: protocol.ToolEnd, now: float, limit: int) -> EventOutcome:
    tool = call.tools.get(event.tool_call) or _new_tool(call, event, limit)
    if tool is None:
        return "invalid"
    if not tool.is_open and tool.status is not None:
        return "duplicate"
    tool.ended_s, tool.status = now - event.ago_s, event.status
    if event.duration_s is not None:
        tool.duration_s = event.duration_s
        tool.started_s = tool.ended_s - event.duration_s
    elif tool.started_s is not None:
        tool.duration_s = max(0.0, tool.ended_s - tool.started_s)
    return "applied"


def _new_tool(call: CallRecord, event: protocol.ToolStart | protocol.ToolEnd, limit: int) -> ToolCall | None:
    """The record of a new tool call; None where the call has too many."""
    if len(call.tools) >= limit:
        return None
    tool = call.tools[event.tool_call] = ToolCall(event.tool)
    return tool


def note_wait(session: Session, event: WaitEvent, now: float, limit: int) -> EventOutcome:
    """Apply the start or end of a wait to `session`, which may have at most `limit` waits."""
    at_s = now - event.ago_s
    wait = session.waits.get(event.kind)
    if isinstance(event, protocol.StallStart):
        if wait is not None and wait.ended_s is None:
            return "duplicate"
        if at_s < session.arrived_s or (wait is not None and wait.ended_s is not None and at_s < wait.ended_s):
            return "late"
        _keep(session, event.kind, Wait(at_s, event.estimate_s), limit)
        return "applied"
    if wait is None:  # its start may still arrive, and is late then
        _keep(session, event.kind, Wait(at_s, ended_s=at_s), limit)
        return "applied"
    if wait.ended_s is not None:
        return "late"
    wait.ended_s = max(wait.started_s, at_s)
    return "applied"


def _keep(session: Session, kind: str, wait: Wait, limit: int) -> None:
    if kind not in session.waits and len(session.waits) >= limit:
        session.waits.pop(next(iter(session.waits)))
    session.waits[kind] = wait
