"""The runs of this process, translated into hints and events for the engines.

Runs open and close as LangChain reports them. An LLM call gets a hint. Events report what happens between calls: a tool
runs, plain code stalls a session, an interrupt waits for a human, the application ends.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, Final
from uuid import UUID

from langgraph.errors import GraphBubbleUp, GraphInterrupt, ParentCommand

from tokencake.protocol import AppEnd, Event, Hint, StallEnd, StallStart, ToolEnd, ToolStart, ToolStatus
from tokencake.protocol.parsing import MAX_SECONDS, MAX_TOOLS
from tokencake_langgraph.calls import CallTable, LookupScope, SentCall, checkpointed_messages, issuing_call_id
from tokencake_langgraph.identity import graph_namespace, locate, task_namespace, wire_text
from tokencake_langgraph.run_tree import AppRun, OpenRun, ReportedStall, RunTree
from tokencake_langgraph.sender import EventSender
from tokencake_langgraph.senders import sole_sender

INTERRUPT: Final = "interrupt"
"""The kind of a stall that ends when a human answers."""


class Lifecycle:
    """The open runs and the calls of a process. Thread-safe; nothing here waits for the network."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tree = RunTree()
        self._calls = CallTable()
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Replace the lock in a forked child, because another thread of the parent may have held it."""
        self._lock = threading.RLock()

    def is_open(self, run_id: UUID) -> bool:
        """Whether this run has started and not ended."""
        with self._lock:
            return self._tree.get(run_id) is not None

    # --- chains: graphs, nodes and all other runnables ----------------------------------------------

    def open_chain(
        self, run_id: UUID, parent_id: UUID | None, name: str | None, metadata: Mapping[str, Any], inputs: Any
    ) -> None:
        """A chain starts. Its inputs are kept while it runs: a node's messages show which call issued a tool call."""
        with self._lock:
            self._tree.open(run_id, parent_id, "chain", metadata, self._clock(), name, inputs)

    def close_chain(self, run_id: UUID, error: BaseException | None = None) -> None:
        """A chain ended, and with it all runs below it whose end was not reported."""
        with self._lock:
            closed = self._tree.close(run_id)
            if not closed:
                return
            run = closed[0]
            self._cancel(closed[1:])
            if isinstance(error, GraphInterrupt):
                location = locate(run.metadata, run.app.id, run.app.name)
                self._wait_for_human(run.app, run.app.last_calls.get(location.namespace))
            if run.is_root and not run.app.is_interrupted:
                for sender in run.app.senders:
                    sender.put(AppEnd(run.app.id, status=_status(error)))

    # --- LLM calls ----------------------------------------------------------------------------------

    def open_call(
        self, run_id: UUID, parent_id: UUID | None, metadata: Mapping[str, Any], *, is_structured_output: bool
    ) -> None:
        """An LLM call starts; its model is not known yet."""
        with self._lock:
            run = self._tree.open(run_id, parent_id, "call", metadata, self._clock())
            if run is not None:
                run.is_structured_output = is_structured_output

    def make_hint(
        self,
        run_id: UUID,
        sender: EventSender,
        tools: Sequence[str],
        estimates: Mapping[str, float],
        importance: float | None = None,
        expected_output_tokens: int | None = None,
    ) -> Hint | None:
        """The hint for the call that is about to be sent to `sender`'s engine, with `tools` bound to it.

        None if no such call is open.
        """
        with self._lock:
            run = self._tree.get(run_id)
            if run is None:
                return None
            app = run.app
            location = locate(run.metadata, app.id, app.name)
            call = SentCall(str(run_id), location.session, sender, _scopes(run), estimates)
            run.call = call
            self._calls.add(call)
            app.senders.add(sender)
            app.last_calls[location.namespace] = call
            app.waiting.discard(location.session)
            tool = self._tree.nearest_tool(run.parent)
            stall = tool.stall if tool is not None else None
            # The schema of a structured output is bound like a tool, but no tool will run.
            expected = () if run.is_structured_output else tools[:MAX_TOOLS]
            return Hint(
                session=location.session,
                call=call.id,
                app=app.id,
                app_started_ago_s=min(self._clock() - app.started_s, MAX_SECONDS),
                agent=location.agent,
                node=location.node,
                parent_call=stall.call.id if stall is not None and stall.call is not None else None,
                parent_tool_call=stall.tool_call if stall is not None else None,
                fan_index=run.fan_index,
                importance=importance,
                expects_tools={wire_text(name): estimates.get(name) for name in expected} or None,
                # With tools the agent's loop calls again with a longer prompt. Without tools it is not known.
                reuse="extends" if expected else "unknown",
                expected_output_tokens=expected_output_tokens,
            )

    def close_call(self, run_id: UUID, tool_calls: Iterable[str] = ()) -> None:
        """An LLM call ended, and its response has these tool calls."""
        with self._lock:
            closed = self._tree.close(run_id)
            if not closed:
                return
            self._cancel(closed[1:])
            call = closed[0].call
            if call is not None:
                self._calls.link(call, tool_calls)
            else:
                self._calls.add_foreign_call(str(run_id))

    # --- tools --------------------------------------------------------------------------------------

    def open_tool(
        self,
        run_id: UUID,
        parent_id: UUID | None,
        name: str,
        tool_call: str | None,
        metadata: Mapping[str, Any],
        estimate_s: float | None,
    ) -> None:
        """A tool starts: the call that issued it stalls, or without such a call the session of its node."""
        with self._lock:
            run = self._tree.open(run_id, parent_id, "tool", metadata, self._clock(), name)
            if run is None:
                return
            call = self._issuing_call(run, tool_call) if tool_call else None
            if call is not None and tool_call:
                stall = ReportedStall(
                    call.sender, call.session, wire_text(name), self._clock(), call, wire_text(tool_call)
                )
                run.stall = stall
                expected_s = call.estimates.get(name, estimate_s)
                stall.sender.put(ToolStart(call.id, stall.tool_call or "", stall.kind, expected_s))
            elif not tool_call:
                run.stall = self.start_stall(parent_id, metadata, f"tool:{name}", estimate_s)

    def close_tool(self, run_id: UUID, error: BaseException | None = None, *, is_failure: bool = False) -> None:
        """A tool ended. `is_failure`: it returned its error as a message for the model."""
        with self._lock:
            closed = self._tree.close(run_id)
            if not closed:
                return
            self._cancel(closed[1:])
            run = closed[0]
            self._end(run.stall, "error" if is_failure else _status(error))
            if isinstance(error, GraphInterrupt):
                self._wait_for_human(run.app, run.stall.call if run.stall else None)

    # --- plain code -----------------------------------------------------------------------------------

    def start_stall(
        self, parent_id: UUID | None, metadata: Mapping[str, Any], kind: str, estimate_s: float | None
    ) -> ReportedStall | None:
        """The session of run `parent_id` stalls in plain code. None if this process made no call of that session.

        None also inside a tool, where the session is already stalled.
        """
        with self._lock:
            parent = self._tree.get(parent_id)
            if parent is None or self._tree.nearest_tool(parent_id) is not None:
                return None
            location = locate(metadata, parent.app.id, parent.app.name)
            call = self._calls.latest_of(location.session)
            if call is None:
                return None
            stall = ReportedStall(call.sender, location.session, wire_text(kind), self._clock())
            stall.sender.put(StallStart(stall.session, stall.kind, estimate_s))
            return stall

    def end_stall(self, stall: ReportedStall) -> None:
        """The stall that `start_stall` returned has ended."""
        self._end(stall, "ok")

    # --- helpers, called under the lock ----------------------------------------------------------------------

    def _issuing_call(self, run: OpenRun, tool_call: str) -> SentCall | None:
        """The LLM call that issued `tool_call`, searched from the same task outwards."""
        task, graph = _scopes(run)
        if call := self._calls.issuing_call(task, tool_call):
            return call
        node = self._tree.get(run.parent)
        while node is not None and task_namespace(node.metadata) == task[1]:
            if node.inputs is not None and (call_id := issuing_call_id(node.inputs, tool_call)):
                return self._call_of(call_id, run)
            node = self._tree.get(node.parent)
        if call := self._calls.issuing_call(graph, tool_call):
            return call
        call_id = issuing_call_id(checkpointed_messages(), tool_call)
        return None if call_id is None else self._call_of(call_id, run)

    def _call_of(self, call_id: str, run: OpenRun) -> SentCall | None:
        """The call with this id. If an earlier process made it, its engine is known only if there is one sender."""
        with suppress(KeyError):
            return self._calls.get(call_id)
        sender = sole_sender()
        if sender is None:
            return None
        # The tool's own task is not part of the agent's location.
        metadata = {**run.metadata, "langgraph_path": None}
        return SentCall(call_id, locate(metadata, run.app.id, run.app.name).session, sender)

    def _wait_for_human(self, app: AppRun, call: SentCall | None) -> None:
        app.is_interrupted = True
        if call is not None and call.session not in app.waiting:
            app.waiting.add(call.session)
            call.sender.put(StallStart(call.session, INTERRUPT))

    def _cancel(self, runs: Iterable[OpenRun]) -> None:
        for run in runs:
            self._end(run.stall, "cancelled")

    def _end(self, stall: ReportedStall | None, status: ToolStatus) -> None:
        if stall is None:
            return
        event: Event
        if stall.call is None:
            event = StallEnd(stall.session, stall.kind)
        else:
            duration_s = min(self._clock() - stall.started_s, MAX_SECONDS)
            event = ToolEnd(stall.call.id, stall.tool_call or "", stall.kind, status, duration_s)
        stall.sender.put(event)


LIFECYCLE = Lifecycle()
"""All handlers of the process report to it, so that a second handler has no effect."""

CURRENT_CALL: ContextVar[UUID | None] = ContextVar("tokencake_current_call", default=None)
"""The latest LLM run started in this context, for `_stream` and `_astream`, which do not receive their run id."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=LIFECYCLE.reset_after_fork)


def _scopes(run: OpenRun) -> tuple[LookupScope, LookupScope]:
    task = task_namespace(run.metadata)
    return (run.app.id, task), (run.app.id, graph_namespace(task))


def _status(error: BaseException | None) -> ToolStatus:
    if error is None or isinstance(error, ParentCommand):  # a handoff to another agent
        return "ok"
    if isinstance(error, asyncio.CancelledError | GraphBubbleUp | GeneratorExit | KeyboardInterrupt):
        return "cancelled"
    return "error"
