"""The tree of open runs.

LangChain reports each run with its id and its parent's id. It does not report every end: a cancelled task just
disappears. So closing a run also closes the open runs below it. The number of runs is bounded; the oldest are dropped
first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias
from uuid import UUID

from tokencake.bounded import BoundedDict
from tokencake_langgraph.calls import SentCall
from tokencake_langgraph.identity import send_index
from tokencake_langgraph.sender import EventSender

RunKind: TypeAlias = Literal["chain", "call", "tool"]

MAX_RUNS: Final = 20_000
MAX_NAMESPACES: Final = 256
"""Graphs per application whose latest call is stored, in case of an interrupt."""


@dataclass(slots=True)
class AppRun:
    """One application instance: a root run and all runs below it."""

    id: str
    name: str | None
    started_s: float
    last_calls: BoundedDict[str, SentCall] = field(default_factory=lambda: BoundedDict(MAX_NAMESPACES))
    """Graph namespace -> the latest call in that graph."""
    senders: set[EventSender] = field(default_factory=set)
    """Senders to the engines that served its calls."""
    waiting: set[str] = field(default_factory=set)
    """Sessions that wait for a human after an interrupt."""
    is_interrupted: bool = False


@dataclass(frozen=True, slots=True)
class ReportedStall:
    """A stall that was reported to an engine: in a tool call, or (`call` is None) in other work of the session."""

    sender: EventSender
    session: str
    kind: str
    started_s: float
    call: SentCall | None = None
    tool_call: str | None = None


@dataclass(slots=True, eq=False)
class OpenRun:
    """One open run."""

    id: UUID
    kind: RunKind
    parent: UUID | None
    app: AppRun
    is_root: bool
    metadata: Mapping[str, Any]
    inputs: Any
    fan_index: int | None
    is_structured_output: bool = False
    call: SentCall | None = None
    """The call as which an LLM run was sent; None until it has a hint."""
    stall: ReportedStall | None = None
    children: set[int] | None = None


class RunTree:
    """The open runs of the process. Not thread-safe: the owner holds a lock.

    The key is `UUID.int`, because a UUID computes its hash at each use, which would be half of the work here.
    """

    def __init__(self, max_runs: int = MAX_RUNS) -> None:
        self._runs: BoundedDict[int, OpenRun] = BoundedDict(max_runs)

    def __len__(self) -> int:
        return len(self._runs)

    def get(self, run_id: UUID | None) -> OpenRun | None:
        """The run if it is open."""
        return None if run_id is None else self._runs.get(run_id.int)

    def open(
        self,
        run_id: UUID,
        parent_id: UUID | None,
        kind: RunKind,
        metadata: Mapping[str, Any],
        now_s: float,
        name: str | None = None,
        inputs: Any = None,
    ) -> OpenRun | None:
        """Add a run; None if it is already open, for example when two handlers report it.

        If the parent was never reported (a tracer's run, or a dropped one), its id becomes the application's id. So its
        children stay together, but no end of that application is reported.
        """
        if run_id.int in self._runs:
            return None
        parent = self.get(parent_id)
        index = send_index(metadata)
        if parent is None:
            app = AppRun(str(parent_id or run_id), name, now_s)
        else:
            app = parent.app
            if parent.children is None:
                parent.children = set()
            parent.children.add(run_id.int)
            index = parent.fan_index if index is None else index
        run = OpenRun(run_id, kind, parent_id, app, parent_id is None, metadata, inputs, index)
        self._runs[run_id.int] = run
        return run

    def close(self, run_id: UUID) -> list[OpenRun]:
        """Remove the run and all open runs below it; the run itself comes first. Empty if it was not open."""
        closed: list[OpenRun] = []
        pending = [run_id.int]
        while pending:
            run = self._runs.pop(pending.pop(), None)
            if run is None:
                continue
            closed.append(run)
            if run.children:
                pending.extend(run.children)
        if closed and (parent := self.get(closed[0].parent)) is not None and parent.children:
            parent.children.discard(run_id.int)
        return closed

    def nearest_tool(self, run_id: UUID | None) -> OpenRun | None:
        """The innermost open tool run among `run_id` and its ancestors."""
        run = self.get(run_id)
        while run is not None and run.kind != "tool":
            run = self.get(run.parent)
        return run
