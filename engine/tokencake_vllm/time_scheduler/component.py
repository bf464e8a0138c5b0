"""Where does the Time Scheduler touch vLLM? At the arrival and the end of a call, around each step, and at events.

Without our connector, or with `time.enabled=false`, every method is stock vLLM's. An exception in ours is advice that
was not given: it is logged and counted, and the request goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.request import Request, RequestStatus

from tokencake import protocol
from tokencake_vllm.connector import TokenCakeConnector
from tokencake_vllm.time_scheduler.forecast_file import ForecastFile
from tokencake_vllm.time_scheduler.stall_manager import TimeEngine
from tokencake_vllm.vllm_adapter.block_accounting import block_budget, own_blocks

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    from tokencake_vllm.scheduler import TokenCakeMixin

    _Base = TokenCakeMixin
else:
    _Base = object

logger = init_logger("vllm.tokencake")


class TimeMixin(_Base):
    """Moves the KV of stalled agents between the device and the host."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.time: TimeEngine | None = None
        connector = self.connector
        if isinstance(connector, TokenCakeConnector) and connector.cache is not None:
            self.time = engine = TimeEngine(self, connector.cache, connector.settings)
            self._forecast_file = ForecastFile(engine.book.forecast, connector.settings.forecast_file)
            connector.on_finished = self._finish_call
            logger.info(
                "TokenCake: Time Scheduler `%s`, %d blocks of host memory",
                connector.settings.policy,
                connector.cache.tier.capacity,
            )

    # --- a call ---------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Stock, then see whose stall this call ends."""
        is_new = request.request_id not in self.requests
        super().add_request(request)
        if self.time is not None and is_new:
            with self._advice():
                self.time.arrive(request, time.monotonic())

    def _finish_call(self, request: Request) -> dict[str, Any] | None:
        """Called by the connector while the call still holds its blocks."""
        told = None
        with self._advice():
            if self.time is not None:
                told = self.time.finish(request, time.monotonic())
        return told

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        if self.time is not None:
            with self._advice():
                self.time.preempt(request)
        super()._preempt_request(request, *args, **kwargs)

    # --- the step -------------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """What is due, then stock, then see who got a slot."""
        if self.time is None:
            return super().schedule(*args, **kwargs)
        with self._advice():
            self.time.before_step(time.monotonic())
        output = super().schedule(*args, **kwargs)
        with self._advice():
            started = [self.requests[new.req_id] for new in output.scheduled_new_reqs]
            self.time.after_step(started, list(output.scheduled_cached_reqs.resumed_req_ids), time.monotonic())
        return output

    def _yield_pins(self) -> bool:
        if self.time is None or not self.time.cache.held:
            return False
        before = len(self.time.cache.held)
        self.time.yield_pins()
        return len(self.time.cache.held) < before

    def can_restore(self) -> bool:
        """As far as the host has room."""
        return self.time is not None and self.time.can_restore

    def storing(self) -> Mapping[int, int]:
        """Of the copies under way."""
        return {} if self.time is None else self.time.cache.transfers.storing()

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Stock; and if the engine may sleep now, see that it wakes up in time."""
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)
        if self.time is not None:
            with self._advice():
                self.time.complete_step(scheduler_output.total_num_scheduled_tokens, time.monotonic())
                self._arm()
        return outputs

    def has_requests(self) -> bool:
        """Also when something of ours is due: the step that follows takes it off the list."""
        return super().has_requests() or (self.time is not None and self.time.alarm.is_due(time.monotonic()))

    def next_due_s(self) -> float | None:
        """When the engine wants a step although it may have no call; None where it does not."""
        return None if self.time is None else self.time.alarm.next_s(self.time.is_stalled)

    def bind_waker(self, wake: Callable[[], None]) -> None:
        """`wake` makes the engine loop look for work; callable from any thread."""
        if self.time is not None:
            self.time.alarm.wake = wake

    def _arm(self) -> None:
        if self.time is not None and not super().has_requests():
            self.time.alarm.arm(time.monotonic(), self.time.is_stalled)

    # --- what the API server asks for -------------------------------------------------------------------

    def tokencake_events(self, events: list[dict[str, Any]], received: float, tenant: str = "") -> dict[str, Any]:
        """Take them in, then see whose stall changed."""
        answer = super().tokencake_events(events, received, tenant)
        if self.time is not None:
            now = time.monotonic()
            for event, outcome in zip(events, answer["outcomes"], strict=True):
                if outcome in ("applied", "late"):
                    with self._advice():
                        self.time.hear(_scoped(event, tenant), now)
            with self._advice():
                self._forecast_file.save(now)
                self._arm()
        return answer

    def tokencake_state(
        self,
        session: str | None,
        app: str | None,
        limit: int,
        tenant: str | None = None,
        before: float | None = None,
    ) -> dict[str, Any]:
        """The registry's state, with where each session's KV is, and why the Time Scheduler is off if it is."""
        state = super().tokencake_state(session, app, limit, tenant, before)
        state["time"] = {"off": self._off_reason(), "host_blocks": self.time.cache.tier.capacity if self.time else 0}
        if self.time is not None:
            for name, view in state["sessions"].items():
                view["kv"] = self.time.residency(name)
        return state

    def _off_reason(self) -> str | None:
        if self.time is not None:
            return self.time.cache.off_reason
        if isinstance(self.connector, TokenCakeConnector):
            return self.connector.off_reason
        return "the engine was not started with TokenCakeConnector"

    def block_budget(self) -> dict[str, int]:
        """What is held for stalled agents is told apart."""
        return block_budget(self, {} if self.time is None else self.time.cache.held)

    def own_blocks(self, tenant: str) -> dict[str, int]:
        """Its stalled agents' included."""
        return own_blocks(self, [] if self.time is None else self.time.held_for(tenant), tenant)

    def tokencake_wipe(self) -> int:
        """With `debug_checksums`: overwrite every free device block, to prove that what is hit later was copied."""
        if self.time is None or not self.time.settings.debug_checksums:
            return 0
        return self.time.cache.wipe()

    def reset_prefix_cache(self, reset_running_requests: bool = False, *args: Any, **kwargs: Any) -> bool:
        """Stock, after everything that we hold was given back; vLLM's sleep and its weight updates come here too."""
        if self.time is None:
            return super().reset_prefix_cache(reset_running_requests, *args, **kwargs)
        self.time.is_resetting = True
        try:
            with self._advice():
                self.time.reset()
                if reset_running_requests:
                    self._forget_loads()
            with self.time.cache.lent():
                return super().reset_prefix_cache(reset_running_requests, *args, **kwargs)
        finally:
            self.time.is_resetting = False

    def _forget_loads(self) -> None:
        """Calls whose prefix came from the host compute it: it is as old as the rest."""
        for request in list(self.kv_holding_waiting):
            if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
                request.num_computed_tokens = 0
                self.failed_recving_kv_req_ids.add(request.request_id)
                if request.request_id in self.finished_recving_kv_req_ids:
                    self._update_waiting_for_remote_kv(request)
                    request.status = RequestStatus.PREEMPTED if request.num_preemptions else RequestStatus.WAITING


def _scoped(event: dict[str, Any], tenant: str) -> dict[str, Any]:
    return protocol.to_wire(protocol.scoped(protocol.parse_event(event), tenant)) if tenant else event
