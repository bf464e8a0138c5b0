"""What only some policies of the Time Scheduler read of vLLM's queue: each costs a walk, made when a policy asks."""

from __future__ import annotations

import itertools
from collections import deque
from typing import TYPE_CHECKING

from tokencake.time_scheduler.policy import CHURN_STEPS, PaperInputs
from tokencake_vllm.time_scheduler.uploads import QUEUE_SCAN
from tokencake_vllm.vllm_adapter.requests import queued_requests

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler

    from tokencake.protocol import Hint
    from tokencake_vllm.vllm_adapter.block_view import BlockView


class RecentStores:
    """The steps of the stores within the last `CHURN_STEPS` steps."""

    def __init__(self) -> None:
        self._steps: deque[int] = deque()

    def add(self, step: int) -> None:
        """A prefix is stored in this step."""
        self.count(step)
        self._steps.append(step)

    def count(self, step: int) -> int:
        """How many there are as of this step."""
        while self._steps and self._steps[0] < step - CHURN_STEPS:
            self._steps.popleft()
        return len(self._steps)


def paper_inputs(
    scheduler: Scheduler, view: BlockView, hint: Hint | None, host_free: int, recent_stores: int
) -> PaperInputs:
    """For the request with this hint that has finished."""
    waiting_blocks, fitting_blocks = _queue_demand(scheduler, view)
    return PaperInputs(
        waiting_blocks=waiting_blocks,
        fitting_blocks=fitting_blocks,
        host_free=host_free,
        importance=(hint.importance if hint else None) or 0.0,
        is_near_end=bool(hint and hint.max_depth and hint.remaining is not None and hint.remaining <= 1),
        recent_stores=recent_stores,
    )


def _queue_demand(scheduler: Scheduler, view: BlockView) -> tuple[int, int]:
    """Blocks that the requests at the head of the queue need, and how many of these could be had now."""
    blocks, fitting = 0, 0
    free = view.free_blocks
    for request in itertools.islice(scheduler.waiting, QUEUE_SCAN):
        need = view.needed_blocks(request)
        blocks += need
        if fitting + need <= free:
            fitting += need
    return blocks, fitting


def queue_positions(scheduler: Scheduler) -> dict[str, int]:
    """Of each waiting request."""
    return {request.request_id: place for place, request in enumerate(queued_requests(scheduler))}
