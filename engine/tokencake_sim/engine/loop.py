"""The engine loop in virtual time.

    schedule() -> what does it cost? -> clock forward -> update_from_output()

With async scheduling two batches are under way: the second is scheduled while the device works on the first. Calls and
events that come in the meantime wait in the inbox, as they wait in vLLM's input queue. A scheduler that has a method
`next_due_s() -> float | None` is stepped at that time of its clock even where it has no call.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from tokencake.protocol import HINT_KEY, to_wire
from tokencake_sim.errors import DeadlockError
from tokencake_sim.workload.tokens import prompt_ids

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.outputs import KVConnectorOutput

    from tokencake.protocol import Event, Hint
    from tokencake_sim.clients.calls import SimCall
    from tokencake_sim.device.clock import Clock
    from tokencake_sim.device.worker import Worker
    from tokencake_sim.engine.observer import StepObserver

_EMPTY_STEPS: Final = 4
"""Steps without tokens in one moment after which only the passing of time can help."""


def _never() -> None:
    """The due time of a scheduler that has none."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """A step under way."""

    output: SchedulerOutput
    sampling: frozenset[str]
    """Calls that get a token from the step: their prefill is complete."""
    ends_s: float
    transfers: KVConnectorOutput | None

    @property
    def moves(self) -> bool:
        """Whether the step changes anything."""
        return self.output.total_num_scheduled_tokens > 0 or self.transfers is not None


class EngineLoop:
    """One scheduler, its modelled device and its inbox."""

    def __init__(
        self,
        scheduler: Scheduler,
        worker: Worker,
        clock: Clock,
        observer: StepObserver,
        *,
        vocabulary: int,
        priority_of: Callable[[SimCall], int] | None,
    ) -> None:
        self.scheduler = scheduler
        self._worker = worker
        self._clock = clock
        self._observer = observer
        self._vocabulary = vocabulary
        self._priority_of = priority_of
        self._hasher = get_request_block_hasher(scheduler.block_size, sha256)
        self._depth = 2 if scheduler.scheduler_config.async_scheduling else 1
        self._under_way: deque[_Batch] = deque()
        self._device_free_s = 0.0
        self._inbox: deque[Request | tuple[Event, float]] = deque()
        self._calls: dict[str, SimCall] = {}
        self._empty_steps = 0
        self._next_due_s: Callable[[], float | None] = getattr(scheduler, "next_due_s", _never)

    # --- for the clients -----------------------------------------------------------------------

    def submit(self, call: SimCall, hint: Hint | None) -> None:
        """Queue a call for the next step."""
        self._calls[call.id] = call
        self._inbox.append(
            Request(
                request_id=call.id,
                prompt_token_ids=prompt_ids(call.texts, self._vocabulary),
                sampling_params=SamplingParams(
                    temperature=0.0,
                    ignore_eos=True,
                    max_tokens=len(call.answer),
                    extra_args=None if hint is None else {HINT_KEY: hint.to_json()},
                ),
                pooling_params=None,
                arrival_time=self._clock.now_s,
                priority=0 if self._priority_of is None else self._priority_of(call),
                block_hasher=self._hasher,
            )
        )

    def send(self, event: Event) -> None:
        """Queue an event for the moment between two steps."""
        self._inbox.append((event, self._clock.now_s))

    # --- the loop -----------------------------------------------------------------------------------

    def run(self, is_over: Callable[[], bool], on_answer: Callable[[SimCall], None]) -> None:
        """Run until the applications are over.

        Raises:
            DeadlockError: nothing runs, something waits and no event is pending.
        """
        while not is_over():
            self._empty_inbox()
            if self._under_way or self.scheduler.has_requests() or self._is_due():
                self._step(on_answer)
            else:
                self._wait_idle()

    def _empty_inbox(self) -> None:
        while self._inbox:
            match self._inbox.popleft():
                case Request() as request:
                    self.scheduler.add_request(request)
                case (event, received_s):
                    listen = getattr(self.scheduler, "tokencake_events", None)
                    if listen is not None:
                        # Through JSON, as on the wire: what arrives has lists where the records have tuples.
                        listen([json.loads(json.dumps(to_wire(event)))], received_s)

    def _step(self, on_answer: Callable[[SimCall], None]) -> None:
        if self.scheduler.has_requests() or self._is_due():
            batch = self._dispatch(self.scheduler.schedule())
            self._under_way.append(batch)
            if len(self._under_way) < self._depth and (
                batch.output.total_num_scheduled_tokens or self.scheduler.has_requests()
            ):
                return
        batch = self._under_way.popleft()
        self._pass_time(batch.ends_s)
        has_moved = self._complete(batch, on_answer)
        self._empty_steps = 0 if has_moved else self._empty_steps + 1
        is_stuck = self._empty_steps >= _EMPTY_STEPS and not any(batch.moves for batch in self._under_way)
        if is_stuck and not self._inbox and self.scheduler.has_requests():
            self._wait_for_change()

    def _dispatch(self, output: SchedulerOutput) -> _Batch:
        now_s = self._clock.now_s
        begins_s = max(now_s, self._device_free_s)
        self._worker.start(output.kv_connector_metadata, now_s, begins_s)
        ends_s = now_s
        if output.total_num_scheduled_tokens:
            ends_s = self._device_free_s = begins_s + self._observer.step_s(
                self.scheduler, output, self._calls, begins_s
            )
        self._observer.account()
        sampling = frozenset(
            name for name in output.num_scheduled_tokens if not self.scheduler.requests[name].is_prefill_chunk
        )
        return _Batch(output, sampling, ends_s, self._worker.finished(now_s))

    def _complete(self, batch: _Batch, on_answer: Callable[[SimCall], None]) -> bool:
        names = list(batch.output.num_scheduled_tokens)
        requests = {name: self.scheduler.requests[name] for name in names if name in self.scheduler.requests}
        sampled = [self._sample(name) if name in batch.sampling else [] for name in names]
        outputs = self.scheduler.update_from_output(
            batch.output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=sampled,
                kv_connector_output=batch.transfers,
            ),
        )
        self._observer.account()
        for answer in (answer for client in outputs.values() for answer in client.outputs):
            call = self._calls[answer.request_id]
            self._observer.take(call, answer)
            if answer.finished:
                self._observer.record_finished(requests[call.id], call)
                self._end(call, answer)
                on_answer(call)
        return batch.moves

    def _sample(self, name: str) -> list[int]:
        request = self.scheduler.requests.get(name)
        position = request.num_output_tokens if request is not None else 0
        answer = self._calls[name].answer
        # A step under way when its call got the last token samples once more; vLLM drops that token.
        return [answer[min(position, len(answer) - 1)]]

    def _end(self, call: SimCall, answer: EngineCoreOutput) -> None:
        if len(call.answer) != call.answered_tokens:
            raise RuntimeError(
                f"call {call.id} ended as {answer.finish_reason} after {call.answered_tokens} tokens, "
                f"not {len(call.answer)}"
            )
        del self._calls[call.id]

    # --- time without a step ------------------------------------------------------------------------

    def _pass_time(self, until_s: float) -> None:
        self._observer.account()
        self._observer.sample(until_s)
        self._clock.advance_to(until_s)

    def _is_due(self) -> bool:
        due_s = self._next_due_s()
        # A due time that stays in the past after so many steps is waiting for something else.
        return due_s is not None and due_s <= self._clock.now_s and self._empty_steps < _EMPTY_STEPS

    def _coming(self) -> list[float]:
        """Times at which something happens without a step."""
        due_s = self._next_due_s()
        later_s = due_s if due_s is not None and due_s > self._clock.now_s else None
        return [time_s for time_s in (self._clock.next_s, later_s) if time_s is not None]

    def _wait_idle(self) -> None:
        coming = self._coming()
        if not coming:
            raise DeadlockError(f"the engine is idle and applications wait for each other\n{self._state()}")
        self._pass_time(min(coming))
        self._empty_steps = 0

    def _wait_for_change(self) -> None:
        coming = self._coming()
        if self._worker.next_s is not None:
            coming.append(self._worker.next_s)
        if not coming:
            raise DeadlockError(f"nothing runs, something waits and no event is pending\n{self._state()}")
        until_s = max(self._clock.now_s, min(coming))
        is_copying = self._worker.next_s is not None
        self._observer.idle(self.scheduler, until_s - self._clock.now_s, is_copying=is_copying)
        self._pass_time(until_s)
        self._empty_steps = 0

    def _state(self) -> str:
        pool = self.scheduler.kv_cache_manager.block_pool
        free, total = pool.get_num_free_blocks(), pool.num_gpu_blocks - 1
        calls = (
            f"  {name}: {RequestStatus(request.status).name}, "
            f"{request.num_computed_tokens} of {request.num_tokens} tokens"
            for name, request in self.scheduler.requests.items()
        )
        return "\n".join((f"time {self._clock.now_s:.3f} s, {free} of {total} blocks free", *calls))
