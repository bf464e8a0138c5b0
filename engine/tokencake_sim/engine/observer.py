"""What the engine loop tells of itself, and asks: the seam to what measures a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.request import Request

    from tokencake_sim.clients.calls import SimCall


class StepObserver(Protocol):
    """Costs and records the steps of one run."""

    def step_s(
        self, scheduler: Scheduler, output: SchedulerOutput, calls: dict[str, SimCall], begins_s: float
    ) -> float:
        """Seconds that the device needs for the step that was just scheduled."""

    def take(self, call: SimCall, output: EngineCoreOutput) -> None:
        """The engine gave an answer, or a part of one."""

    def record_finished(self, request: Request, call: SimCall) -> None:
        """A call is about to leave the scheduler."""

    def idle(self, scheduler: Scheduler, seconds: float, *, is_copying: bool) -> None:
        """The device stands still although the scheduler has requests."""

    def sample(self, until_s: float) -> None:
        """The clock is about to move to `until_s`."""

    def account(self) -> None:
        """Blocks may have changed hands, and the clock has not moved since."""
