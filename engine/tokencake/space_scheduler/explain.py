"""Explanations of the Space Scheduler's decisions, priority inversions and the longest wait: why did my call wait?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from tokencake.space_scheduler.decision_log import DecisionLog, ExplainedDecision
from tokencake.space_scheduler.policy import REFUSALS

if TYPE_CHECKING:
    from tokencake.registry.registry import Registry
    from tokencake.space_scheduler.applications import Application, AppTracker, LiveRequest
    from tokencake.space_scheduler.decision_log import Kind
    from tokencake.space_scheduler.policy import Rank, Refusal, SpacePolicy
    from tokencake.space_scheduler.settings import SpaceSettings

_EXPLAINED: Final = 16
"""Waiting calls at the head of the queue whose wait is explained at one ranking."""


class DecisionExplainer:
    """Records what the scheduler reports; decides nothing."""

    def __init__(
        self, settings: SpaceSettings, policy: SpacePolicy, applications: AppTracker, registry: Registry
    ) -> None:
        self._policy = policy
        self._applications = applications
        self._calls = applications.calls
        self._registry = registry
        self._log = DecisionLog(settings.decisions)
        self._longest_wait_s = 0.0
        """Of all calls that have started; of one tenant's, see `Tenant`."""

    def note_waiting(
        self,
        waiting: Sequence[str],
        started: Sequence[str],
        ranks: Mapping[str, Rank],
        needs: Mapping[str, int],
        free_blocks: int,
        now: float,
    ) -> None:
        """The step is over: the requests that `started`, and those still `waiting`, in the order of the queue."""
        for name in started:
            # A call that resumes after a preemption has not waited since it arrived.
            if (call := self._calls.get(name)) is not None and call.started_s == now:
                waited_s, tenant = now - call.arrived_s, call.app.tenant
                self._longest_wait_s = max(self._longest_wait_s, waited_s)
                tenant.longest_wait_s = max(tenant.longest_wait_s, waited_s)
                self._add(now, call, "started", "", waited_s=waited_s)
        ahead: LiveRequest | None = None
        for name in waiting[:_EXPLAINED]:
            call = self._calls.get(name)
            if call is None:
                continue
            need = needs.get(name, 0)
            if ahead is None:
                self._add(now, call, "waits", "first", need_blocks=need, free_blocks=free_blocks)
            elif name in ranks and ahead.request_id in ranks:
                why = self._why(ranks[ahead.request_id], ranks[name])
                dedup_key = f"{ahead.app.id} {why}"
                self._add(now, call, "waits", dedup_key, why, behind=_name(ahead.app), need_blocks=need)
            ahead = call
        self._count_inversions(waiting, started, now)

    def _why(self, ahead: Rank, behind: Rank) -> str:
        pairs = zip(ahead, behind, self._policy.rank_reasons, strict=True)
        return next((reason for mine, other, reason in pairs if mine != other), "it arrived first")

    def _count_inversions(self, waiting: Sequence[str], started: Sequence[str], now: float) -> None:
        minor = sum(not self._is_critical(name, now) for name in started)
        if minor and any(self._is_critical(name, now) for name in waiting):
            self._registry.counts["space_inversions", "admission"] += minor

    def note_preempted(self, request_id: str, running: Sequence[str], now: float) -> None:
        """The request loses its blocks while `running` keep theirs."""
        call = self._calls.get(request_id)
        if call is None:
            return
        if self._is_critical(request_id, now) and any(not self._is_critical(name, now) for name in running):
            self._registry.counts["space_inversions", "preemption"] += 1
        behind = None if call.swapped_for is None else _name(call.swapped_for)
        self._add(now, call, "preempted", str(call.preemptions), behind=behind)

    def note_skipped(self, call: LiveRequest, reason: Refusal, need_blocks: int, free_blocks: int, now: float) -> None:
        """The admission gate skipped `call` in this step."""
        self._add(now, call, "refused", reason, REFUSALS[reason], need_blocks=need_blocks, free_blocks=free_blocks)

    def forget(self, request_id: str) -> None:
        """The call is over."""
        self._log.forget(request_id)

    def longest_wait_s(self, now: float, tenant: str | None = None) -> float:
        """The longest wait so far of the calls, or of those of one tenant, that wait for their first slot."""
        waiting = (call for call in self._calls.values() if call.started_s is None)
        own = (call for call in waiting if tenant in (None, call.app.tenant.id))
        return max((now - call.arrived_s for call in own), default=0.0)

    def view(
        self,
        epoch_offset_s: float,
        now: float,
        *,
        call: str | None,
        app: str | None,
        limit: int,
        tenant: str | None = None,
        before: float | None = None,
    ) -> dict[str, Any]:
        """A page of decisions about one call, app or tenant or all, as JSON; times in seconds since the epoch."""
        longest_s = self._longest_wait_s if tenant is None else self._applications.tenants.longest_wait_s(tenant)
        return {
            "longest_wait_s": round(max(longest_s, self.longest_wait_s(now, tenant)), 6),
            **self._log.view(epoch_offset_s, call=call, app=app, tenant=tenant, limit=limit, before=before),
        }

    def _add(
        self,
        now: float,
        call: LiveRequest,
        kind: Kind,
        dedup_key: str,
        reason: str = "",
        *,
        behind: tuple[str, str] | None = None,
        waited_s: float | None = None,
        need_blocks: int | None = None,
        free_blocks: int | None = None,
    ) -> None:
        name = (call.hint.call if call.hint is not None else None) or call.request_id
        decision = ExplainedDecision(
            now,
            call.request_id,
            name,
            call.app.id,
            None if call.hint is None else call.hint.agent,
            call.app.tenant.id,
            kind,
            reason,
            behind,
            waited_s,
            need_blocks,
            free_blocks,
        )
        self._log.add(decision, dedup_key)

    def _is_critical(self, request_id: str, now: float) -> bool:
        call = self._calls.get(request_id)
        return call is not None and self._applications.is_critical(call, now)


def _name(app: Application) -> tuple[str, str]:
    return app.id, app.tenant.id
