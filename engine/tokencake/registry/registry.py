"""Registry of the agents that an engine serves: sessions, calls, tool calls and applications.

The registry joins two streams: what the scheduler does with calls (added, scheduled, preempted, finished) and what the
clients report between calls (events). It is bounded: beyond its bounds the tenant with the most memory loses its least
recently used records, and never one with a live call. All times are seconds on one monotonic clock that the caller
passes in as `now`.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Final, assert_never

from tokencake import protocol
from tokencake.protocol import Event, EventOutcome, Hint
from tokencake.registry.apply_events import ToolEvent, WaitEvent, note_tool, note_wait
from tokencake.registry.memory_account import Account, call_bytes, graph_bytes, waits_bytes
from tokencake.registry.metric_names import HistogramName
from tokencake.registry.record_store import Limits, RecordStore, kept_tool_bytes
from tokencake.registry.records import AppRecord, CallRecord, Session

MAX_OBSERVATIONS: Final = 10_000
"""Durations kept between two drains of the metrics; later ones are not observed until the next drain."""


class Registry(RecordStore):
    """Sessions, calls and stalls, from hints and events. Not thread-safe: it lives on the engine loop."""

    def __init__(self, limits: Limits | None = None, *, has_tenants: bool = False) -> None:
        super().__init__(limits, has_tenants=has_tenants)
        self._observed: defaultdict[HistogramName, list[float]] = defaultdict(list)
        self._requests: dict[str, CallRecord] = {}

    # --- the scheduler's side ---------------------------------------------------------------------

    def add_call(self, request_id: str, hint: Hint, prompt_tokens: int, now: float) -> bool:
        """A hinted request entered the engine. Requests of a session that share a call id are one call (`n`, a retry).

        A new call ends all stalls of its session, even where their end events were lost.

        Returns:
            Whether it is kept. It is not where its tenant's live calls take all the memory that the tenant may have.
        """
        tenant = hint.tenant
        if not self._has_room(tenant):
            return False
        session = self._touch_session(hint, now)
        session.ended = None
        if app := self.apps.get(hint.app or ""):
            app.ended = None
        session.arrived_s = now
        call_id = hint.call or request_id
        call = self.calls.get(call_id)
        if call is not None and call.hint.session != session.id:
            call_id, call = request_id, None  # the id is another session's
        self._end_stalls(session, now, but=call_id)
        if call is None or not call.live_requests:
            tools = call.tools if call else {}
            self._forget_call(call_id)
            call = CallRecord(call_id, hint, now, prompt_tokens, tools=tools)
            self._keep_call(call)
            self._charge(call, call_bytes(hint) + sum(kept_tool_bytes(call, name) for name in tools))
            self._note_stall(call)
            if len(session.calls) > self.limits.calls_per_session:
                self._forget_call(next((old.id for old in session.calls.values() if not old.live_requests), ""))
        call.live_requests.add(request_id)
        self.sessions[call.hint.session].live_requests += 1
        self._requests[request_id] = call
        if hint.graph:
            self._note_graph(self._accounts.of(tenant), hint.graph)
        self._has_room(tenant)
        self._expire(now)
        return True

    def schedule_call(self, request_id: str, device_tokens: int, host_tokens: int, now: float) -> None:
        """The request got its first slot; the tokens are those of its prompt found on the device and on the host."""
        call = self._requests.get(request_id)
        if call is None or call.scheduled_s is not None:
            return
        call.status, call.scheduled_s = "running", now
        call.cached_device_tokens, call.cached_host_tokens = device_tokens, host_tokens
        self.observe("queue_s", now - call.arrived_s)
        if call.hint.critical:
            self.observe("critical_queue_s", now - call.arrived_s)

    def preempt_call(self, request_id: str) -> None:
        """The request lost its blocks and waits again."""
        if call := self._requests.get(request_id):
            call.preemptions += 1

    def finish_call(self, request_id: str, output_tokens: int, is_aborted: bool, now: float) -> None:
        """The request left the engine. The call is over when its last request is."""
        call = self._requests.pop(request_id, None)
        if call is None:
            return
        call.live_requests.discard(request_id)
        self.sessions[call.hint.session].live_requests -= 1
        call.output_tokens += output_tokens
        call.is_completed |= not is_aborted
        if not call.live_requests:
            call.status, call.finished_s = ("finished" if call.is_completed else "aborted"), now
            self.counts["calls", call.status] += 1
            self._touch_session(call.hint, now)

    def hint_of(self, request_id: str) -> Hint | None:
        """The hint of a request in the engine; None where it has no valid one."""
        call = self._requests.get(request_id)
        return None if call is None else call.hint

    # --- the clients' side ------------------------------------------------------------------------

    def apply(self, event: Event, now: float) -> EventOutcome:
        """Apply one event. Order-independent and idempotent."""
        outcome = self._apply(event, now)
        if outcome != "unknown":  # another engine may know it; the caller that asked all of them counts it
            self.counts["events", event.type, outcome] += 1
        return outcome

    def _apply(self, event: Event, now: float) -> EventOutcome:
        match event:
            case protocol.ToolStart() | protocol.ToolProgress() | protocol.ToolEnd():
                outcome = self._on_tool(event, now)
            case protocol.StallStart() | protocol.StallEnd():
                outcome = self._on_wait(event, now)
            case protocol.SessionEnd():
                outcome = _end(self.sessions.get(event.session), event.status)
                self._end_sessions(event, now)
            case protocol.AppEnd():
                outcome = _end(self.apps.get(event.app), event.status)
                self._end_sessions(event, now)
            case protocol.Graph():
                outcome = self._learn_graph(event)
            case _:
                assert_never(event)
        return outcome

    def _on_tool(self, event: ToolEvent, now: float) -> EventOutcome:
        call = self.calls.get(event.call)
        if call is None:
            return "unknown"
        has_room = self._has_room(call.hint.tenant, but=call.hint.session)
        before = kept_tool_bytes(call, event.tool_call)
        outcome = note_tool(call, event, now, self.limits.tool_calls_per_call if has_room else 0)
        if outcome not in ("unknown", "duplicate", "invalid"):
            self._note_stall(call)
            self._touch_session(call.hint, now)
            self._charge(call, kept_tool_bytes(call, event.tool_call) - before)
            duration_s = call.tools[event.tool_call].duration_s
            if isinstance(event, protocol.ToolEnd) and duration_s is not None:
                self.observe("tool_s", duration_s)
        return outcome

    def _on_wait(self, event: WaitEvent, now: float) -> EventOutcome:
        session = self.sessions.get(event.session)
        if session is None:
            return "unknown"
        if not self._has_room(session.tenant, but=session.id) and event.kind not in session.waits:
            return "invalid"
        before = waits_bytes(session.waits)
        outcome = note_wait(session, event, now, self.limits.waits_per_session)
        self._accounts.add(session.tenant, "session", session.id, waits_bytes(session.waits) - before)
        return outcome

    def _end_stalls(self, session: Session, now: float, but: str | None = None) -> None:
        """Close all waits and tools of `session`, but for the tools of the call `but`.

        A tool closed this way has no status until its own end event arrives, which is applied then.
        """
        for wait in session.waits.values():
            if wait.ended_s is None:
                wait.ended_s = now
        for call_id in self._stalled_calls.intersection(session.calls):
            if call_id != but:
                call = session.calls[call_id]
                for tool in call.tools.values():
                    if tool.is_open:
                        tool.ended_s = now
                self._note_stall(call)

    def ended_by(self, event: Event) -> list[Session]:
        """The known sessions that `event` ends."""
        match event:
            case protocol.SessionEnd():
                names = {event.session}
            case protocol.AppEnd():
                app = self.apps.get(event.app)
                names = app.own_sessions if app is not None else set()
            case _:
                names = set()
        return [self.sessions[name] for name in sorted(names) if name in self.sessions]

    def _end_sessions(self, event: protocol.SessionEnd | protocol.AppEnd, now: float) -> None:
        for session in self.ended_by(event):
            session.ended = session.ended or event.status
            self._end_stalls(session, now)

    def _learn_graph(self, event: protocol.Graph) -> EventOutcome:
        if event.graph in self.graphs:
            return "duplicate"
        tenant = event.tenant
        self.graphs[event.graph] = event
        self._accounts.add(tenant, "graph", event.graph, graph_bytes(event))
        self._accounts.of(tenant).unknown_graphs.pop(event.graph, None)
        self._has_room(tenant)
        return "applied"

    def _note_graph(self, account: Account, graph: str) -> None:
        if graph in self.graphs:
            account.touch("graph", graph)
            return
        account.unknown_graphs.setdefault(graph)

    def unknown_graphs(self, tenant: str = "") -> list[str]:
        """Graph hashes that hints of `tenant` named without a `graph` event: the clients are asked for these."""
        return list(self._accounts.of(tenant).unknown_graphs)

    # --- numbers ----------------------------------------------------------------------------------

    @property
    def totals(self) -> dict[str, int]:
        """Number of records."""
        return {"sessions": len(self.sessions), "calls": len(self.calls), "live_calls": len(self._requests)}

    def totals_of(self, tenant: str) -> dict[str, int]:
        """Number of records of one tenant."""
        sessions = [self.sessions[name] for kind, name in self._accounts.records_of(tenant) if kind == "session"]
        return {
            "sessions": len(sessions),
            "calls": sum(len(session.calls) for session in sessions),
            "live_calls": sum(session.live_requests for session in sessions),
        }

    def observe(self, metric: HistogramName, seconds: float) -> None:
        """Keep one duration for the histogram `metric`."""
        if len(self._observed[metric]) < MAX_OBSERVATIONS:
            self._observed[metric].append(seconds)

    def drain(self) -> dict[str, Any]:
        """Metrics since the last drain.

        Returns:
            `counts` as `[[metric, *labels], n]`, `observed` durations in seconds, `gauges` as of now.
        """
        drained = {
            "counts": [[list(key), count] for key, count in self.counts.items()],
            "observed": dict(
                self._observed
            ),  # with `VLLM_ALLOW_INSECURE_SERIALIZATION` vLLM sends types, and not this one
            "gauges": {
                "sessions": len(self.sessions),
                "live_calls": len(self._requests),
                "stalled_calls": len(self._stalled_calls),
                "registry_bytes": self._accounts.total_bytes,
            },
        }
        self.counts.clear()
        self._observed = defaultdict(list)
        return drained


def _end(record: Session | AppRecord | None, status: protocol.ToolStatus) -> EventOutcome:
    if record is None:
        return "unknown"
    if record.ended:
        return "duplicate"
    record.ended = status
    return "applied"
