"""Store of the records of sessions, calls, applications and graphs, bounded in count, memory and age.

Beyond a global bound, the tenant with the most memory loses its least recently used records. Beyond its share, a tenant
loses its own. A call that is in the engine is never forgotten.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from typing import Final, assert_never

from tokencake import protocol
from tokencake.protocol import Hint
from tokencake.protocol.parsing import count, number, optional
from tokencake.registry.memory_account import APP_BYTES, SESSION_BYTES, Account, Accounts, text_bytes, tool_bytes
from tokencake.registry.metric_names import CountKey
from tokencake.registry.records import AppRecord, CallRecord, Session, lifetime_of
from tokencake.registry.timeline import TICK_S, Timeline, after

_STEPS: Final = 8
"""Records examined for eviction for each one that is added."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the registry: the section `registry` of the settings."""

    kept_mib: float = optional(number(1.0, 1e6), 256.0)
    """Memory of all records, by estimate."""
    tenant_share: float = optional(number(0.01, 1.0), 0.25)
    """Of `kept_mib`, the most that one of several tenants may take."""
    sessions: int = optional(count(10_000_000), 4_096)
    calls: int = optional(count(10_000_000), 16_384)
    calls_per_session: int = optional(count(1_000_000), 256)
    tool_calls_per_call: int = optional(count(10_000), 128)
    waits_per_session: int = optional(count(1_000), 16)
    idle_s: float = optional(number(1.0, 1e9), 3_600.0)
    """Seconds without use after which a session or application is forgotten."""


class RecordStore:
    """The records, their order of use and their memory account."""

    def __init__(self, limits: Limits | None = None, *, has_tenants: bool = False) -> None:
        self.limits = limits or Limits()
        self.sessions: OrderedDict[str, Session] = OrderedDict()
        self.calls: OrderedDict[str, CallRecord] = OrderedDict()
        self.apps: OrderedDict[str, AppRecord] = OrderedDict()
        self.graphs: dict[str, protocol.Graph] = {}
        self.counts: Counter[CountKey] = Counter()
        """Increments since the last `drain`: `(metric, *label values)` -> number."""
        self._has_tenants = has_tenants
        self._accounts = Accounts()
        self._stalled_calls: set[str] = set()
        self._timeline: Timeline[CallRecord] = Timeline()
        self._last_order_s = 0.0

    def _touch_session(self, hint: Hint, now: float) -> Session:
        session = self.sessions.get(hint.session)
        if session is None:
            session = self.sessions[hint.session] = Session(hint.session, hint.agent, hint.app, hint.tenant, now)
            self._accounts.add(hint.tenant, "session", session.id, SESSION_BYTES + text_bytes(session.id))
        account = self._accounts.of(session.tenant)
        session.touched_s = now
        if hint.app and session.app != hint.app and (former := self.apps.get(session.app or "")):
            former.own_sessions.discard(session.id)
        session.agent, session.app = hint.agent or session.agent, hint.app or session.app
        self.sessions.move_to_end(hint.session)
        account.touch("session", session.id)
        if hint.app:
            app = self.apps.get(hint.app)
            if app is None:
                app = self.apps[hint.app] = AppRecord(now - (hint.app_started_ago_s or 0.0), now, session.tenant)
                self._accounts.add(session.tenant, "app", hint.app, APP_BYTES + text_bytes(hint.app))
            app.touched_s = now
            self.apps.move_to_end(hint.app)
            account.touch("app", hint.app)
            if lifetime_of(hint) == hint.app:
                app.own_sessions.add(session.id)
        return session

    def _charge(self, call: CallRecord, size: int) -> None:
        """Add `size` bytes to `call`, as a part of its session."""
        call.kept_bytes += size
        self._accounts.add(call.hint.tenant, "session", call.hint.session, size)

    def _has_room(self, tenant: str, but: str | None = None) -> bool:
        """Whether `tenant` may add records, after old ones were forgotten; none of the session `but` is.

        A call adds a bounded number of records, so a bounded number of steps is enough.
        """
        own = self._accounts.of(tenant)
        for _ in range(_STEPS):
            over = self._over(own)
            if over is None:
                return True
            self._forget_oldest(over, but)
        return self._over(own) is not own

    def _over(self, own: Account) -> Account | None:
        """The account that must lose records: `own` beyond its share, or the largest beyond a global bound."""
        limits = self.limits
        kept_bytes = limits.kept_mib * 2**20
        if self._has_tenants and own.total_bytes > limits.tenant_share * kept_bytes:
            return own
        is_over = (
            self._accounts.total_bytes > kept_bytes
            or len(self.sessions) > limits.sessions
            or len(self.apps) > limits.sessions
            or len(self.calls) > limits.calls
        )
        return self._accounts.largest if is_over else None

    def _forget_oldest(self, account: Account, but: str | None) -> None:
        """Forget the least recently used record; of a session that is in use, its oldest finished call."""
        kind, name = account.oldest or ("session", "")
        match kind:
            case "session":
                session = self.sessions[name]
                if not session.live_requests and name != but:
                    self._forget_session(session)
                    return
                account.touch("session", name)
                old = next((call for call in session.calls.values() if not call.live_requests), None)
                if old is not None and name != but:
                    self._forget_call(old.id)
                    self.counts["forgotten", "call"] += 1
            case "app":
                self._forget_app(name)
            case "graph":
                graph = self.graphs.pop(name)
                self._accounts.remove(graph.tenant, "graph", name)
                self.counts["forgotten", "graph"] += 1
            case _:
                assert_never(kind)

    def _expire(self, now: float) -> None:
        """Forget records that were idle for too long, oldest first; amortised O(1) per added call."""
        for _ in range(_STEPS):
            session = next(iter(self.sessions.values()), None)
            if session is None or now - session.touched_s <= self.limits.idle_s:
                break
            if session.live_requests:
                self.sessions.move_to_end(session.id)
            else:
                self._forget_session(session)
        for _ in range(_STEPS):
            name, app = next(iter(self.apps.items()), ("", None))
            if app is None or now - app.touched_s <= self.limits.idle_s:
                break
            self._forget_app(name)

    def _forget_session(self, session: Session) -> None:
        for call_id in list(session.calls):
            self._forget_call(call_id)
        del self.sessions[session.id]
        self._accounts.remove(session.tenant, "session", session.id)
        if app := self.apps.get(session.app or ""):
            app.own_sessions.discard(session.id)
        self.counts["forgotten", "session"] += 1

    def _forget_app(self, name: str) -> None:
        self._accounts.remove(self.apps.pop(name).tenant, "app", name)
        self.counts["forgotten", "app"] += 1

    def _note_stall(self, call: CallRecord) -> None:
        if any(tool.is_open for tool in call.tools.values()):
            self._stalled_calls.add(call.id)
        else:
            self._stalled_calls.discard(call.id)

    def _keep_call(self, call: CallRecord) -> None:
        """Keep a new call, of a session that is known."""
        call.order_s = self._last_order_s = after(call.arrived_s, self._last_order_s)
        self.calls[call.id] = call
        self.sessions[call.hint.session].calls[call.id] = call
        for timeline in (self._timeline, self._accounts.of(call.hint.tenant).calls):
            timeline.add(call.order_s, call)

    def _forget_call(self, call_id: str) -> None:
        call = self.calls.pop(call_id, None)
        self._stalled_calls.discard(call_id)
        if call is not None:
            for timeline in (self._timeline, self._accounts.of(call.hint.tenant).calls):
                timeline.remove(call.order_s)
            self.sessions[call.hint.session].calls.pop(call_id, None)
            self._charge(call, -call.kept_bytes)

    def newest_calls(
        self, tenant: str | None = None, session: str | None = None, before_s: float | None = None
    ) -> Iterable[tuple[float, CallRecord | None]]:
        """Calls of one session, of one tenant or (None) of all, each with its `order_s`; None stands for a gap."""
        if session is None:
            calls = self._timeline if tenant is None else self._accounts.calls_of(tenant)
            return calls.newest_first(before_s)
        found = self.sessions.get(session)
        if found is None or tenant not in (None, found.tenant):
            return ()
        end_s = inf if before_s is None else before_s - TICK_S / 4
        return ((call.order_s, call) for call in reversed(found.calls.values()) if call.order_s < end_s)

    def is_stalled(self, session: Session) -> bool:
        """Whether its agent waits for a tool or for something else, as far as is known."""
        return any(wait.ended_s is None for wait in session.waits.values()) or not self._stalled_calls.isdisjoint(
            session.calls
        )


def kept_tool_bytes(call: CallRecord, tool_call: str) -> int:
    """Bytes of a tool call of `call`; 0 where it is not known."""
    tool = call.tools.get(tool_call)
    return 0 if tool is None else tool_bytes(tool_call, tool.tool, tool.stages) + text_bytes(tool.stage)
