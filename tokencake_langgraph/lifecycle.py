"""What do the runs of this process mean for the engines?

Runs open and close as LangChain reports them; out come hints for the LLM calls, and events for what happens
between them: a tool runs, plain code keeps a session waiting, a human is asked, the application is over.
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
from tokencake_langgraph.calls import Call, CallTable, Scope, asker_in, checkpointed_messages
from tokencake_langgraph.identity import graph_namespace, locate, task_namespace, wire_text
from tokencake_langgraph.run_tree import App, Run, RunTree, Stall
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
        self.forget_lock()

    def forget_lock(self) -> None:
        """In a forked child: another thread of the parent may have held the lock."""
        self._lock = threading.RLock()

    @property
    def open_runs(self) -> int:
        """Runs that were reported to start and not yet to end."""
        return len(self._tree)

    def is_open(self, run_id: UUID) -> bool:
        """Whether this run was reported to start and not yet to end."""
        with self._lock:
            return self._tree.get(run_id) is not None

    # --- chains: graphs, nodes and all other runnables ----------------------------------------------

    def open_chain(
        self, run_id: UUID, parent_id: UUID | None, name: str | None, metadata: Mapping[str, Any], inputs: Any
    ) -> None:
        """A chain starts. Its inputs are kept while it runs: a node's messages tell who asked for a tool."""
        with self._lock:
            self._tree.open(run_id, parent_id, "chain", metadata, self._clock(), name, inputs)

    def close_chain(self, run_id: UUID, error: BaseException | None = None) -> None:
        """A chain ended, and with it whatever below it was not reported to end."""
        with self._lock:
            closed = self._tree.close(run_id)
            if not closed:
                return
            run = closed[0]
            self._cancel(closed[1:])
            if isinstance(error, GraphInterrupt):
                place = locate(run.metadata, run.app.id, run.app.name)
                self._wait_for_human(run.app, run.app.last_calls.get(place.namespace))
            if run.is_root and not run.app.is_interrupted:
                for sender in run.app.senders:
                    sender.put(AppEnd(run.app.id, status=_status(error)))

    # --- LLM calls ----------------------------------------------------------------------------------

    def open_call(
        self, run_id: UUID, parent_id: UUID | None, metadata: Mapping[str, Any], *, is_structured_output: bool
    ) -> None:
        """An LLM call starts; which model will make it is not known yet."""
        with self._lock:
            run = self._tree.open(run_id, parent_id, "call", metadata, self._clock())
            if run is not None:
                run.is_structured_output = is_structured_output

    def claim_call(
        self,
        run_id: UUID,
        sender: EventSender,
        tools: Sequence[str],
        estimates: Mapping[str, float],
        importance: float | None = None,
        expected_output_tokens: int | None = None,
    ) -> Hint | None:
        """The call, `tools` bound to it, is about to be sent to `sender`'s engine. None if no such call is open."""
        with self._lock:
            run = self._tree.get(run_id)
            if run is None:
                return None
            app = run.app
            place = locate(run.metadata, app.id, app.name)
            call = Call(str(run_id), place.session, sender, _scopes(run), estimates)
            run.call = call
            self._calls.add(call)
            app.senders.add(sender)
            app.last_calls[place.namespace] = call
            app.waiting.discard(place.session)
            tool = self._tree.nearest_tool(run.parent)
            stall = tool.stall if tool is not None else None
            # The schema of a structured answer is bound like a tool, but nothing will run.
            expected = () if run.is_structured_output else tools[:MAX_TOOLS]
            return Hint(
                session=place.session,
                call=call.id,
                app=app.id,
                app_started_ago_s=min(self._clock() - app.started_s, MAX_SECONDS),
                agent=place.agent,
                node=place.node,
                parent_call=stall.call.id if stall is not None and stall.call is not None else None,
                parent_tool_call=stall.tool_call if stall is not None else None,
                fan_index=run.fan_index,
                importance=importance,
                expects_tools={wire_text(name): estimates.get(name) for name in expected} or None,
                # With tools the agent's loop comes back with a longer prompt. Of a call without, nothing is known.
                reuse="extends" if expected else "unknown",
                expected_output_tokens=expected_output_tokens,
            )

    def close_call(self, run_id: UUID, tool_calls: Iterable[str] = ()) -> None:
        """An LLM call ended, asking for these tool calls."""
        with self._lock:
            closed = self._tree.close(run_id)
            if not closed:
                return
            self._cancel(closed[1:])
            call = closed[0].call
            if call is not None:
                self._calls.link(call, tool_calls)
            else:
                self._calls.add_stranger(str(run_id))

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
        """A tool starts: the call that asked for it stalls, or, if none did, the session of its node."""
        with self._lock:
            run = self._tree.open(run_id, parent_id, "tool", metadata, self._clock(), name)
            if run is None:
                return
            call = self._asker(run, tool_call) if tool_call else None
            if call is not None and tool_call:
                stall = Stall(call.sender, call.session, wire_text(name), self._clock(), call, wire_text(tool_call))
                run.stall = stall
                expected_s = call.estimates.get(name, estimate_s)
                stall.sender.put(ToolStart(call.id, stall.tool_call or "", stall.kind, expected_s))
            elif not tool_call:
                run.stall = self.start_stall(parent_id, metadata, f"tool:{name}", estimate_s)

    def close_tool(self, run_id: UUID, error: BaseException | None = None, *, is_failure: bool = False) -> None:
        """A tool ended; `is_failure` if it turned its error into an answer for the model."""
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
    ) -> Stall | None:
        """The session that works below run `parent_id` does something else; None if it has made no call here.

        None as well inside of a tool: the session is stalled in that one already.
        """
        with self._lock:
            parent = self._tree.get(parent_id)
            if parent is None or self._tree.nearest_tool(parent_id) is not None:
                return None
            place = locate(metadata, parent.app.id, parent.app.name)
            call = self._calls.latest_of(place.session)
            if call is None:
                return None
            stall = Stall(call.sender, place.session, wire_text(kind), self._clock())
            stall.sender.put(StallStart(stall.session, stall.kind, estimate_s))
            return stall

    def end_stall(self, stall: Stall) -> None:
        """What `start_stall` began is over."""
        self._end(stall, "ok")

    # --- parts, all under the lock ----------------------------------------------------------------------

    def _asker(self, run: Run, tool_call: str) -> Call | None:
        """The call that asked for `tool_call`, from the same task outwards."""
        task, graph = _scopes(run)
        if call := self._calls.asker(task, tool_call):
            return call
        node = self._tree.get(run.parent)
        while node is not None and task_namespace(node.metadata) == task[1]:
            if node.inputs is not None and (call_id := asker_in(node.inputs, tool_call)):
                return self._call_of(call_id, run)
            node = self._tree.get(node.parent)
        if call := self._calls.asker(graph, tool_call):
            return call
        call_id = asker_in(checkpointed_messages(), tool_call)
        return None if call_id is None else self._call_of(call_id, run)

    def _call_of(self, call_id: str, run: Run) -> Call | None:
        """The call with this id. If an earlier process made it, its engine is known only where there is but one."""
        with suppress(KeyError):
            return self._calls.get(call_id)
        sender = sole_sender()
        if sender is None:
            return None
        # The tool's own task is no part of the place where the agent made its calls.
        metadata = {**run.metadata, "langgraph_path": None}
        return Call(call_id, locate(metadata, run.app.id, run.app.name).session, sender)

    def _wait_for_human(self, app: App, call: Call | None) -> None:
        app.is_interrupted = True
        if call is not None and call.session not in app.waiting:
            app.waiting.add(call.session)
            call.sender.put(StallStart(call.session, INTERRUPT))

    def _cancel(self, runs: Iterable[Run]) -> None:
        for run in runs:
            self._end(run.stall, "cancelled")

    def _end(self, stall: Stall | None, status: ToolStatus) -> None:
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
"""What all handlers of the process report to, so that a second handler counts nothing twice."""

CURRENT_CALL: ContextVar[UUID | None] = ContextVar("tokencake_current_call", default=None)
"""The latest LLM run started in this context: `_stream` and `_astream` are not told theirs."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=LIFECYCLE.forget_lock)


def _scopes(run: Run) -> tuple[Scope, Scope]:
    task = task_namespace(run.metadata)
    return (run.app.id, task), (run.app.id, graph_namespace(task))


def _status(error: BaseException | None) -> ToolStatus:
    if error is None or isinstance(error, ParentCommand):  # a hand-over to another agent
        return "ok"
    if isinstance(error, asyncio.CancelledError | GraphBubbleUp | GeneratorExit | KeyboardInterrupt):
        return "cancelled"
    return "error"
