"""What is kept of a tool call, a call, a session and an application, and how does the state show it?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from tokencake.protocol import Hint, Stage, ToolStatus

CallStatus: TypeAlias = Literal["waiting", "running", "finished", "aborted"]
Clock: TypeAlias = Callable[[float | None], float | None]
"""Turns a time of the engine's clock into what a reader of the state wants."""


@dataclass(slots=True)
class ToolCall:
    """One tool call. `started_s` is None until a start or an end with a duration has told it."""

    tool: str | None
    started_s: float | None = None
    ended_s: float | None = None
    duration_s: float | None = None
    status: ToolStatus | None = None
    estimate_s: float | None = None
    deadline_s: float | None = None
    stages: tuple[Stage, ...] | None = None
    stage: str | None = None
    fraction: float | None = None
    is_start_seen: bool = False

    @property
    def is_open(self) -> bool:
        """Whether the agent still waits for it."""
        return self.ended_s is None


@dataclass(slots=True)
class Call:
    """One LLM call: what its hint said, what the scheduler did with it, the tool calls it asked for."""

    id: str
    hint: Hint
    arrived_s: float
    prompt_tokens: int
    live_requests: set[str] = field(default_factory=set)
    status: CallStatus = "waiting"
    scheduled_s: float | None = None
    finished_s: float | None = None
    cached_device_tokens: int = 0
    cached_host_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    is_completed: bool = False
    """Whether one of its requests came to its end."""
    tools: dict[str, ToolCall] = field(default_factory=dict)


@dataclass(slots=True)
class Wait:
    """A stall of a session that is no tool call."""

    started_s: float
    estimate_s: float | None = None
    ended_s: float | None = None


@dataclass(slots=True)
class Session:
    """The calls that extend one prefix, in order of arrival, and its stalls outside tools."""

    id: str
    agent: str | None
    app: str | None
    touched_s: float
    arrived_s: float = 0.0
    """When its latest call arrived."""
    live_requests: int = 0
    calls: dict[str, Call] = field(default_factory=dict)
    waits: dict[str, Wait] = field(default_factory=dict)
    ended: ToolStatus | None = None


@dataclass(slots=True)
class App:
    """One application instance."""

    first_seen_s: float
    touched_s: float
    own_sessions: set[str] = field(default_factory=set)
    """Sessions that cannot outlive it: their ids begin with its own."""
    ended: ToolStatus | None = None


def session_view(session: Session, when: Clock) -> dict[str, Any]:
    """A session as JSON."""
    open_waits = [kind for kind, wait in session.waits.items() if wait.ended_s is None]
    is_stalled = open_waits or any(tool.is_open for call in session.calls.values() for tool in call.tools.values())
    return {
        "agent": session.agent,
        "app": session.app,
        "status": "running"
        if session.live_requests
        else "stalled"
        if is_stalled
        else "ended"
        if session.ended
        else "idle",
        "touched": when(session.touched_s),
        "waits": {
            kind: {"start": when(wait.started_s), "end": when(wait.ended_s), "estimate_s": wait.estimate_s}
            for kind, wait in session.waits.items()
        },
    }


def call_view(call: Call, when: Clock) -> dict[str, Any]:
    """A call and its tool calls as JSON."""
    hint = call.hint
    return {
        "call": call.id,
        "session": hint.session,
        "app": hint.app,
        "agent": hint.agent,
        "graph": hint.graph,
        "node": hint.node,
        "parent_call": hint.parent_call,
        "parent_tool_call": hint.parent_tool_call,
        "status": call.status,
        "arrived": when(call.arrived_s),
        "scheduled": when(call.scheduled_s),
        "finished": when(call.finished_s),
        "queue_s": None if call.scheduled_s is None else call.scheduled_s - call.arrived_s,
        "prompt_tokens": call.prompt_tokens,
        "cached_tokens": {"device": call.cached_device_tokens, "host": call.cached_host_tokens},
        "output_tokens": call.output_tokens,
        "preemptions": call.preemptions,
        "tools": [
            {
                "tool_call": tool_call,
                "tool": tool.tool,
                "start": when(tool.started_s),
                "end": when(tool.ended_s),
                "duration_s": tool.duration_s,
                "status": tool.status,
                "estimate_s": tool.estimate_s,
                "stage": tool.stage,
                "fraction": tool.fraction,
            }
            for tool_call, tool in call.tools.items()
        ],
    }
