"""How long did each step take, and what did it compute? Kept where asked for, to fit the simulator to this engine."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from tokencake.registry.timeline import TICK_S, after, page_of
from tokencake.settings import MeasureSettings, section
from tokencake_vllm.step_clock import StepClock

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    from tokencake_vllm.scheduler import TokenCakeMixin

    _Base = TokenCakeMixin
else:
    _Base = object


@dataclass(slots=True)
class Step:
    """Named as `tokencake sim calibrate` reads it."""

    prefill_tokens: int
    decode_seqs: int
    kv_tokens_read: int
    """Context lengths of the decoding calls added up."""
    seconds: float
    """0 while the step is under way."""
    order_s: float = 0.0
    """When it ended, or a tick after the step before it."""


def begun_step(scheduler: TokenCakeMixin, output: SchedulerOutput) -> Step:
    """What the step that `scheduler` has just scheduled computes: next tokens of answers, or what comes before them."""
    step = Step(0, 0, 0, 0.0)
    for name, tokens in output.num_scheduled_tokens.items():
        request = scheduler.requests[name]
        if tokens == 1 and request.num_computed_tokens > request.num_prompt_tokens:
            step.decode_seqs += 1
            step.kv_tokens_read += request.num_computed_tokens
        else:
            step.prefill_tokens += tokens
    return step


class StepMixin(_Base):
    """Times the newest steps of a vLLM scheduler."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        kept = section(self.vllm_config.additional_config, "measure", MeasureSettings).steps
        self._measured_steps: deque[Step] = deque(maxlen=kept)
        self._last_order_s = 0.0
        self._steps_under_way: deque[Step] = deque()
        self._step_clock = StepClock()

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Stock, then note what the step computes."""
        if not self._measured_steps.maxlen:
            return super().schedule(*args, **kwargs)
        self._step_clock.schedule(time.monotonic())
        output = super().schedule(*args, **kwargs)
        with self._advice():
            self._steps_under_way.append(begun_step(self, output))
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Note the end of the oldest step under way."""
        if self._measured_steps.maxlen:
            with self._advice():
                step = self._steps_under_way.popleft()
                step.seconds = self._step_clock.complete(time.monotonic())
                if step.prefill_tokens or step.decode_seqs:
                    step.order_s = self._last_order_s = after(time.monotonic(), self._last_order_s)
                    self._measured_steps.append(step)
        return super().update_from_output(scheduler_output, *args, **kwargs)

    def tokencake_steps(self, limit: int, before: float | None = None) -> dict[str, Any]:
        """A page of steps, the newest ones, for `GET /v1/tokencake/steps`; see `DecisionLog.view` for its parts."""
        offset_s = self.epoch_offset_s()
        end = len(self._measured_steps)
        if before is not None:
            before_s = before - offset_s - TICK_S / 4
            end = bisect_left(self._measured_steps, before_s, key=lambda step: step.order_s)
        newest_first = islice(reversed(self._measured_steps), len(self._measured_steps) - end, None)
        page = page_of(((step.order_s, step) for step in newest_first), limit)
        steps = [asdict(step) for _, step in reversed(page.entries)]
        return {
            "order": [round(step.pop("order_s") + offset_s, 6) for step in steps],
            "steps": steps,
            "next": None if page.next_s is None else round(page.next_s + offset_s, 6),
        }
