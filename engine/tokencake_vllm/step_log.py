"""Duration and content of the newest steps, kept on request, for `tokencake sim calibrate`."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from tokencake.registry.timeline import TICK_S, after, page_of
from tokencake_vllm.component import SchedulerComponent

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler


@dataclass(slots=True)
class Step:
    """One step. The names are those that `tokencake sim calibrate` reads."""

    prefill_tokens: int
    decode_seqs: int
    kv_tokens_read: int
    """Sum of the context lengths of the decoding requests."""
    seconds: float
    """0 while the step is under way."""
    order_s: float = 0.0
    """When it ended, or a tick after the step before it."""


def describe_step(scheduler: Scheduler, output: SchedulerOutput) -> Step:
    """What the step that `scheduler` has just scheduled computes: prompt tokens, and one token of each answer."""
    step = Step(0, 0, 0, 0.0)
    for name, tokens in output.num_scheduled_tokens.items():
        request = scheduler.requests[name]
        if tokens == 1 and request.num_computed_tokens > request.num_prompt_tokens:
            step.decode_seqs += 1
            step.kv_tokens_read += request.num_computed_tokens
        else:
            step.prefill_tokens += tokens
    return step


class StepLog(SchedulerComponent):
    """The newest steps of a vLLM scheduler.

    Args:
        scheduler: vLLM's.
        kept: how many steps; 0 for none.
    """

    def __init__(self, scheduler: Scheduler, kept: int) -> None:
        self._scheduler = scheduler
        self._steps: deque[Step] = deque(maxlen=kept)
        self._under_way: deque[Step] = deque()
        self._last_order_s = 0.0

    def after_step(self, output: SchedulerOutput, now: float) -> None:  # noqa: ARG002  # the hook's signature
        """Note what the step computes."""
        if self._steps.maxlen:
            self._under_way.append(describe_step(self._scheduler, output))

    def after_update(self, scheduled_tokens: int, step_s: float, now: float) -> None:  # noqa: ARG002  # as above
        """Note the end of the oldest step under way."""
        if not self._steps.maxlen:
            return
        step = self._under_way.popleft()
        step.seconds = step_s
        if step.prefill_tokens or step.decode_seqs:
            step.order_s = self._last_order_s = after(now, self._last_order_s)
            self._steps.append(step)

    def view(self, epoch_offset_s: float, limit: int, before: float | None = None) -> dict[str, Any]:
        """A page of steps, the newest ones, for `GET /v1/tokencake/steps`; see `DecisionLog.view` for its parts."""
        end = len(self._steps)
        if before is not None:
            end = bisect_left(self._steps, before - epoch_offset_s - TICK_S / 4, key=lambda step: step.order_s)
        newest_first = islice(reversed(self._steps), len(self._steps) - end, None)
        page = page_of(((step.order_s, step) for step in newest_first), limit)
        steps = [asdict(step) for _, step in reversed(page.entries)]
        return {
            "order": [round(step.pop("order_s") + epoch_offset_s, 6) for step in steps],
            "steps": steps,
            "next": None if page.next_s is None else round(page.next_s + epoch_offset_s, 6),
        }
