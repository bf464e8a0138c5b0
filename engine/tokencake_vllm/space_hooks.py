"""Where does the Space Scheduler touch vLLM? At the waiting queue, the order of `running`, and one gate.

`schedule()` is never copied. Before a step the calls that wait and those that run are ranked: the first waiting one is
tried first, the last running one is vLLM's victim. The gate passes over calls that may not run in this step.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from vllm.logger import init_logger
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import Request, RequestStatus

from tokencake.applications import Applications
from tokencake.promises import peak_blocks, tokens_until_free
from tokencake.settings import section
from tokencake.space_policy import Rank
from tokencake.space_scheduler import by_age, policy_of
from tokencake.space_settings import SpaceSettings
from tokencake.space_words import SpaceWords
from tokencake.swap import Candidate, swap_victims
from tokencake_vllm.block_view import BlockView
from tokencake_vllm.space_gate import ADMISSIBLE, Gate
from tokencake_vllm.waiting_queue import RankedQueue

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    from tokencake_vllm.scheduler import TokenCakeMixin

    _Base = TokenCakeMixin
else:
    _Base = object

logger = init_logger("vllm.tokencake")

RANKING_STEPS: Final = 16
"""Steps after which calls are ranked anew although none came, went or changed its state."""

_RESTORED: Final = 0.9
"""Share of a swapped call's tokens that must be found again for swapping to go on."""


class SpaceMixin(_Base):
    """Orders a vLLM scheduler by what `TokenCakeMixin` knows of its calls."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.vllm_config.additional_config
        self.space = section(config if isinstance(config, dict) else None, "space", SpaceSettings)
        self._is_space_on = self.space.enabled and self.policy == SchedulingPolicy.FCFS
        self.applications = Applications(
            self.registry.graphs.get,
            tenant_mark=self.space.tenant_mark,
            answer_quantile=self.space.answer_quantile,
        )
        self.space_policy = policy_of(self.space)
        self._view = BlockView(self.kv_cache_manager, self.block_size)
        self._words = SpaceWords(self.space, self.space_policy, self.applications, self.registry)
        self._line = RankedQueue()
        self._needs: dict[str, int] = {}
        self._steps = 0
        self._ranked_at = 0, -1
        self._gate = Gate(self.space, self.space_policy, self.applications, self._view, self._words, self.registry)
        self._swapped: set[str] = set()
        """Calls pushed out in this step."""
        self._restored_share = 1.0
        if self._is_space_on:
            self.waiting = self._line
        elif self.space.enabled:
            logger.warning("TokenCake: --policy priority was asked for; the Space Scheduler stays out of its way")

    # --- what happens to a request ------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Stock, then note its application."""
        is_new = request.request_id not in self.requests
        super().add_request(request)
        if self._is_space_on and is_new:
            with self._advice():
                self.applications.add(
                    request.request_id,
                    self.registry.hint_of(request.request_id),
                    prompt_tokens=request.num_prompt_tokens,
                    max_tokens=request.max_tokens,
                    now=time.monotonic(),
                )

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        if self._is_space_on:
            with self._advice():
                now = time.monotonic()
                self.applications.charge(request.request_id, self._held_share(request), now)
                self.applications.stop(request.request_id)
                self._words.note_preempted(request.request_id, [other.request_id for other in self.running], now)
        super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if self._is_space_on:
            with self._advice():
                now = time.monotonic()
                self.applications.charge(request.request_id, self._held_share(request), now)
                is_aborted = request.status in (RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR)
                self.applications.end(request.request_id, request.num_output_tokens, is_aborted=is_aborted, now=now)
                self._words.forget(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    # --- the step -----------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Rank, then stock, then note who got a slot."""
        if not self._is_space_on:
            return super().schedule(*args, **kwargs)
        self._steps += 1
        step, version = self._ranked_at
        is_ranked = self.applications.version != version or self._steps - step >= RANKING_STEPS
        if is_ranked:
            with self._advice():
                self._rank(time.monotonic())
        output = super().schedule(*args, **kwargs)
        with self._advice():
            self._note_started(output, time.monotonic(), is_ranked=is_ranked)
        self._swapped.clear()
        self._gate.reset()
        return output

    def _rank(self, now: float) -> None:
        self._ranked_at = self._steps, self.applications.version
        for request in self.running:
            self.applications.charge(request.request_id, self._held_share(request), now)
        self._gate.private_blocks = {
            request.request_id: self._view.private_blocks(request.request_id)
            for request in self.running
            if request.request_id in self.applications.calls
        }
        self._gate.step = self._steps
        self.space_policy.begin(self.applications, self._gate.memory(), now)
        self._sort()
        if self._swap(now):
            self._sort()

    def _sort(self) -> None:
        siblings = self._siblings()
        self._needs = {}

        def rank_of(request: Request) -> Rank:
            name = request.request_id
            self._needs[name] = need = self._view.blocks_of(request.num_tokens)
            call = self.applications.calls.get(name)
            if call is None:  # it came while the plug-in failed: behind all others, in the order of arrival
                return (float("inf"), request.arrival_time)
            return self.space_policy.rank(call, need_blocks=need, is_sibling=name in siblings)

        self._line.sort(rank_of)
        self.running.sort(key=rank_of)

    def _siblings(self) -> set[str]:
        """Waiting calls most of whose prompt is held by others: they cost little, now."""
        found: set[str] = set()
        if not self.running:
            return found
        for request, _ in zip(self._line, range(self.space.scan), strict=False):
            if request.status in ADMISSIBLE:
                held = self._view.held_prefix_blocks(request)
                if held and held >= self._view.blocks_of(request.num_tokens) - held:
                    found.add(request.request_id)
        return found

    def _note_started(self, output: SchedulerOutput, now: float, *, is_ranked: bool) -> None:
        started = [new.req_id for new in output.scheduled_new_reqs]
        started += output.scheduled_cached_reqs.resumed_req_ids
        for name in started:
            call, request = self.applications.calls.get(name), self.requests[name]
            if call is not None and call.swaps and request.num_preemptions:
                found = 1 - output.num_scheduled_tokens[name] / max(1, request.num_tokens)
                self._restored_share += 0.5 * (found - self._restored_share)
            self.applications.start(name, now)
        if is_ranked or started:
            waiting = [request.request_id for request in self._line if request.status in ADMISSIBLE]
            self._words.note_waiting(waiting, started, self._line.ranks, self._needs, self._view.free_blocks, now)

    # --- the gate -----------------------------------------------------------------------------------

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Stock, and then whether the call may run in this step. Whoever may not is passed over."""
        if not super()._handle_blocked_waiting_request(request):
            return False
        if not self._is_space_on or self._holds_kv_blocks(request):
            return True
        with self._advice():
            name = request.request_id
            if name in self._swapped:
                return False  # its blocks were taken for somebody else a moment ago
            call = self.applications.calls.get(name)
            if call is None or not (self.running or self._inflight_prefills):
                return True
            return self._gate.admits(request, call, self._admitted, time.monotonic())
        return True

    def _admitted(self) -> list[Request]:
        """Who has blocks: the calls that run and those that load their prefix."""
        loading = [request for request in self._inflight_prefills if request.status != RequestStatus.RUNNING]
        return [*self.running, *loading]

    # --- the swap -----------------------------------------------------------------------------------

    def _swap(self, now: float) -> bool:
        """Swap calls of young applications out for the first in line; whether any was."""
        # By and by it is tried again whether the host has become large enough.
        self._restored_share = min(1.0, self._restored_share + 1e-5)
        if not self._can_swap or not self._line or self.kv_holding_waiting or self.pause_state != PauseState.UNPAUSED:
            return False
        request = self._line.peek_request()
        head = self.applications.calls.get(request.request_id)
        if head is None or request.status not in ADMISSIBLE:
            return False
        need = self._view.blocks_of(request.num_tokens) - self._view.held_prefix_blocks(request)
        need += self._inflight_prefill_reserved_blocks()
        coming = sum(len(blocks) for _, blocks in self.deferred_frees)
        free = self._view.free_blocks + coming
        short = need - free
        if short <= 0 or self._yield_pins():  # those were left when another call was first in line
            return False
        promises = [self._gate.promise(other) for other in self.running]
        if tokens_until_free(promises, need, free, self.block_size) <= self.space.swap_patience_tokens:
            return False
        calls, private = self.applications.calls, self._gate.private_blocks
        running = {other.request_id: other for other in self.running if other.request_id in calls}
        victims = swap_victims(
            head,
            short,
            [
                Candidate(
                    calls[name],
                    private.get(name, 0),
                    self._view.allocated_blocks(name) - private.get(name, 0),
                    self._gate.left_tokens(other),
                )
                for name, other in running.items()
                # What has just begun has nothing on the host yet.
                if other.num_computed_tokens - other.num_in_flight_tokens >= other.num_prompt_tokens
            ],
            by_age(calls.values(), self.space_policy, self._needs),
            self.space,
        )
        for victim in victims:
            name = victim.call.request_id
            self.running.remove(running[name])
            self._preempt_request(running[name], now, drop_stale_output=self.requires_kv_delivery)
            victim.call.swaps += 1
            self._swapped.add(name)
            self.registry.counts["space_swaps",] += 1
            self._words.note_swapped(victim.call, head, now)
        return bool(victims)

    @property
    def _can_swap(self) -> bool:
        is_wanted = self.space.policy == "ours" and self.space.swap_oldest > 0
        return is_wanted and self.connector is not None and self._restored_share >= _RESTORED

    # --- views ---------------------------------------------------------------------------------------

    def _held_share(self, request: Request) -> float:
        return self._view.blocks_of(request.num_computed_tokens) / self._view.total_blocks

    def tokencake_decisions(
        self, call: str | None, app: str | None, limit: int, tenant: str | None = None
    ) -> dict[str, Any]:
        """The newest decisions, for `GET /v1/tokencake/decisions`."""
        offset_s = time.time() - time.monotonic()
        return self._words.view(offset_s, time.monotonic(), call=call, app=app, tenant=tenant, limit=limit)

    def tokencake_metrics(self) -> dict[str, Any]:
        """With what is promised and reserved, and who waits longest."""
        drained = super().tokencake_metrics()
        if self._is_space_on:
            with self._advice():
                promises = [self._gate.promise(request) for request in self.running]
                drained["gauges"]["promised_blocks"] = peak_blocks(promises, self.block_size)
                drained["gauges"]["longest_wait_s"] = self._words.longest_wait_s(time.monotonic())
                drained["labelled"]["space_reserve_blocks"] = self.space_policy.reserve()
        return drained
