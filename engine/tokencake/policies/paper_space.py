"""The published Space Scheduler: order by request score, memory partitioned between agent types."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from tokencake.forecast.roles import role_of
from tokencake.policies.paper_partition import REFRESH_STEPS, START_RATIO, Pools, next_ratio, reserves
from tokencake.policies.paper_scores import AgentType, request_score
from tokencake.space_scheduler.applications import Applications, LiveCall
from tokencake.space_scheduler.policy import Memory, Rank, Refusal
from tokencake.space_scheduler.settings import SpaceSettings


class PaperSpacePolicy:
    """Scores and Algorithm 2, with logical accounting on real blocks."""

    rank_words = ("it came before a call without a hint", "its score is higher", "it came first")

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
        self._waiting_kinds: frozenset[str] = frozenset()

    def begin(self, applications: Applications, memory: Memory, now: float) -> None:
        """See `SpacePolicy`."""
        calls = applications.calls.values()
        self._now = now
        if self._first_app_s is None:
            self._first_app_s = min((call.app.first_seen_s for call in calls), default=None)
        self._waiting_kinds = frozenset(kind_of(call) for call in calls if not call.is_running) - {""}
        self._held = Counter[str]()
        for name, blocks in memory.private_blocks.items():
            self._held[kind_of(applications.calls[name])] += blocks
        # What several calls share is charged to nobody: it counts once, as not free.
        self._plain = sorted(call.number for call in calls if call.hint is None and not call.is_running)
        is_due = self._refreshed_step is None or memory.step - self._refreshed_step >= REFRESH_STEPS
        if is_due and (kinds := self._kinds(applications, now)):
            if self._refreshed_step is not None:
                self.ratio = next_ratio(self.ratio, 1 - memory.free_blocks / memory.total_blocks)
            self._refreshed_step = memory.step
            scores = {kind: summary.score() for kind, summary in kinds.items()}
            annotated = {kind: held for kind, held in self._held.items() if kind}
            self.reserved = reserves(scores, annotated, int(self.ratio * memory.total_blocks))

    def _kinds(self, applications: Applications, now: float) -> dict[str, AgentType]:
        kinds: dict[str, AgentType] = {}
        for call in applications.calls.values():
            if kind := kind_of(call):
                kinds.setdefault(kind, AgentType()).note(call, now)
        for kind, summary in kinds.items():
            summary.refusals = self._refusals[kind]
        self._refusals.clear()
        return kinds

    def rank(self, call: LiveCall, *, need_blocks: int, is_sibling: bool) -> Rank:
        """See `SpacePolicy`."""
        del need_blocks, is_sibling
        if call.is_running:
            return (-1.0, -request_score(call, self._first_app_s or 0.0, self._now), call.number)
        # A call without a hint is a barrier: hinted ones are ordered among those that came before it.
        barrier = bisect_left(self._plain, call.number)
        return (barrier, -request_score(call, self._first_app_s or 0.0, self._now), call.number)

    def refusal(self, call: LiveCall, need_blocks: int, memory: Memory) -> Refusal | None:
        """See `SpacePolicy`."""
        kind = kind_of(call)
        held = Counter(self._held)
        for taker, blocks in memory.taken:
            held[kind_of(taker)] += blocks
        pools = Pools(self.reserved, held, memory.total_blocks, memory.free_blocks)
        if need_blocks > memory.free_blocks or pools.can_take(kind, need_blocks, self._waiting_kinds - {kind}):
            return None
        self._refusals[kind] += 1
        return "reserved"

    def reserve(self) -> dict[str, int]:
        """See `SpacePolicy`."""
        used = sum(min(blocks, self._held[kind]) for kind, blocks in self.reserved.items())
        return {"size": sum(self.reserved.values()), "used": used}


def kind_of(call: LiveCall) -> str:
    """The agent type of its tenant that the call's blocks are charged to; "" without a hint."""
    role = role_of(call.hint)
    return "" if call.hint is None else role.tenant + (role.agent or role.node or call.hint.session)
