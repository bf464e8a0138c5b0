"""Tracker of the applications with waiting or running requests: age, service received, live requests, remaining path.

Ages are the engine's own: an application is as old as its first request *here*. Service is counted in device-seconds:
the share of the KV blocks that its requests held, times how long they held them. One device-second is the whole memory
for one second. A request without a hint is an application of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf
from typing import Final

from tokencake.forecast.fair_lru import FairLRU
from tokencake.forecast.graph_stats import PathCosts
from tokencake.forecast.output_lengths import OutputLengthHistory
from tokencake.forecast.roles import NodeKey, Role, role_of
from tokencake.protocol import Graph, Hint
from tokencake.space_scheduler.branches import Branch, StalledBranches, slacks_s
from tokencake.space_scheduler.tenant_table import Tenant, TenantTable

_MAX_KEPT: Final = 8_192
"""Applications without a live request that are remembered for their next one."""

_IDLE_S: Final = 3_600.0
_UNKNOWN_TOKENS: Final = 512
"""Output length where nothing is known; `max_tokens` is often far above what is generated."""

_LEAST_LIFE_S: Final = 60.0
"""Minimum time that a join waits for a stalled branch; after `_LONG_GAP` times the usual gap the branch is over."""
_LONG_GAP: Final = 4.0


@dataclass(slots=True)
class Application:
    """One application instance as the engine has seen it."""

    id: str
    tenant: Tenant
    first_seen_s: float
    touched_s: float
    served_s: float = 0.0
    is_critical: bool = False
    """Whether a call of it was on a critical path."""
    live: dict[str, LiveRequest] = field(default_factory=dict)
    root: str = ""
    """The agent of its first call."""
    visits: Counter[NodeKey] = field(default_factory=Counter)
    """Calls by graph and node."""
    answers: Counter[str] = field(default_factory=Counter)
    """Live requests of each live call: several with `n` > 1."""
    stalled: StalledBranches = field(default_factory=StalledBranches)
    measured_version: int = -1
    """`AppTracker.version` when its slack was measured."""


@dataclass(slots=True)
class LiveRequest:
    """One request that waits or runs."""

    request_id: str
    app: Application
    hint: Hint | None
    arrived_s: float
    number: int
    """Arrivals before it: breaks ties."""
    prompt_tokens: int
    max_tokens: int
    branch: Branch | None
    """Where it is in its application; None without a hint."""
    service_s: float
    """Seconds of calls on the longest path from its start to the end of its application; 0 where unknown."""
    expected_tokens: int
    """Expected output length."""
    is_running: bool = False
    started_s: float | None = None
    first_skipped_s: float | None = None
    """When it was first bypassed as the head of the queue, since it last ran."""
    accounted_s: float = 0.0
    """Time up to which its service is accounted."""
    preemptions: int = 0
    swaps: int = 0
    """How often it was swapped out for a request of a more senior application."""
    swapped_for: Application | None = None
    """That application, until it runs again."""
    swap_failed: bool = False
    """True once a swap freed room for it and it did not start: no request is swapped out for it again."""
    slack_s: float | None = None
    """As of the last time that `AppTracker.slack_s` measured its application."""

    @property
    def remaining_s(self) -> float:
        """Longest path from its start to the end of its application, tools included; 0 where unknown."""
        return 0.0 if self.branch is None else self.branch.remaining_s


class AppTracker:
    """Applications and live requests, from what the scheduler does and what hints and graphs say."""

    def __init__(self, graph_named: Callable[[str], Graph | None], *, answer_quantile: float) -> None:
        self.calls: dict[str, LiveRequest] = {}
        self.lengths = OutputLengthHistory()
        self.version = 0
        """Changes when a request is added, ends, starts or is preempted."""
        self.tenants = TenantTable(graph_named)
        self._quantile = answer_quantile
        self._apps: FairLRU[str, Application] = FairLRU(inf)
        self._arrivals = 0

    @property
    def known_apps(self) -> int:
        """Applications remembered."""
        return len(self._apps)

    # --- the life of a call -----------------------------------------------------------------------

    def add(
        self,
        request_id: str,
        hint: Hint | None,
        *,
        prompt_tokens: int,
        max_tokens: int,
        now: float,
        tenant: str = "",
    ) -> LiveRequest:
        """A request of `tenant` entered the engine."""
        app = self._application(request_id, hint, tenant, now)
        self._arrivals += 1
        name = request_id if hint is None or hint.call is None else hint.call
        app.answers[name] += 1
        branch, service_s = (None, 0.0) if hint is None else self._branch(app, name, hint, now)
        call = LiveRequest(
            request_id,
            app,
            hint,
            now,
            self._arrivals,
            prompt_tokens,
            max_tokens,
            branch,
            service_s,
            expected_tokens=self._expected_tokens(role_of(hint, tenant), hint, max_tokens),
        )
        app.is_critical |= hint is not None and hint.critical is True
        self.calls[request_id] = app.live[request_id] = call
        app.tenant.live_calls += 1
        self.version += 1
        self._bound(now)
        return call

    def start(self, request_id: str, now: float) -> None:
        """The request got a slot."""
        if (call := self.calls.get(request_id)) is not None and not call.is_running:
            call.is_running, call.accounted_s, call.first_skipped_s, call.swapped_for = True, now, None, None
            call.started_s = now if call.started_s is None else call.started_s
            self.version += 1

    def stop(self, request_id: str) -> None:
        """The request lost its blocks and waits again."""
        if (call := self.calls.get(request_id)) is not None:
            call.is_running = False
            call.preemptions += 1
            self.version += 1

    def account_service(self, request_id: str, share: float, now: float) -> None:
        """The request has held this share of the blocks since its service was last accounted."""
        if (call := self.calls.get(request_id)) is not None and call.is_running:
            device_s = share * (now - call.accounted_s)
            call.accounted_s = now
            call.app.served_s += device_s
            call.app.tenant.served_s += device_s

    def end(self, request_id: str, output_tokens: int, *, is_aborted: bool, now: float) -> None:
        """The request left the engine."""
        call = self.calls.pop(request_id, None)
        if call is None:
            return
        app = call.app
        del app.live[request_id]
        app.answers -= Counter([request_id if call.branch is None else call.branch.call])
        app.touched_s = now
        app.tenant.live_calls -= 1
        self.version += 1
        if not is_aborted and call.started_s is not None:
            self._learn(call, now - call.started_s, output_tokens)
            self._stall(call, now)

    # --- what is learned --------------------------------------------------------------------------

    def _learn(self, call: LiveRequest, took_s: float, output_tokens: int) -> None:
        tenant = call.app.tenant
        self.lengths.learn(role_of(call.hint, tenant.id), output_tokens)
        tenant.learn_call(took_s, output_tokens)
        node_key = Role().node_key(tenant.id) if call.branch is None else call.branch.node_key
        tenant.graph_stats.learn_call(node_key, took_s, call.app.visits[node_key])

    def _expected_tokens(self, role: Role, hint: Hint | None, max_tokens: int) -> int:
        learned = self.lengths.quantile(role, self._quantile)
        claimed = hint.expected_output_tokens if hint is not None else None
        # A measured length outweighs a claimed one, and no output exceeds its limit.
        known = learned if learned is not None else claimed
        return min(_UNKNOWN_TOKENS if known is None else known, max_tokens)

    # --- where a call is in its application ---------------------------------------------------------

    def _branch(self, app: Application, name: str, hint: Hint, now: float) -> tuple[Branch, float]:
        """The branch of the arriving call `name`, and the seconds of calls on its remaining path."""
        if not app.visits:
            app.root = hint.agent or ""
        node_key = role_of(hint).node_key(app.tenant.id, app.root)
        node, graph_stats = node_key[1], app.tenant.graph_stats
        path_costs = graph_stats.path_costs(node_key[0])
        if app.answers[name] == 1:
            app.visits[node_key] += 1
            cause, is_sure = app.stalled.arrive(hint.session, node_key, hint.join, hint.parent_call, path_costs)
            if cause is not None:
                graph_stats.learn_successor(cause.node_key, node_key, now - cause.at_s if is_sure else None)
        branch = Branch(name, hint.session, node_key, hint.join, hint.parent_call, now, 0.0)
        if (
            path_costs is None
            or node not in path_costs.remaining_s
            or (hint.remaining is not None and not path_costs.is_described)
        ):
            claimed_s = (hint.remaining or 0) * graph_stats.call_s
            return replace(branch, remaining_s=claimed_s), claimed_s
        # The expected rounds of a cycle, less those that the application has had.
        rounds = {other: app.visits[node_key[0], other] - (other == node) for other in path_costs.cycle(node)}
        service_s, gaps_s = path_costs.service_s[node], path_costs.remaining_s[node] - path_costs.service_s[node]
        for other, count in rounds.items():
            service_s -= count * graph_stats.service_s((node_key[0], other))
            gaps_s -= count * graph_stats.gap_s((node_key[0], other))
        service_s, gaps_s = max(service_s, graph_stats.service_s(node_key)), max(gaps_s, 0.0)
        caller_s = self._remaining_of_caller(app, branch, path_costs)
        return replace(branch, remaining_s=service_s + gaps_s + caller_s), service_s + caller_s

    def _remaining_of_caller(self, app: Application, branch: Branch, path_costs: PathCosts) -> float:
        """Remaining path of the caller of a sub-agent, where the graph does not lead back to the caller."""
        parent = app.stalled.of_call(branch.parent)
        if parent is None:
            return 0.0
        (graph, node), (parent_graph, parent_node) = branch.node_key, parent.node_key
        leads_back = graph == parent_graph and parent_node in path_costs.topology.descendants[node]
        return 0.0 if leads_back else parent.remaining_s

    def _stall(self, call: LiveRequest, now: float) -> None:
        """The call has finished: its branch is stalled, unless the hint says that nothing will follow."""
        branch, hint = call.branch, call.hint
        if branch is None or hint is None or call.app.answers[branch.call]:
            return
        graph_stats = call.app.tenant.graph_stats
        gap_s = graph_stats.gap_s(branch.node_key)
        is_over = hint.reuse == "final" and hint.join is None
        left_s = max(gap_s, branch.remaining_s - graph_stats.service_s(branch.node_key))
        until_s = now if is_over else now + max(_LEAST_LIFE_S, _LONG_GAP * gap_s)
        call.app.stalled.leave(replace(branch, at_s=now, remaining_s=left_s, until_s=until_s))

    def slack_s(self, call: LiveRequest, now: float) -> float | None:
        """Slack of its branch at its next join; None where it has no siblings.

        The slack of an application is measured when it is asked for, and again after `version` has changed.
        """
        app = call.app
        if app.measured_version != self.version:
            app.measured_version = self.version
            self._measure_slack(app, now)
        return call.slack_s

    def is_critical(self, call: LiveRequest, now: float) -> bool:
        """Whether its application waits for it: by its slack where it has siblings, else by its hint."""
        slack_s = self.slack_s(call, now)
        return slack_s == 0.0 if slack_s is not None else call.hint is not None and call.hint.critical is True

    def _measure_slack(self, app: Application, now: float) -> None:
        live = [(call, call.branch) for call in app.live.values() if call.branch is not None]
        parents = {branch.parent for _, branch in live}
        stalled = [branch for branch in app.stalled.living(now) if branch.call not in parents]
        branches = [branch for _, branch in live]
        for (call, _), slack_s in zip(
            live, slacks_s([*branches, *stalled], app.tenant.graph_stats.path_costs, now), strict=False
        ):
            call.slack_s = slack_s

    # --- applications -----------------------------------------------------------------------------

    def _application(self, request_id: str, hint: Hint | None, tenant: str, now: float) -> Application:
        owner = self.tenants.arrive(tenant)
        if hint is None:
            return Application(f"request {request_id}", owner, now, now)
        name = hint.app or hint.session
        app = self._apps.get(name) or Application(name, owner, now, now)
        app.touched_s = now
        self._apps.put(name, app, tenant)
        return app

    def _bound(self, now: float) -> None:
        """Forget applications that are idle for too long; where there are too many, of the tenant that has most."""
        for _ in range(4):
            is_crowded = len(self._apps) > _MAX_KEPT + len(self.calls)
            name = self._apps.oldest_of_most() if is_crowded else next(iter(self._apps), None)
            app = None if name is None else self._apps.get(name)
            if app is None or not (is_crowded or now - app.touched_s > _IDLE_S):
                return
            if app.live:
                app.touched_s = now
                self._apps.put(app.id, app, app.tenant.id)
                continue
            self._apps.pop(app.id)
            self.tenants.forget(app.tenant)
