"""Running calls of young applications are swapped out to the host for the call of an old one that does not fit.

To vLLM it is a preemption, like its own; the Time Scheduler's host memory brings the blocks back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from vllm.v1.core.sched.interface import PauseState

from tokencake.promises import tokens_until_free
from tokencake.swap import Candidate, Losses, by_seniority, victims
from tokencake_vllm.space_gate import ADMISSIBLE

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from tokencake.applications import Applications, LiveCall
    from tokencake.space_policy import SpacePolicy
    from tokencake.space_settings import SpaceSettings
    from tokencake_vllm.block_view import BlockView
    from tokencake_vllm.space_gate import Gate
    from tokencake_vllm.space_hooks import SpaceMixin

_LOST_SHARE: Final = 0.005
"""Nobody is swapped out while more than this share of all tokens was computed again for calls that were."""


class Swap:
    """Chooses whom to swap out, and remembers what that has cost."""

    def __init__(
        self,
        scheduler: SpaceMixin,
        settings: SpaceSettings,
        policy: SpacePolicy,
        applications: Applications,
        view: BlockView,
        gate: Gate,
    ) -> None:
        self.out: set[str] = set()
        """Calls swapped out in this step: they do not come back in it."""
        self._scheduler = scheduler
        self._settings = settings
        self._policy = policy
        self._applications = applications
        self._view = view
        self._gate = gate
        self._losses = Losses()

    def choose(self, needs: Mapping[str, int]) -> list[Request]:
        """The running requests to swap out for the first in line; `needs` are the blocks of each call."""
        scheduler, settings = self._scheduler, self._settings
        if settings.policy != "ours" or not settings.swap_oldest or not self._losses.are_within(_LOST_SHARE):
            return []
        if not scheduler.can_restore() or not scheduler.waiting or scheduler.pause_state != PauseState.UNPAUSED:
            return []
        request, calls = scheduler.waiting.peek_request(), self._applications.calls
        head = calls.get(request.request_id)
        if head is None or head.hint is None or request.status not in ADMISSIBLE:
            return []
        promises = [self._gate.promise(other) for other in scheduler.running]
        need = self._view.blocks_of(request.num_tokens) - self._view.held_prefix_blocks(request)
        free = self._view.free_blocks + self._coming_blocks()
        short = need + sum(promise.pending_blocks for promise in promises) - free
        if short <= 0:
            return []
        if tokens_until_free(promises, need, free, self._view.block_tokens) <= settings.swap_patience_tokens:
            return []
        ranks = (
            (call, self._policy.rank(call, need_blocks=needs.get(name, 0), is_sibling=False))
            for name, call in calls.items()
        )
        running = {other.request_id: other for other in scheduler.running if _has_its_prompt(other)}
        candidates = [self._candidate(calls[name], other) for name, other in running.items() if name in calls]
        chosen = victims(head, short, candidates, by_seniority(ranks), settings)
        for candidate in chosen:
            candidate.call.swaps += 1
            candidate.call.swapped_for = head.app.id
        self.out.update(candidate.call.request_id for candidate in chosen)
        return [running[candidate.call.request_id] for candidate in chosen]

    def note_step(self, output: SchedulerOutput) -> None:
        """The step is scheduled: what had calls that come back to compute again?"""
        self.out.clear()
        lost = 0
        for name in output.scheduled_cached_reqs.resumed_req_ids:
            call = self._applications.calls.get(name)
            if call is not None and call.swapped_for is not None:
                lost += output.num_scheduled_tokens[name]
        self._losses.add(output.total_num_scheduled_tokens, lost)

    def _coming_blocks(self) -> int:
        """Blocks that come free without anybody's end: the step under way or a copy to the host still has them."""
        leaving = sum(len(blocks) for _, blocks in self._scheduler.deferred_frees)
        return leaving + self._view.held_only_by(self._scheduler.storing())

    def _candidate(self, call: LiveCall, request: Request) -> Candidate:
        private = self._view.private_blocks(call.request_id)
        shared = self._view.allocated_blocks(call.request_id) - private
        # Who has written more than was expected may write on for as long as it is allowed to.
        is_overdue = request.num_output_tokens >= call.expected_tokens
        left = request.max_tokens - request.num_output_tokens if is_overdue else self._gate.left_tokens(request)
        return Candidate(call, private, shared, left)


def _has_its_prompt(request: Request) -> bool:
    """Whether its prompt is computed: what has just begun has nothing that the host could bring back."""
    return request.num_computed_tokens - request.num_in_flight_tokens >= request.num_prompt_tokens
