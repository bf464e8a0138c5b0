"""Which runs are open, and how do they hang together?

LangChain reports every run by its id and its parent's. Not every end is reported (a cancelled task just vanishes), so
that closing a run also closes what is still open below it. Bounded: the oldest runs are forgotten first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias
from uuid import UUID

from tokencake_langgraph.calls import Bounded, Call
from tokencake_langgraph.identity import send_index
from tokencake_langgraph.sender import EventSender

RunKind: TypeAlias = Literal["chain", "call", "tool"]

MAX_RUNS: Final = 20_000
MAX_NAMESPACES: Final = 256
"""Graphs of one app whose latest call is remembered, in case a human is asked."""


@dataclass(slots=True)
class App:
    """One application instance: a root run and all that it started."""

    id: str
    name: str | None
    started_s: float
    last_calls: Bounded[str, Call] = field(default_factory=lambda: Bounded(MAX_NAMESPACES))
    """Graph namespace -> the latest call that was made there."""
    senders: set[EventSender] = field(default_factory=set)
    """To the engines that served its calls."""
    waiting: set[str] = field(default_factory=set)
    """Sessions that an interrupt left waiting for a human."""
    is_interrupted: bool = False


@dataclass(frozen=True, slots=True)
class Stall:
    """A wait that an engine has been told of: a tool call, or (`call` is None) other work of the session."""

    sender: EventSender
    session: str
    kind: str
    started_s: float
    call: Call | None = None
    tool_call: str | None = None


@dataclass(slots=True, eq=False)
class Run:
    """One open run."""

    id: UUID
    kind: RunKind
    parent: UUID | None
    app: App
    is_root: bool
    metadata: Mapping[str, Any]
    inputs: Any
    fan_index: int | None
    is_structured_output: bool = False
    call: Call | None = None
    """Of an LLM run that was claimed: as which call it was sent."""
    stall: Stall | None = None
    children: set[int] | None = None


class RunTree:
    """The open runs of the process. Not thread-safe: its owner holds a lock.

    Keyed by `UUID.int`: a UUID computes its hash anew each time, and that would be half of the work here.
    """

    def __init__(self, max_runs: int = MAX_RUNS) -> None:
        self._runs: OrderedDict[int, Run] = OrderedDict()
        self._max_runs = max_runs

    def __len__(self) -> int:
        return len(self._runs)

    def get(self, run_id: UUID | None) -> Run | None:
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
    ) -> Run | None:
        """Add a run; None if it is open already, as when two handlers report the same one.

        A parent that was never reported (a tracer's, or one forgotten) lends its id to the app, so that its children
        stay together, but nobody will see that app end.
        """
        if run_id.int in self._runs:
            return None
        parent = self.get(parent_id)
        index = send_index(metadata)
        if parent is None:
            app = App(str(parent_id or run_id), name, now_s)
        else:
            app = parent.app
            if parent.children is None:
                parent.children = set()
            parent.children.add(run_id.int)
            index = parent.fan_index if index is None else index
        run = Run(run_id, kind, parent_id, app, parent_id is None, metadata, inputs, index)
        self._runs[run_id.int] = run
        if len(self._runs) > self._max_runs:
            self._runs.popitem(last=False)
        return run

    def close(self, run_id: UUID) -> list[Run]:
        """Remove the run and all that is open below it; the run itself comes first. Empty if it was not open."""
        closed: list[Run] = []
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

    def nearest_tool(self, run_id: UUID | None) -> Run | None:
        """The innermost open tool run among `run_id` and its ancestors."""
        run = self.get(run_id)
        while run is not None and run.kind != "tool":
            run = self.get(run.parent)
        return run
