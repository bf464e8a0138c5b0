"""Swapping: running calls of young applications give way to the call of an old one that does not fit.

To vLLM it is a preemption, like its own; the host memory of the Time Scheduler brings the blocks back. Until the
beneficiary has started, the freed blocks are reserved for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from tokencake.space_scheduler.growth import GrowthReservation, tokens_until_free
from tokencake.space_scheduler.swap_victims import RecomputeBudget, SwapCandidate, by_seniority, victims
from tokencake_vllm.vllm_adapter.requests import (
    ADMISSIBLE,
    admitted_requests,
    has_prompt_computed,
    is_paused,
    leaving_blocks,
)

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    from tokencake.space_scheduler.applications import AppTracker, LiveRequest
    from tokencake.space_scheduler.policy import Rank, SpacePolicy
    from tokencake.space_scheduler.settings import SpaceSettings
    from tokencake_vllm.component import Offload
    from tokencake_vllm.space_scheduler.admission_gate import AdmissionGate
    from tokencake_vllm.vllm_adapter.block_view import BlockView

_MAX_RECOMPUTED_SHARE: Final = 0.005
"""No swap while more than this share of all tokens was computed again for swapped calls."""
_START_S: Final = 1.0
"""The beneficiary must start within this time, or its reservation lapses: vLLM may skip it for reasons of its own."""


class Swap:
    """Chooses victims, reserves the freed blocks for the beneficiary, and counts the tokens that swaps have cost."""

    def __init__(
        self,
        scheduler: Scheduler,
        settings: SpaceSettings,
        policy: SpacePolicy,
        applications: AppTracker,
        view: BlockView,
        gate: AdmissionGate,
        offload: Offload,
    ) -> None:
        self._scheduler = scheduler
        self._offload = offload
        self._settings = settings
        self._policy = policy
        self._calls = applications.calls
        self._view = view
        self._gate = gate
        self._recompute_budget = RecomputeBudget()
        self._beneficiary: str | None = None
        """The call that others have given way to and that has not started yet."""
        self._reserved_until_s = 0.0
        self._swapped_out: set[str] = set()
        """Calls that were swapped out and have not come back."""

    def choose(self, ages: Mapping[str, Rank], now: float) -> list[Request]:
        """The running requests to swap out for the first one in the queue; `ages` are ranks without prefix affinity."""
        head = self._head(now)
        if head is None:
            return []
        request = self._scheduler.requests[head.request_id]
        need = self._view.needed_blocks(request)
        free = self._view.free_blocks + self._soon_free_blocks()
        if need <= free or need < self._settings.swap_share * self._view.total_blocks:
            return []
        apps = by_seniority((self._calls[name], rank) for name, rank in ages.items() if name in self._calls)
        if head.app.id not in apps[: self._settings.swap_oldest]:
            return []
        admitted = admitted_requests(self._scheduler)
        reservations = [self._reservation(other) for other in admitted]
        if tokens_until_free(reservations, need, free, self._view.block_tokens) <= self._settings.swap_patience_tokens:
            return []
        # Each call that runs may want one more block before the copies are over.
        margin = len(admitted) + self._scheduler.kv_cache_manager.watermark_blocks
        short = need + margin + sum(reservation.pending_blocks for reservation in reservations) - free
        chosen = victims(head, short, self._candidates(), apps, self._settings)
        names = {candidate.call.request_id for candidate in chosen}
        if not names or self._view.freed_by(names, request) < short:
            return []
        for candidate in chosen:
            candidate.call.swaps += 1
            candidate.call.swapped_for = head.app
        self._beneficiary, self._reserved_until_s = head.request_id, now + _START_S
        self._swapped_out |= names
        return [other for other in self._scheduler.running if other.request_id in names]

    def _head(self, now: float) -> LiveRequest | None:
        """The first call in the queue, if any call may be swapped out for it."""
        scheduler = self._scheduler
        if not self._policy.swaps or self._is_reserved(now) or not scheduler.waiting:
            return None
        if not self._recompute_budget.are_within(_MAX_RECOMPUTED_SHARE) or not self._offload.can_restore:
            return None
        request = scheduler.waiting.peek_request()
        head = self._calls.get(request.request_id)
        is_able = request.status in ADMISSIBLE and not is_paused(scheduler)
        return head if is_able and head is not None and head.hint is not None and not head.swap_failed else None

    def may_start(self, request_id: str, now: float) -> bool:
        """Whether this waiting call may take blocks: those of a reservation are for its beneficiary only."""
        return not self._is_reserved(now) or request_id == self._beneficiary

    def _is_reserved(self, now: float) -> bool:
        request = None if self._beneficiary is None else self._scheduler.requests.get(self._beneficiary)
        if request is None or request.status not in ADMISSIBLE:  # it is gone, or has its blocks
            self._beneficiary = None
        elif now > self._reserved_until_s:
            self._beneficiary = None
            has_room = self._view.blocks_of(request.num_tokens) <= self._view.free_blocks
            call = self._calls.get(request.request_id)
            if call is not None and has_room and not is_paused(self._scheduler):
                call.swap_failed = True
        return self._beneficiary is not None

    def note_step(self, output: SchedulerOutput) -> None:
        """Count the tokens that swapped calls which come back in this step compute again."""
        lost = 0
        for name in [
            name for name in self._swapped_out if name in output.num_scheduled_tokens or name not in self._calls
        ]:
            self._swapped_out.discard(name)
            if (request := self._scheduler.requests.get(name)) is not None:
                lost += request.num_tokens - request.num_computed_tokens + output.num_scheduled_tokens.get(name, 0)
        self._recompute_budget.add(output.total_num_scheduled_tokens, lost)

    def _soon_free_blocks(self) -> int:
        """Blocks that come free although no call ends: the step under way or a copy to the host still holds them."""
        holds = Counter(self._offload.storing())
        holds.update(block.block_id for block in leaving_blocks(self._scheduler))
        return self._view.freed_if_released(holds)

    def _left_tokens(self, request: Request) -> int:
        """As the gate sees it; a call that is longer than expected may go on up to its limit."""
        call = self._calls.get(request.request_id)
        is_overdue = call is None or request.num_output_tokens >= call.expected_tokens
        return request.max_tokens - request.num_output_tokens if is_overdue else self._gate.left_tokens(request)

    def _reservation(self, request: Request) -> GrowthReservation:
        return replace(self._gate.reservation(request), left_tokens=self._left_tokens(request))

    def _candidates(self) -> list[SwapCandidate]:
        running = [(self._calls[r.request_id], r) for r in self._scheduler.running if r.request_id in self._calls]
        able = [(call, request) for call, request in running if call.hint is not None and has_prompt_computed(request)]
        sizes = Counter(call.app.id for call, _ in able)
        return [self._candidate(call, request, sizes[call.app.id]) for call, request in able]

    def _candidate(self, call: LiveRequest, request: Request, size: int) -> SwapCandidate:
        private = self._view.exclusive_blocks(call.request_id)
        # What calls of other applications hold too does not come free with those of its own.
        shared = self._view.exclusive_blocks(call.request_id, holders=size) - private
        return SwapCandidate(call, private, shared, self._left_tokens(request))
