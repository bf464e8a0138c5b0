"""The one subclass of vLLM's scheduler: it calls TokenCake's components around vLLM's own methods.

`schedule()` is never copied. What a component does is advice: an error in it is logged and counted, and the request
goes on as if its hint were absent. The order of the components is a contract, see `TokenCakeMixin`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from tokencake import protocol
from tokencake.front_end import front_end_problem
from tokencake.registry.record_store import Limits
from tokencake.registry.registry import Registry
from tokencake.registry.state_view import state_view
from tokencake.settings import MeasureSettings, section
from tokencake.space_scheduler.settings import SpaceSettings
from tokencake_vllm.call_recorder import CallRecorder
from tokencake_vllm.component import ErrorContainment, SchedulerComponent, TaggedRequest
from tokencake_vllm.space_scheduler.component import SpaceComponent
from tokencake_vllm.step_clock import StepClock
from tokencake_vllm.step_log import StepLog
from tokencake_vllm.tenant_secret import TenantSecret
from tokencake_vllm.time_scheduler.component import make_offload
from tokencake_vllm.vllm_adapter.block_accounting import block_budget, own_blocks

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    _Base = Scheduler
else:
    _Base = object

logger = init_logger("vllm.tokencake")

_CLOCK_SET_S: Final = 1.0
"""A jump of the system's clock by more is taken over; smaller ones would shift the pages of a view in the reading."""
_FEW_BLOCKS: Final = 8_192
"""To look at this many blocks takes the engine's loop two or three milliseconds."""
_COUNTED_S: Final = 1.0


class TokenCakeMixin(_Base):
    """vLLM's scheduler with components in layers around it, the outermost first.

    1. `steps` measures what the others and vLLM do.
    2. `offload` gives room (uploads, pins) before admission ranks, and sees a request's blocks before vLLM takes them.
    3. `admission` orders the requests that vLLM is about to schedule.
    4. `recorder` enters calls into the registry, which all others read.

    Into vLLM (`before_*`) the layers are called in this order, out of it (`on_*`, `after_*`) in the reverse.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        is_async = bool(self.scheduler_config.async_scheduling)
        if is_async != isinstance(self, AsyncScheduler):
            raise RuntimeError(
                f"{type(self).__name__} does not fit async_scheduling={is_async}: pass --scheduler-cls "
                "tokencake_vllm.scheduler.create_scheduler, which picks the class that fits"
            )
        config = self.vllm_config.additional_config
        space = section(config, "space", SpaceSettings)
        has_tenants = space.tenant_mark is not None
        tenant_secret = TenantSecret() if has_tenants else None
        self.registry = Registry(section(config, "registry", Limits), has_tenants=has_tenants)
        self.contain_errors = ErrorContainment(self._count_error)
        self.tagged: dict[str, TaggedRequest] = {}
        """The live requests, by id."""
        self.steps = StepLog(self, section(config, "measure", MeasureSettings).steps)
        self.offload = make_offload(self, self.registry, self.contain_errors, self.clock)
        self.admission = SpaceComponent(self, space, self.registry, self.offload, self.contain_errors)
        self.recorder = CallRecorder(self, self.registry, tenant_secret)
        self.layers: tuple[SchedulerComponent, ...] = (self.steps, self.offload, self.admission, self.recorder)
        self._must_prove_tenant = has_tenants and not space.tenants_share_prefixes
        self._step_clock = StepClock()
        self._epoch_offset_s = time.time() - self.clock()
        self._counted_blocks: tuple[dict[str, int] | None, float] = None, 0.0
        logger.info("TokenCake: %s watches this engine's calls", type(self).__name__)
        if (problem := front_end_problem(os.environ)) is not None:
            logger.warning("TokenCake: %s", problem)

    @staticmethod
    def clock() -> float:
        """Seconds on the engine's clock; components get them as `now`."""
        return time.monotonic()

    def _count_error(self) -> None:
        self.registry.counts["errors",] += 1

    # --- a request ------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Stock, then the components."""
        is_new = request.request_id not in self.requests
        if self._must_prove_tenant:
            # Without proof of its tenant it may learn nothing of what others have sent.
            request.skip_reading_prefix_cache |= self.recorder.salted_tenant(request) is None
        super().add_request(request)
        if not is_new:
            return
        now = self.clock()
        tagged = TaggedRequest(request, None, "")
        with self.contain_errors:
            tagged = self.recorder.tag(request, now)
        self.tagged[request.request_id] = tagged
        for component in reversed(self.layers):
            with self.contain_errors:
                component.on_added(tagged, now)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        now = self.clock()
        for component in self.layers:
            with self.contain_errors:
                component.before_preempt(request, now)
        super()._preempt_request(request, *args, **kwargs)
        for component in reversed(self.layers):
            with self.contain_errors:
                component.after_preempt(request)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        now = self.clock()
        for component in self.layers:
            with self.contain_errors:
                component.before_free(request, now)
        self.tagged.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Stock, then whether admission lets the request run in this step. vLLM skips one that may not."""
        if not super()._handle_blocked_waiting_request(request):
            return False
        if self._holds_kv_blocks(request):
            return True
        with self.contain_errors:
            return self.admission.admits(request, self.clock())
        return True

    # --- the step -------------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """The components, stock, the components."""
        now = self.clock()
        self._step_clock.schedule(now)
        for component in self.layers:
            with self.contain_errors:
                component.before_step(now)
        self._swap_out(now)
        output = super().schedule(*args, **kwargs)
        now = self.clock()
        for component in reversed(self.layers):
            with self.contain_errors:
                component.after_step(output, now)
        return output

    def _swap_out(self, now: float) -> None:
        """Preempt, as vLLM does, the requests that admission has chosen for the first one in the queue."""
        leaving = self.admission.take_leaving()
        for request in leaving:
            self.running.remove(request)
            self._preempt_request(request, now, drop_stale_output=self.requires_kv_delivery)
            self.registry.counts["space_swaps",] += 1
        if leaving:
            with self.contain_errors:
                self.admission.sort()

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Stock, then the components; and if the engine may sleep now, see that it wakes up in time."""
        step_s = self._step_clock.complete(self.clock())
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)
        now = self.clock()
        for component in reversed(self.layers):
            with self.contain_errors:
                component.after_update(scheduler_output.total_num_scheduled_tokens, step_s, now)
        self._arm_waker(now)
        return outputs

    # --- sleeping and waking --------------------------------------------------------------------------

    def has_requests(self) -> bool:
        """Also when something of the Time Scheduler's is due: the step that follows does it."""
        return super().has_requests() or self.offload.is_due(self.clock())

    def next_due_s(self) -> float | None:
        """When the engine wants a step although it may have no request; None where it does not."""
        return self.offload.next_due_s()

    def bind_waker(self, wake: Callable[[], None]) -> None:
        """`wake` makes the engine loop look for work; callable from any thread."""
        self.offload.bind_waker(wake)

    def _arm_waker(self, now: float) -> None:
        with self.contain_errors:
            if not super().has_requests():
                self.offload.arm_waker(now)

    def reset_prefix_cache(self, reset_running_requests: bool = False, *args: Any, **kwargs: Any) -> bool:
        """Stock, after everything that is held was given back; vLLM's sleep and its weight updates come here too."""
        with self.offload.resetting(self.contain_errors, drops_loads=reset_running_requests):
            return super().reset_prefix_cache(reset_running_requests, *args, **kwargs)

    # --- what the API server asks for, on the engine's own loop, between two steps ------------------

    def tokencake_events(self, events: list[dict[str, Any]], received: float, tenant: str = "") -> dict[str, Any]:
        """Apply events of `tenant` that reached the API server at `received` (seconds since the epoch)."""
        now = self.clock()
        waited_s = min(max(0.0, time.time() - received), protocol.MAX_AGO_S)
        parsed = [protocol.scoped(protocol.parse_event(event), tenant) for event in events]
        outcomes = [self.registry.apply(event, now - waited_s) for event in parsed]
        answer = {"outcomes": outcomes, "need": self.registry.unknown_graphs(tenant)}
        applied = [e for e, outcome in zip(parsed, outcomes, strict=True) if outcome in ("applied", "late")]
        for component in reversed(self.layers):
            with self.contain_errors:
                component.on_events(applied, now)
        self._arm_waker(now)
        return answer

    def epoch_offset_s(self) -> float:
        """From the engine's clock to seconds since the epoch: the same each time, until the system's clock is set."""
        offset_s = time.time() - self.clock()
        if abs(offset_s - self._epoch_offset_s) > _CLOCK_SET_S:
            self._epoch_offset_s = offset_s
        return self._epoch_offset_s

    def tokencake_state(
        self,
        session: str | None,
        app: str | None,
        limit: int,
        tenant: str | None = None,
        before: float | None = None,
    ) -> dict[str, Any]:
        """`state_view` in seconds since the epoch, with where each session's KV is."""
        state = state_view(
            self.registry,
            self.epoch_offset_s(),
            session=session,
            app=app,
            tenant=tenant,
            limit=limit,
            before=before,
        )
        state["kv_blocks"] = self.kv_blocks() if tenant is None else self.own_blocks(tenant)
        check = self.offload.self_check
        state["time"] = {
            "off": self.offload.off_reason,
            "host_blocks": self.offload.host_blocks,
            "self_check": None if check is None else asdict(check),
        }
        self.offload.describe_sessions(state["sessions"])
        return state

    def tokencake_decisions(
        self, call: str | None, app: str | None, limit: int, tenant: str | None = None, before: float | None = None
    ) -> dict[str, Any]:
        """A page of decisions, for `GET /v1/tokencake/decisions`."""
        return self.admission.explainer.view(
            self.epoch_offset_s(), self.clock(), call=call, app=app, tenant=tenant, limit=limit, before=before
        )

    def tokencake_steps(self, limit: int, before: float | None = None) -> dict[str, Any]:
        """A page of steps, for `GET /v1/tokencake/steps`."""
        return self.steps.view(self.epoch_offset_s(), limit, before)

    def tokencake_metrics(self) -> dict[str, Any]:
        """`Registry.drain`, and the gauges with a label as `{metric: {label: value}}`."""
        drained: dict[str, Any] = {**self.registry.drain(), "labelled": {"kv_blocks": self.kv_blocks()}}
        with self.contain_errors:
            self.admission.add_metrics(drained, self.clock())
        return drained

    def tokencake_wipe(self) -> int:
        """With `debug_checksums`: overwrite every free device block, to prove that what is hit later was copied."""
        return self.offload.wipe()

    def kv_blocks(self) -> dict[str, int]:
        """`block_budget`; of a large device as of at most a second ago, since it looks at every block."""
        counted, at_s = self._counted_blocks
        now = self.clock()
        if counted is None or sum(counted.values()) <= _FEW_BLOCKS or not 0 <= now - at_s < _COUNTED_S:
            self._counted_blocks = counted, _ = self.block_budget(), now
        return counted

    def block_budget(self) -> dict[str, int]:
        """Blocks of the device by state."""
        return block_budget(self, self.offload.pinned)

    def own_blocks(self, tenant: str) -> dict[str, int]:
        """Blocks of one tenant by state."""

        def is_own(request_id: str) -> bool:
            tagged = self.tagged.get(request_id)
            return tagged is not None and tagged.tenant == tenant

        return own_blocks(self, self.offload.pinned_for(tenant), is_own)


class TokenCakeScheduler(TokenCakeMixin, Scheduler):
    """For engines without async scheduling."""


class TokenCakeAsyncScheduler(TokenCakeMixin, AsyncScheduler):
    """For engines with async scheduling."""


def create_scheduler(*args: Any, **kwargs: Any) -> TokenCakeMixin:
    """The scheduler that fits `vllm_config`; for `--scheduler-cls`, which vLLM only ever calls."""
    is_async = kwargs["vllm_config"].scheduler_config.async_scheduling
    return (TokenCakeAsyncScheduler if is_async else TokenCakeScheduler)(*args, **kwargs)
