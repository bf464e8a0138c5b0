"""The published Space Scheduler: order by request score, memory partitioned between agent types."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from tokencake.forecast.roles import role_of
from tokencake.policies.paper_partition import REFRESH_STEPS, START_RATIO, Pools, next_ratio, reserves
from tokencake.policies.paper_scores import AgentType, request_score
from tokencake.space_scheduler.applications import AppTracker, LiveRequest
from tokencake.space_scheduler.policy import AdmissionState, Rank, Refusal
from tokencake.space_scheduler.settings import SpaceSettings


class PaperSpacePolicy:
    """Scores and Algorithm 2, with logical accounting on real blocks."""

    rank_reasons = ("it arrived before a call without a hint", "its score is higher", "it arrived first")

    swaps = False

    def __init__(self, settings: SpaceSettings) -> None:
        del settings  # its constants are published
        self.ratio = START_RATIO
        self.reserved: dict[str, int] = {}
        """Blocks for each critical type."""
        self._refreshed_step: int | None = None
        self._refusals: Counter[str] = Counter()
        self._first_app_s: float | None = None
        self._now = 0.0
        self._held: Counter[str] = Counter()
        self._plain: list[int] = []
        self._waiting_types: frozenset[str] = frozenset()

    def begin(self, applications: AppTracker, state: AdmissionState, now: float) -> None:
        """See `SpacePolicy`."""
        calls = applications.calls.values()
        self._now = now
        if self._first_app_s is None:
            self._first_app_s = min((call.app.first_seen_s for call in calls), default=None)
        self._waiting_types = frozenset(agent_type_of(call) for call in calls if not call.is_running) - {""}
        self._held = Counter[str]()
        for name, blocks in state.exclusive_blocks.items():
            self._held[agent_type_of(applications.calls[name])] += blocks
        # Shared blocks are charged to no agent type: they count once, as not free.
        self._plain = sorted(call.number for call in calls if call.hint is None and not call.is_running)
        is_due = self._refreshed_step is None or state.step - self._refreshed_step >= REFRESH_STEPS
        if is_due and (agent_types := self._agent_types(applications, now)):
            if self._refreshed_step is not None:
                self.ratio = next_ratio(self.ratio, 1 - state.free_blocks / state.total_blocks)
            self._refreshed_step = state.step
            scores = {agent_type: summary.score() for agent_type, summary in agent_types.items()}
            annotated = {agent_type: held for agent_type, held in self._held.items() if agent_type}
            self.reserved = reserves(scores, annotated, int(self.ratio * state.total_blocks))

    def _agent_types(self, applications: AppTracker, now: float) -> dict[str, AgentType]:
        agent_types: dict[str, AgentType] = {}
        for call in applications.calls.values():
            if agent_type := agent_type_of(call):
                agent_types.setdefault(agent_type, AgentType()).note(call, now)
        for agent_type, summary in agent_types.items():
            summary.refusals = self._refusals[agent_type]
        self._refusals.clear()
        return agent_types

    def rank(self, call: LiveRequest, *, need_blocks: int, shares_prefix: bool) -> Rank:
        """See `SpacePolicy`."""
        del need_blocks, shares_prefix
        if call.is_running:
            return (-1.0, -request_score(call, self._first_app_s or 0.0, self._now), call.number)
        # A call without a hint is a barrier: hinted ones are ordered among those that arrived before it.
        barrier = bisect_left(self._plain, call.number)
        return (barrier, -request_score(call, self._first_app_s or 0.0, self._now), call.number)

    def refusal(self, call: LiveRequest, need_blocks: int, state: AdmissionState) -> Refusal | None:
        """See `SpacePolicy`."""
        agent_type = agent_type_of(call)
        held = Counter(self._held)
        for taker, blocks in state.taken:
            held[agent_type_of(taker)] += blocks
        pools = Pools(self.reserved, held, state.total_blocks, state.free_blocks)
        if need_blocks > state.free_blocks or pools.can_take(
            agent_type, need_blocks, self._waiting_types - {agent_type}
        ):
            return None
        self._refusals[agent_type] += 1
        return "reserved"

    def reserve(self) -> dict[str, int]:
        """See `SpacePolicy`."""
        used = sum(min(blocks, self._held[agent_type]) for agent_type, blocks in self.reserved.items())
        return {"size": sum(self.reserved.values()), "used": used}


def agent_type_of(call: LiveRequest) -> str:
    """The agent type of its tenant that the call's blocks are charged to; "" without a hint."""
    role = role_of(call.hint)
    return "" if call.hint is None else role.tenant + (role.agent or role.node or call.hint.session)
