"""Applications as clients: they wait for predecessors, call, run tools and send events, driven by the clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from tokencake.protocol import AppEnd, Event, SessionEnd, ToolEnd, ToolStart
from tokencake_sim.clients.calls import SimCall
from tokencake_sim.clients.hints import call_id, graph_id, make_graph, make_hint, sessions_of, tool_call_id
from tokencake_sim.workload.graph import NodePosition, places
from tokencake_sim.workload.tokens import Texts, texts_of, token_ids

if TYPE_CHECKING:
    from tokencake.protocol import Hint
    from tokencake_sim.device.clock import Clock
    from tokencake_sim.workload.model import App, Node, Tool, Workload

EVENT_DELAY_S: Final = 0.025
"""Delay of an event from the moment it happens to its arrival at the engine: half a batching interval of the client."""


Expect = Callable[["App", "Node"], "int | None"]
"""The length of an answer as its client expects it, in tokens; None where it does not say."""


class EngineClient(Protocol):
    """The engine as its clients see it."""

    def submit(self, call: SimCall, hint: Hint | None) -> None:
        """Take a call."""

    def send(self, event: Event) -> None:
        """Take an event."""


@dataclass(slots=True)
class _Run:
    """One application under way."""

    app: App
    started_s: float
    places: dict[str, NodePosition]
    texts: dict[str, Texts]
    sessions: dict[str, str]
    max_depth: int
    finished_s: float | None = None
    begun: set[str] = field(default_factory=set)
    in_tool: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)
    """Nodes that are over, their tools included."""


class Applications:
    """All applications of a workload, driven by the clock and by the answers of the engine."""

    def __init__(self, workload: Workload, clock: Clock, engine: EngineClient, vocabulary: int, expect: Expect) -> None:
        self.calls: dict[str, SimCall] = {}
        self.stalled: dict[str, SimCall] = {}
        """Calls whose tool is running."""
        self.kinds = {app.id: app.kind for app in workload.apps}
        self._clock = clock
        self._engine = engine
        self._vocabulary = vocabulary
        self._expect = expect
        self._runs: dict[str, _Run] = {}
        self._graphs_told: set[str] = set()
        self._left = len(workload.apps)
        for app in workload.apps:
            clock.at(app.arrival_s, partial(self._start, app))

    @property
    def is_over(self) -> bool:
        """Whether every application has come to its end."""
        return self._left == 0

    def latencies_s(self) -> dict[str, float]:
        """Arrival to end of every application that is over."""
        return {name: run.finished_s - run.started_s for name, run in self._runs.items() if run.finished_s is not None}

    def take_answer(self, call: SimCall) -> None:
        """Continue after the answer to `call`: start its tool and the agents inside it, or end the node."""
        run, node = self._runs[call.app.id], call.node
        if node.tool is None:
            self._end(run, node)
            return
        self.stalled[call.id] = call
        self._send(
            run,
            ToolStart(
                call=call.id,
                tool_call=tool_call_id(run.app, node.id),
                tool=node.tool.name,
                estimate_s=node.tool.estimate_s,
                ago_s=EVENT_DELAY_S,
            ),
        )
        self._run_tool(run, node, node.tool)

    def _start(self, app: App) -> None:
        where = places(app.nodes)
        max_depth = max(place.depth for place in where.values())
        self._runs[app.id] = run = _Run(app, self._clock.now_s, where, texts_of(app), sessions_of(app), max_depth)
        if app.is_agentic and (shape := graph_id(app)) not in self._graphs_told:
            self._graphs_told.add(shape)
            if (graph := make_graph(app)) is not None:
                self._send(run, graph)
        self._begin_ready(run)

    def _begin_ready(self, run: _Run) -> None:
        for node in run.app.nodes:
            is_called = node.parent is None or node.parent in run.in_tool
            if node.id not in run.begun and is_called and run.ended.issuperset((*node.predecessors, *node.after)):
                run.begun.add(node.id)
                self._begin(run, node)

    def _begin(self, run: _Run, node: Node) -> None:
        if not node.is_local:
            self._call(run, node)
        elif node.tool is not None:
            self._run_tool(run, node, node.tool)
        else:
            self._end(run, node)

    def _call(self, run: _Run, node: Node) -> None:
        app, place, texts = run.app, run.places[node.id], run.texts[node.id]
        if texts.answer is None:
            raise AssertionError(f"{call_id(app, node)} is no LLM call")
        by_id = {other.id: other for other in app.nodes}
        call = SimCall(
            id=call_id(app, node),
            app=app,
            node=node,
            place=place,
            texts=texts,
            answer=token_ids(texts.answer, self._vocabulary),
            is_after_tool=any(by_id[name].tool is not None for name in node.predecessors),
            arrived_s=self._clock.now_s,
        )
        self.calls[call.id] = call
        age_s = self._clock.now_s - run.started_s
        hint = None
        if app.is_agentic:
            expected = self._expect(app, node)
            hint = make_hint(app, node, run.sessions[node.id], place, run.max_depth, age_s, expected)
        self._engine.submit(call, hint)

    def _run_tool(self, run: _Run, node: Node, tool: Tool) -> None:
        run.in_tool.add(node.id)
        if any(other.parent == node.id for other in run.app.nodes):
            self._begin_ready(run)
        else:
            self._clock.after(tool.duration_s, partial(self._end_tool, run, node, tool, self._clock.now_s))

    def _end_tool(self, run: _Run, node: Node, tool: Tool, started_s: float) -> None:
        if not node.is_local:
            del self.stalled[call_id(run.app, node)]
            self._send(
                run,
                ToolEnd(
                    call=call_id(run.app, node),
                    tool_call=tool_call_id(run.app, node.id),
                    tool=tool.name,
                    duration_s=self._clock.now_s - started_s,
                    ago_s=EVENT_DELAY_S,
                ),
            )
        self._end(run, node)

    def _end(self, run: _Run, node: Node) -> None:
        run.ended.add(node.id)
        self._begin_ready(run)
        if node.parent is not None:
            self._end_of_subagent(run, node)
        if len(run.ended) == len(run.app.nodes) and run.finished_s is None:
            run.finished_s = self._clock.now_s
            self._left -= 1
            self._send(run, AppEnd(app=run.app.id))

    def _end_of_subagent(self, run: _Run, node: Node) -> None:
        """A node inside a tool call is over. The last of a session ends the session, the last of all ends the tool."""
        siblings = [other for other in run.app.nodes if other.parent == node.parent]
        session = run.sessions[node.id]
        if all(other.id in run.ended for other in siblings if run.sessions[other.id] == session):
            self._send(run, SessionEnd(session=session))
        if all(other.id in run.ended for other in siblings):
            parent = next(other for other in run.app.nodes if other.id == node.parent)
            if parent.tool is None:
                raise AssertionError(f"{parent.id} has agents inside it but no tool")
            started_s = self.calls[call_id(run.app, parent)].finished_s if not parent.is_local else None
            since_s = self._clock.now_s if started_s is None else started_s
            self._clock.after(parent.tool.duration_s, partial(self._end_tool, run, parent, parent.tool, since_s))

    def _send(self, run: _Run, event: Event) -> None:
        if run.app.is_agentic:
            self._clock.after(EVENT_DELAY_S, partial(self._engine.send, event))
