"""Calls that are over, read from the state of an engine: a file, an engine or a proxy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from tokencake.protocol import MAX_ID_CHARS, STATE_PATH
from tokencake_sim.capture.source import read_pages
from tokencake_sim.errors import WorkloadError
from tokencake_sim.workload.fields import Fields

PAGE_CALLS: Final = 200
MAX_CALLS: Final = 10_000
_LAST_S: Final = 1e12
_STATUSES: Final = ("waiting", "running", "finished", "aborted")


@dataclass(frozen=True, slots=True)
class PastTool:
    """One tool call that has ended; times in seconds since the epoch."""

    name: str
    started_s: float
    ended_s: float
    estimate_s: float | None


@dataclass(frozen=True, slots=True)
class PastCall:
    """One call that was answered in full; times in seconds since the epoch."""

    id: str
    session: str
    app: str
    """Its session, where it belongs to no application."""
    agent: str
    parent: str | None
    arrived_s: float
    finished_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    tools: tuple[PastTool, ...]

    @property
    def over_s(self) -> float:
        """When its tools were over too."""
        return max([self.finished_s, *(tool.ended_s for tool in self.tools)])


@dataclass(frozen=True, slots=True)
class PastRun:
    """The calls in order of arrival, and how many things had to be left out."""

    source: str
    calls: tuple[PastCall, ...]
    unfinished_calls: int
    open_tools: int
    hidden_calls: int
    """Calls that the engine knows and the state does not show."""


def read_past(source: str, api_key: str | None = None) -> PastRun:
    """Read the state from `source`: a file, or the URL of an engine or a proxy.

    Raises:
        WorkloadError: it cannot be read, is no state, or a call in it makes no sense.
    """
    try:
        raw = read_pages(source, STATE_PATH, "calls", PAGE_CALLS, MAX_CALLS, api_key)
    except ValueError as error:
        raise WorkloadError(source, "the state", f"is not JSON: {error}") from None
    return _parse(source, raw)


def _parse(source: str, raw: Any) -> PastRun:
    fields = Fields(source, "the state", raw)
    entries = fields.items("calls")
    totals = Fields(source, "the state, totals", fields.take("totals", {}))
    found = [_call(source, position, entry) for position, entry in enumerate(entries)]
    calls = [call for call, _ in found if call is not None]
    return PastRun(
        source=source,
        calls=tuple(sorted(calls, key=lambda call: (call.arrived_s, call.id))),
        unfinished_calls=len(found) - len(calls),
        open_tools=sum(open_tools for _, open_tools in found),
        hidden_calls=max(0, totals.count("calls", len(entries)) - len(entries)),
    )


def _call(source: str, position: int, raw: Any) -> tuple[PastCall | None, int]:
    """The call, None where it was not answered in full; and how many of its tool calls have no end."""
    fields = Fields(source, f"calls[{position}]", raw)
    name = fields.text("call", limit=MAX_ID_CHARS)
    fields.where = f"call {name}"
    if (status := fields.text("status")) not in _STATUSES:
        raise fields.wrong("status", status, f"one of {', '.join(_STATUSES)}")
    if status != "finished":
        return None, 0
    session = fields.text("session", limit=MAX_ID_CHARS)
    cached = Fields(source, f"{fields.where}, cached_tokens", fields.take("cached_tokens"))
    arrived_s, finished_s = fields.number("arrived", _LAST_S), fields.number("finished", _LAST_S)
    if finished_s < arrived_s:
        raise fields.wrong("finished", finished_s, f"a time after {arrived_s}, when it arrived")
    tools = [_tool(source, fields.where, finished_s, entry) for entry in fields.items("tools")]
    ended = tuple(tool for tool in tools if tool is not None)
    call = PastCall(
        id=name,
        session=session,
        app=fields.text("app", None, limit=MAX_ID_CHARS) or session,
        agent=fields.text("agent", None, limit=MAX_ID_CHARS) or "agent",
        parent=fields.text("parent_call", None, limit=MAX_ID_CHARS),
        arrived_s=arrived_s,
        finished_s=finished_s,
        prompt_tokens=fields.count("prompt_tokens", low=1),
        cached_tokens=cached.count("device") + cached.count("host"),
        output_tokens=fields.count("output_tokens", low=1),
        tools=ended,
    )
    return call, len(tools) - len(ended)


def _tool(source: str, where: str, finished_s: float, raw: Any) -> PastTool | None:
    fields = Fields(source, f"{where}, tool call", raw)
    ended_s = fields.number("end", _LAST_S, None)
    started_s = fields.number("start", _LAST_S, None)
    if ended_s is None:
        return None
    if started_s is None:  # its start was never heard of
        started_s = min(finished_s, ended_s)
    if ended_s < started_s:
        raise fields.wrong("end", ended_s, f"a time after {started_s}, when it began")
    estimate_s = fields.number("estimate_s", _LAST_S, None)
    return PastTool(fields.text("tool", None, limit=MAX_ID_CHARS) or "tool", started_s, ended_s, estimate_s)
