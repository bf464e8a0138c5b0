"""Default admission policy: order by the seniority of the application, backfilling with growth reservation.

Memory follows order: see `space_scheduler.seniority` for the order and `space_scheduler.growth` for the reservation.
"""

from __future__ import annotations

from tokencake.space_scheduler.applications import AppTracker, LiveRequest
from tokencake.space_scheduler.growth import GrowthReservation, peak_blocks, would_delay
from tokencake.space_scheduler.policy import AdmissionState, Rank, Refusal
from tokencake.space_scheduler.seniority import (
    RankContext,
    expected_service_s,
    rank_context,
    seniority_s,
    service_level,
)
from tokencake.space_scheduler.settings import SpaceSettings


class DefaultSpacePolicy:
    """Order by the seniority of the application; a call is admitted if it and all growth reservations fit."""

    rank_reasons = (
        "its tenant has had less service",
        "its application is more senior",
        "it has the longer remaining path",
        "it arrived first",
    )

    def __init__(self, settings: SpaceSettings) -> None:
        self.swaps = settings.swap and settings.swap_oldest > 0
        self._settings = settings
        self._context = RankContext({}, {}, {})
        self._total_blocks = 1

    def begin(self, applications: AppTracker, state: AdmissionState, now: float) -> None:
        """See `SpacePolicy`."""
        del (
            now
        )  # seniority is a fixed time: no ageing is needed, since no later application is put before a waiting call
        self._total_blocks = state.total_blocks
        self._context = rank_context(
            applications.calls.values(),
            applications.tenants.active(),
            self._settings,
            state.total_blocks * state.block_tokens,
        )

    def rank(self, call: LiveRequest, *, need_blocks: int, shares_prefix: bool) -> Rank:
        """See `SpacePolicy`."""
        share = need_blocks / self._total_blocks
        return (
            self._context.tenant_levels.get(call.app.tenant.id, 0),
            seniority_s(call, self._settings, self._context, share=share, shares_prefix=shares_prefix),
            -call.remaining_s,
            call.number,
        )

    def refusal(self, call: LiveRequest, need_blocks: int, state: AdmissionState) -> Refusal | None:
        """See `SpacePolicy`."""
        if not self._settings.guarded:
            return None  # vLLM waits for the head of the queue, without backfilling
        if state.bypass_expired:
            return "closed"
        if need_blocks + sum(reservation.pending_blocks for reservation in state.reservations) > state.free_blocks:
            return "full"
        # The head of the queue may grow beyond what is free: calls behind it are preempted.
        return self._backfill_refusal(call, need_blocks, state) if state.bypassed else None

    def _backfill_refusal(self, call: LiveRequest, need_blocks: int, state: AdmissionState) -> Refusal | None:
        if state.has_bypassed_critical and not call.app.is_critical:
            return "critical"
        if state.has_bypassed_unhinted and call.hint is None:
            return "order"
        if self._would_start_long_app(call, need_blocks):
            return "begun"
        coming = GrowthReservation(call.expected_tokens, need_blocks, 0)
        if peak_blocks((*state.reservations, coming), state.block_tokens) > state.free_blocks:
            return "promised"
        guarded = state.bypassed[: self._settings.guarded]
        is_late = would_delay(coming, guarded, state.reservations, state.free_blocks, state.block_tokens)
        return "delays" if is_late else None

    def _would_start_long_app(self, call: LiveRequest, need_blocks: int) -> bool:
        """Whether it is the first call of a long application: started ones already compete for the memory.

        A short application is done before it delays others.
        """
        if call.hint is None or call.app.served_s:
            return False
        return service_level(call.app, expected_service_s(call, need_blocks / self._total_blocks), self._settings) > 0

    def reserve(self) -> dict[str, int]:
        """See `SpacePolicy`. There is no reserve: order decides."""
        return {"size": 0, "used": 0}
