"""How long did each step take, and what did it compute? Kept where asked for, to fit the simulator to this engine."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

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
                    self._measured_steps.append(step)
        return super().update_from_output(scheduler_output, *args, **kwargs)

    def tokencake_steps(self) -> list[dict[str, Any]]:
        """The newest steps, oldest first, for `GET /v1/tokencake/steps`."""
        return [asdict(step) for step in self._measured_steps]
