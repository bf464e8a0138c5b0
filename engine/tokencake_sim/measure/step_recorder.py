"""Record of steps and calls, measured outside the scheduler: no policy reports on itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.engine import EngineCoreEventType
from vllm.v1.request import RequestStatus

from tokencake_sim.device.cost import StepLoad

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.request import Request

    from tokencake_sim.clients.calls import SimCall
    from tokencake_sim.device.clock import Clock
    from tokencake_sim.device.cost import StepCostModel
    from tokencake_sim.measure.kv_occupancy import KVOccupancy


class StepRecorder:
    """Step costs and counters of one run: a `StepObserver`."""

    def __init__(
        self,
        clock: Clock,
        cost: StepCostModel,
        occupancy: KVOccupancy,
        *,
        block_tokens: int,
        sample_s: float,
        is_recompute_free: bool,
    ) -> None:
        self.steps = 0
        self.busy_s = 0.0
        self.running_call_s = 0.0
        """Device seconds times calls in the batch."""
        self.prefill_tokens = 0
        """Prompt tokens computed for calls that were never preempted."""
        self.recomputed_tokens = 0
        """Tokens computed again for calls that were preempted."""
        self.lost_prefix_tokens = 0
        """Of both, the tokens whose KV had been on this device before."""
        self.decode_tokens = 0
        self.preemptions = 0
        self.preemption_inversions = 0
        self.admission_inversions = 0
        self.idle_while_admissible_s = 0.0
        self.idle_while_waiting_s = 0.0
        self.trace: list[tuple[float, int, int]] = []
        """Start, tokens and calls of every step, by which two runs are compared."""
        self._clock = clock
        self._cost = cost
        self._block_tokens = block_tokens
        self._occupancy = occupancy
        self.stalled: Callable[[], Iterable[SimCall]] = tuple
        """Calls whose tool is running; set when there are applications."""
        self._sample_s = sample_s
        self._next_sample_s = 0.0
        self._is_recompute_free = is_recompute_free
        self._ever_computed: set[bytes] = set()

    def step_s(
        self, scheduler: Scheduler, output: SchedulerOutput, calls: dict[str, SimCall], begins_s: float
    ) -> float:
        """Seconds that the device needs for a step; counts what the step computes."""
        prefill, free, decode_seqs, read = 0, 0, 0, 0
        for name, count in output.num_scheduled_tokens.items():
            request, call = scheduler.requests[name], calls[name]
            end = request.num_computed_tokens
            begin = end - count
            if count == 1 and begin >= request.num_prompt_tokens:
                decode_seqs += 1
                read += end
                self.decode_tokens += 1
            else:
                prefill += count
                lost = self._note_prefill(request, call, begin, end)
                free += lost if self._is_recompute_free else 0
            call.computed_to = max(call.computed_to, end)
        self._note_order(scheduler, output, calls)
        seconds = self._cost.step_s(StepLoad(prefill - free, max(decode_seqs, free > 0), read))
        self.steps += 1
        self.busy_s += seconds
        self.running_call_s += seconds * len(output.num_scheduled_tokens)
        self.trace.append((begins_s, output.total_num_scheduled_tokens, len(output.num_scheduled_tokens)))
        return seconds

    def _note_prefill(self, request: Request, call: SimCall, begin: int, end: int) -> int:
        if request.num_preemptions:
            self.recomputed_tokens += end - begin
            call.recomputed_tokens += end - begin
        else:
            self.prefill_tokens += end - begin
            call.prefilled_tokens += end - begin
        size, lost = self._block_tokens, 0
        for block_hash in request.block_hashes[begin // size : end // size]:
            if block_hash in self._ever_computed:
                lost += size
            else:
                self._ever_computed.add(block_hash)
        lost = min(lost, end - begin)
        self.lost_prefix_tokens += lost
        return lost

    def _note_order(self, scheduler: Scheduler, output: SchedulerOutput, calls: dict[str, SimCall]) -> None:
        scheduled = [calls[name] for name in output.num_scheduled_tokens]
        victims = output.preempted_req_ids or ()
        self.preemptions += len(victims)
        has_minor = any(not call.place.is_critical for call in scheduled)
        self.preemption_inversions += sum(calls[name].place.is_critical and has_minor for name in victims)
        admitted = [new.req_id for new in output.scheduled_new_reqs] + list(
            output.scheduled_cached_reqs.resumed_req_ids
        )
        minors = [name for name in admitted if not calls[name].place.is_critical]
        if minors and any(
            calls[request.request_id].place.is_critical
            for request in scheduler.waiting
            if request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        ):
            self.admission_inversions += len(minors)

    def take(self, call: SimCall, output: EngineCoreOutput) -> None:
        """Record an answer, or a part of one, that the engine gave now."""
        now_s = self._clock.now_s
        for event in output.events or ():
            if event.type == EngineCoreEventType.SCHEDULED and call.scheduled_s is None:
                call.scheduled_s = event.timestamp
            elif event.type == EngineCoreEventType.PREEMPTED:
                call.preemptions += 1
        if output.prefill_stats is not None and not call.answered_tokens:
            call.device_hit_tokens = output.prefill_stats.num_local_cached_tokens
            call.host_hit_tokens = output.prefill_stats.num_external_cached_tokens
        if output.new_token_ids and call.first_token_s is None:
            call.first_token_s = now_s
        call.answered_tokens += len(output.new_token_ids)
        if output.finished:
            call.finished_s = now_s

    def record_finished(self, request: Request, call: SimCall) -> None:
        """Record the blocks of a call that is about to leave the scheduler."""
        call.block_hashes = list(request.block_hashes)
        self._ever_computed.update(request.block_hashes)

    def idle(self, scheduler: Scheduler, seconds: float, *, is_copying: bool) -> None:
        """Record that the device stands still for `seconds` although the scheduler has requests.

        While a copy is under way, calls may have to wait for it or for the blocks that it holds.
        """
        waiting = [
            request
            for queue in (scheduler.kv_holding_waiting, scheduler.waiting)
            for request in queue
            if request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        ]
        if not waiting or scheduler.running:
            return
        self.idle_while_waiting_s += seconds
        needs = (-(-request.num_tokens // scheduler.block_size) for request in waiting)
        if not is_copying and any(need <= self._occupancy.free_blocks for need in needs):
            self.idle_while_admissible_s += seconds

    def account(self) -> None:
        """Account for the blocks held since the last call."""
        self._occupancy.account()

    def sample(self, until_s: float) -> None:
        """Record the state of the KV cache where a sampling time lies before `until_s`."""
        if self._next_sample_s <= until_s:
            self._occupancy.sample(self.stalled())
            self._next_sample_s = until_s + self._sample_s
