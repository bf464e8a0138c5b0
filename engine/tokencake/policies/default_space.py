"""Default admission policy: order by the seniority of the application, backfilling with growth reservation.

Memory follows order: see `space_scheduler.seniority` for the order and `space_scheduler.growth` for the reservation.
"""

from __future__ import annotations

from tokencake.space_scheduler.applications import Applications, LiveCall
from tokencake.space_scheduler.growth import Promise, delays, peak_blocks
from tokencake.space_scheduler.policy import Memory, Rank, Refusal
from tokencake.space_scheduler.seniority import Peers, coming_s, level_of, peers_of, seniority_s
from tokencake.space_scheduler.settings import SpaceSettings


class DefaultSpacePolicy:
    """Order by the seniority of the application; whoever fits may run, what is promised included."""

    rank_words = (
        "its tenant has had less of the device",
        "its application is more senior",
        "it has the longer way to go",
        "it came first",
    )

    def __init__(self, settings: SpaceSettings) -> None:
        self.swaps = settings.swap and settings.swap_oldest > 0
        self._settings = settings
        self._peers = Peers({}, {}, {})
        self._total_blocks = 1

    def begin(self, applications: Applications, memory: Memory, now: float) -> None:
        """See `SpacePolicy`."""
        del now  # seniority is a fixed moment: who waits longer need not be lifted, since nobody is put before it
        self._total_blocks = memory.total_blocks
        self._peers = peers_of(
            applications.calls.values(),
            applications.tenants.active(),
            self._settings,
            memory.total_blocks * memory.block_tokens,
        )

    def rank(self, call: LiveCall, *, need_blocks: int, is_sibling: bool) -> Rank:
        """See `SpacePolicy`."""
        share = need_blocks / self._total_blocks
        return (
            self._peers.levels.get(call.app.tenant.id, 0),
            seniority_s(call, self._settings, self._peers, share=share, is_sibling=is_sibling),
            -call.remaining_s,
            call.number,
        )

    def refusal(self, call: LiveCall, need_blocks: int, memory: Memory) -> Refusal | None:
        """See `SpacePolicy`."""
        if not self._settings.guarded:
            return None  # vLLM waits for the first that does not fit, and lets nobody pass
        if memory.is_closed:
            return "closed"
        if need_blocks + sum(promise.pending_blocks for promise in memory.promises) > memory.free_blocks:
            return "full"
        # Where nobody was passed over, it may grow beyond what is free: those that it goes before give way.
        return self._refusal_to_pass(call, need_blocks, memory) if memory.passed else None

    def _refusal_to_pass(self, call: LiveCall, need_blocks: int, memory: Memory) -> Refusal | None:
        if memory.has_passed_critical and not call.app.is_critical:
            return "critical"
        if memory.has_passed_plain and call.hint is None:
            return "order"
        if self._would_begin(call, need_blocks):
            return "begun"
        coming = Promise(call.expected_tokens, need_blocks, 0)
        if peak_blocks((*memory.promises, coming), memory.block_tokens) > memory.free_blocks:
            return "promised"
        guarded = memory.passed[: self._settings.guarded]
        is_late = delays(coming, guarded, memory.promises, memory.free_blocks, memory.block_tokens)
        return "delays" if is_late else None

    def _would_begin(self, call: LiveCall, need_blocks: int) -> bool:
        """Whether it is the first of a long application: once begun, that would compete with those that have.

        What is short is through before anybody can mind.
        """
        if call.hint is None or call.app.served_s:
            return False
        return level_of(call.app, coming_s(call, need_blocks / self._total_blocks), self._settings) > 0

    def reserve(self) -> dict[str, int]:
        """See `SpacePolicy`. Order does here what a reserve does there."""
        return {"size": 0, "used": 0}
