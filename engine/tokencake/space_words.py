"""Why did my call wait? The Space Scheduler's decisions in words, its inversions and its longest wait."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from tokencake.decision_log import Decision, DecisionLog

if TYPE_CHECKING:
    from tokencake.applications import Applications, LiveCall
    from tokencake.registry import Registry
    from tokencake.space_policy import Rank, SpacePolicy
    from tokencake.space_settings import SpaceSettings

_EXPLAINED: Final = 16
"""Waiting calls, from the first in line on, whose wait is explained at one ranking."""

_REASONS: Final = {
    "full": "it does not fit beside the calls that run",
    "promised": "the memory is promised to what the calls that run will yet write",
    "delays": "it would still hold memory when a call before it could have it",
    "critical": "a call of an application with a critical path waits for memory",
    "begun": "its application has not begun, and calls of others that have wait for memory",
    "order": "a call without a hint that came before it waits for memory",
    "kept": "what is free was given up for a call of an older application",
    "closed": "a call before it has been passed for too long",
    "reserved": "the rest of the memory is reserved for critical agent types",
}


class SpaceWords:
    """Listens to the scheduler; decides nothing."""

    def __init__(
        self, settings: SpaceSettings, policy: SpacePolicy, applications: Applications, registry: Registry
    ) -> None:
        self._policy = policy
        self._applications = applications
        self._calls = applications.calls
        self._registry = registry
        self._log = DecisionLog(settings.decisions)
        self._longest_wait_s = 0.0

    def note_waiting(
        self,
        waiting: Sequence[str],
        started: Sequence[str],
        ranks: Mapping[str, Rank],
        needs: Mapping[str, int],
        free_blocks: int,
        now: float,
    ) -> None:
        """The step is over: who `started`, and who still waits, first in line first."""
        for name in started:
            # A call that comes back, after a preemption or with its user's next turn, has not waited since it came.
            if (call := self._calls.get(name)) is not None and call.started_s == now:
                self._longest_wait_s = max(self._longest_wait_s, now - call.arrived_s)
                self._add(now, call, "started", "", f"started after {now - call.arrived_s:.2f} s")
        ahead: LiveCall | None = None
        for name in waiting[:_EXPLAINED]:
            call = self._calls.get(name)
            if call is None:
                continue
            if ahead is None:
                words = f"is first in line; needs up to {needs.get(name, 0)} blocks, {free_blocks} are free"
                self._add(now, call, "waits", "first", words)
            elif name in ranks and ahead.request_id in ranks:
                why = self._why(ranks[ahead.request_id], ranks[name])
                words = f"waits behind {ahead.app.id} ({why}); needs up to {needs.get(name, 0)} blocks"
                self._add(now, call, "waits", f"{ahead.app.id} {why}", words)
            ahead = call
        self._count_inversions(waiting, started, now)

    def _why(self, ahead: Rank, behind: Rank) -> str:
        pairs = zip(ahead, behind, self._policy.rank_words, strict=True)
        return next((words for mine, other, words in pairs if mine != other), "it came first")

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
        words = "lost its memory: calls before it had to grow"
        if call.swapped_for is not None:
            words = f"was swapped out for {call.swapped_for}, a more senior application"
        self._add(now, call, "preempted", str(call.preemptions), words)

    def note_refused(self, call: LiveCall, reason: str, need_blocks: int, free_blocks: int, now: float) -> None:
        """The gate passed over `call`."""
        words = f"passed over: {_REASONS[reason]}; needs {need_blocks} blocks, {free_blocks} are free"
        self._add(now, call, "refused", reason, words)

    def forget(self, request_id: str) -> None:
        """The call is over."""
        self._log.forget(request_id)

    def longest_wait_s(self, now: float) -> float:
        """Of the calls that still wait for their first slot."""
        return max((now - call.arrived_s for call in self._calls.values() if call.started_s is None), default=0.0)

    def view(
        self,
        epoch_offset_s: float,
        now: float,
        *,
        call: str | None,
        app: str | None,
        limit: int,
        tenant: str | None = None,
    ) -> dict[str, Any]:
        """The newest decisions about one call, app or tenant or all, as JSON; times in seconds since the epoch."""
        return {
            "longest_wait_s": round(max(self._longest_wait_s, self.longest_wait_s(now)), 6),
            "decisions": self._log.view(epoch_offset_s, call=call, app=app, tenant=tenant, limit=limit),
        }

    def _add(self, now: float, call: LiveCall, kind: str, topic: str, words: str) -> None:
        name = (call.hint.call if call.hint is not None else None) or call.request_id
        agent = None if call.hint is None else call.hint.agent
        self._log.add(Decision(now, call.request_id, name, call.app.id, agent, kind, words), topic)

    def _is_critical(self, request_id: str, now: float) -> bool:
        call = self._calls.get(request_id)
        return call is not None and self._applications.is_critical(call, now)
