"""What is known of the applications whose calls wait and run? Age, service had, live calls, way to the end.

Ages are the engine's own: an application is as old as its first call *here*. Service is counted in device-seconds: the
share of the KV blocks that its calls held, times how long they held them. One device-second is the whole memory for
one second. A call without a hint is an application of its own.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from tokencake.lengths import AnswerLengths
from tokencake.paths import remaining_s
from tokencake.protocol import Graph, Hint

_MAX_KEPT: Final = 8_192
"""Applications without a live call that are remembered, so that their next call finds its place."""

_IDLE_S: Final = 3_600.0
_LEARNING_RATE: Final = 0.2
_FIRST_CALL_S: Final = 5.0
"""A call takes so long as far as is known before the first one has ended."""

_UNKNOWN_TOKENS: Final = 512
"""Length of an answer of which nothing is known; limits are often set far above what is written."""

_PATHS_LIVE: Final = 64
"""Answers learned after which the paths of a graph are measured anew."""


@dataclass(slots=True)
class Tenant:
    """All applications whose ids the proxy gave the same prefix. `served_s` is lifted to its peers' on return."""

    id: str
    served_s: float = 0.0
    live_calls: int = 0


@dataclass(slots=True)
class Application:
    """One application instance as the engine has seen it."""

    id: str
    tenant: Tenant
    first_seen_s: float
    touched_s: float
    served_s: float = 0.0
    is_critical: bool = False
    """Whether a call of it was on a critical path: somebody waits for its end."""
    live: dict[str, LiveCall] = field(default_factory=dict)
    visits: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often a call of this graph and node came."""


@dataclass(slots=True)
class LiveCall:
    """One request that waits or runs."""

    request_id: str
    app: Application
    hint: Hint | None
    arrived_s: float
    number: int
    """Arrivals before it: breaks ties."""
    prompt_tokens: int
    max_tokens: int
    remaining_s: float
    """Longest way from its begin to the end of its application; 0 where nobody has said."""
    expected_tokens: int
    """Length of the answer to be reckoned with."""
    is_running: bool = False
    started_s: float | None = None
    refused_s: float | None = None
    """When it was first passed over as the first in line, since it last ran."""
    charged_s: float = 0.0
    """Up to when its service has been counted."""
    preemptions: int = 0
    swaps: int = 0


class Applications:
    """Everything above, kept from what the scheduler does and what hints and graphs tell."""

    def __init__(self, graph_named: Callable[[str], Graph | None], *, tenant_mark: str, answer_quantile: float) -> None:
        self.calls: dict[str, LiveCall] = {}
        self.lengths = AnswerLengths()
        self.version = 0
        """Changes when a call comes or goes, or when one is started or stopped."""
        self._graph_named = graph_named
        self._tenant_mark = tenant_mark
        self._quantile = answer_quantile
        self._apps: OrderedDict[str, Application] = OrderedDict()
        self._tenants: dict[str, Tenant] = {}
        self._arrivals = 0
        self._call_s = _FIRST_CALL_S
        """Mean seconds of a call from its first slot to its end."""
        self._node_s: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._node_visits: dict[tuple[str, str], float] = {}
        self._learned = 0
        self._paths: dict[str, tuple[int, dict[str, float]]] = {}

    @property
    def call_s(self) -> float:
        """Seconds that a call takes once it runs, on average of late."""
        return self._call_s

    @property
    def known_apps(self) -> int:
        """Applications remembered."""
        return len(self._apps)

    def active_tenants(self) -> list[Tenant]:
        """Those with a live call."""
        return [tenant for tenant in self._tenants.values() if tenant.live_calls]

    # --- the life of a call -----------------------------------------------------------------------

    def add(self, request_id: str, hint: Hint | None, *, prompt_tokens: int, max_tokens: int, now: float) -> LiveCall:
        """A request entered the engine."""
        app = self._application(request_id, hint, now)
        self._arrivals += 1
        call = LiveCall(
            request_id,
            app,
            hint,
            now,
            self._arrivals,
            prompt_tokens,
            max_tokens,
            remaining_s=self._remaining_s(hint),
            expected_tokens=self._expected_tokens(hint, max_tokens),
        )
        app.is_critical |= hint is not None and hint.critical is True
        if hint is not None and hint.graph and hint.node:
            app.visits[hint.graph, hint.node] += 1
        self.calls[request_id] = app.live[request_id] = call
        app.tenant.live_calls += 1
        self.version += 1
        self._bound(now)
        return call

    def start(self, request_id: str, now: float) -> None:
        """The request got a slot."""
        if (call := self.calls.get(request_id)) is not None and not call.is_running:
            call.is_running, call.charged_s, call.refused_s = True, now, None
            call.started_s = now if call.started_s is None else call.started_s
            self.version += 1

    def stop(self, request_id: str) -> None:
        """The request lost its blocks and waits again."""
        if (call := self.calls.get(request_id)) is not None:
            call.is_running = False
            call.preemptions += 1
            self.version += 1

    def charge(self, request_id: str, share: float, now: float) -> None:
        """The request has held this share of the blocks since it was last charged."""
        if (call := self.calls.get(request_id)) is not None and call.is_running:
            device_s = share * (now - call.charged_s)
            call.charged_s = now
            call.app.served_s += device_s
            call.app.tenant.served_s += device_s

    def end(self, request_id: str, output_tokens: int, *, is_aborted: bool, now: float) -> None:
        """The request left the engine."""
        call = self.calls.pop(request_id, None)
        if call is None:
            return
        app = call.app
        del app.live[request_id]
        app.touched_s = now
        app.tenant.live_calls -= 1
        self.version += 1
        if not is_aborted and call.started_s is not None:
            self._learn(call, output_tokens, now)

    # --- what is learned --------------------------------------------------------------------------

    def _learn(self, call: LiveCall, output_tokens: int, now: float) -> None:
        took_s = now - (now if call.started_s is None else call.started_s)
        self._call_s += _LEARNING_RATE * (took_s - self._call_s)
        self._learned += 1
        self.lengths.learn(_agent(call.hint), output_tokens)
        if call.hint is not None and call.hint.graph and call.hint.node:
            key = call.hint.graph, call.hint.node
            before = self._node_s.get(key, took_s)
            self._node_s[key] = before + _LEARNING_RATE * (took_s - before)
            visits = float(call.app.visits[key])
            seen = self._node_visits.get(key, visits)
            self._node_visits[key] = max(seen + _LEARNING_RATE * (visits - seen), 1.0)
            self._node_s.move_to_end(key)
            if len(self._node_s) > _MAX_KEPT:
                oldest, _ = self._node_s.popitem(last=False)
                self._node_visits.pop(oldest, None)

    def _expected_tokens(self, hint: Hint | None, max_tokens: int) -> int:
        learned = self.lengths.quantile(_agent(hint), self._quantile)
        told = hint.expected_output_tokens if hint is not None else None
        # What was measured outweighs what is claimed, and no answer outgrows its limit.
        known = learned if learned is not None else told
        return min(_UNKNOWN_TOKENS if known is None else known, max_tokens)

    def _remaining_s(self, hint: Hint | None) -> float:
        if hint is None:
            return 0.0
        graph = self._graph_named(hint.graph) if hint.graph else None
        if graph is None or hint.node not in graph.nodes:
            return (hint.remaining or 0) * self._call_s
        measured_at, paths = self._paths.get(graph.graph, (-_PATHS_LIVE, {}))
        if self._learned - measured_at >= _PATHS_LIVE:
            paths = remaining_s(graph.nodes, graph.edges, lambda node: self._cost_s(graph.graph, node))
            self._paths[graph.graph] = self._learned, paths
            if len(self._paths) > _PATHS_LIVE:
                del self._paths[next(iter(self._paths))]
        return paths[hint.node]

    def _cost_s(self, graph: str, node: str) -> float:
        return self._node_s.get((graph, node), self._call_s) * self._node_visits.get((graph, node), 1.0)

    # --- who belongs together ---------------------------------------------------------------------

    def _application(self, request_id: str, hint: Hint | None, now: float) -> Application:
        if hint is None:
            return Application(f"request {request_id}", self._tenant(""), now, now)
        name = hint.app or hint.session
        tenant = self._tenant(tenant_of(name, self._tenant_mark))
        app = self._apps.get(name)
        if app is None:
            app = self._apps[name] = Application(name, tenant, now, now)
        app.touched_s = now
        self._apps.move_to_end(name)
        return app

    def _tenant(self, name: str) -> Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = Tenant(name)
        if not tenant.live_calls:
            # Time spent idle is no credit: who comes back stands where the least served of the others stands.
            others = [other.served_s for other in self._tenants.values() if other.live_calls]
            tenant.served_s = max(tenant.served_s, min(others, default=0.0))
        return tenant

    def _bound(self, now: float) -> None:
        for _ in range(4):
            app = next(iter(self._apps.values()), None)
            if app is None or not (len(self._apps) > _MAX_KEPT + len(self.calls) or now - app.touched_s > _IDLE_S):
                return
            if app.live:
                self._apps.move_to_end(app.id)
                app.touched_s = now
                continue
            del self._apps[app.id]
            self._forget_tenant(app.tenant)

    def _forget_tenant(self, tenant: Tenant) -> None:
        if len(self._tenants) > _MAX_KEPT and not tenant.live_calls:
            self._tenants.pop(tenant.id, None)


def tenant_of(name: str, mark: str) -> str:
    """The tenant whose prefix the proxy put before an id; "" where there is none."""
    before, found, _ = name.partition(mark)
    return before if found else ""


def _agent(hint: Hint | None) -> str:
    if hint is None:
        return ""
    return f"{hint.graph or ''}/{hint.node or hint.agent or ''}"
