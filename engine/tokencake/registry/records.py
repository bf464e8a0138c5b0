"""Records of a tool call, a call, a session and an application."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from tokencake.protocol import Hint, Stage, ToolStatus

CallStatus: TypeAlias = Literal["waiting", "running", "finished", "aborted"]


@dataclass(slots=True)
class ToolCall:
    """One tool call. `started_s` is None until a start event, or an end event with a duration."""

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
class CallRecord:
    """One LLM call: its hint, what the scheduler did with it, and its tool calls."""

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
    order_s: float = 0.0
    """Its position in the order of arrival: `arrived_s`, or a tick after the call before it."""
    kept_bytes: int = 0
    """Estimated bytes of it and its tool calls."""


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
    tenant: str
    touched_s: float
    arrived_s: float = 0.0
    """When its latest call arrived."""
    live_requests: int = 0
    calls: dict[str, CallRecord] = field(default_factory=dict)
    waits: dict[str, Wait] = field(default_factory=dict)
    ended: ToolStatus | None = None


@dataclass(slots=True)
class AppRecord:
    """One application instance."""

    first_seen_s: float
    touched_s: float
    tenant: str = ""
    own_sessions: set[str] = field(default_factory=set)
    """Sessions that end with it (`lifetime_of`)."""
    ended: ToolStatus | None = None


def lifetime_of(hint: Hint) -> str:
    """Id of what ends the session of a call: the application where the session is its own, else the session itself.

    An application's own sessions are those whose id is the application's, or begins with it and a slash. Another
    session, as one named after a thread, is extended by later applications.
    """
    is_own = hint.app is not None and f"{hint.session}/".startswith(f"{hint.app}/")
    return hint.app if is_own and hint.app is not None else hint.session
