"""Where does the Space Scheduler touch vLLM? At the waiting queue, the order of `running`, and one gate.

`schedule()` is never copied. Before a step the calls that wait and those that run are ranked: the first waiting one is
tried first, the last running one is vLLM's victim. The gate passes over calls that may not run in this step.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from vllm.logger import init_logger
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import Request, RequestStatus

from tokencake.policies.default_space import policy_of
from tokencake.space_scheduler.applications import Applications
from tokencake.space_scheduler.explain import SpaceWords
from tokencake.space_scheduler.growth import peak_blocks
from tokencake.space_scheduler.policy import Rank
from tokencake_vllm.space_scheduler.admission_gate import ADMISSIBLE, Gate
from tokencake_vllm.space_scheduler.ranked_queue import RankedQueue
from tokencake_vllm.space_scheduler.swap import Swap
from tokencake_vllm.vllm_adapter.block_pool import BlockView

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    from tokencake_vllm.scheduler import TokenCakeMixin

    _Base = TokenCakeMixin
else:
    _Base = object

logger = init_logger("vllm.tokencake")

RANKING_STEPS: Final = 16
"""Steps after which calls are ranked anew although none came, went or changed its state."""


class SpaceMixin(_Base):
    """Orders a vLLM scheduler by what `TokenCakeMixin` knows of its calls."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_space_on = self.space.enabled and self.policy == SchedulingPolicy.FCFS
        self.applications = Applications(self.registry.graphs.get, answer_quantile=self.space.answer_quantile)
        self.space_policy = policy_of(self.space)
        self._view = BlockView(self.kv_cache_manager, self.block_size)
        self._words = SpaceWords(self.space, self.space_policy, self.applications, self.registry)
        self._line = RankedQueue()
        self._needs: dict[str, int] = {}
        self._ages: dict[str, Rank] = {}
        """By request: its rank as of the last ranking, were it nobody's sibling."""
        self._steps = 0
        self._ranked_at = 0, -1
        self._is_plain = True
        """Whether no call that lives has a hint: then everything is left as it is in stock vLLM."""
        self._gate = Gate(
            self.space, self.space_policy, self.applications, self._view, self._words, self.registry, self._advice
        )
        self._swap = Swap(self, self.space, self.applications, self._view, self._gate)
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
                    tenant=self.tenant_of(request),
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
                self.applications.end(
                    request.request_id, request.num_output_tokens, is_aborted=self._is_aborted(request), now=now
                )
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
            now = time.monotonic()
            leaving: list[Request] = []
            with self._advice():
                leaving = self._rank(now)
            self._swap_out(leaving, now)
        output = super().schedule(*args, **kwargs)
        with self._advice():
            self._note_started(output, time.monotonic(), is_ranked=is_ranked)
        self._gate.reset()
        return output

    def _rank(self, now: float) -> list[Request]:
        """Rank all anew; returns the running calls that are to be swapped out."""
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
        self._is_plain = all(call.hint is None for call in self.applications.calls.values())
        if not self._is_plain:
            self._sort()
        # Pins that were left when another call was first in line go before any running call does.
        return [] if self._yield_pins() or self._is_plain else self._swap.choose(self._ages, now)

    def _swap_out(self, leaving: list[Request], now: float) -> None:
        """Let running calls of young applications give way to the first in line, as vLLM preempts."""
        for request in leaving:
            self.running.remove(request)
            self._preempt_request(request, now, drop_stale_output=self.requires_kv_delivery)
            self.registry.counts["space_swaps",] += 1
        if leaving:
            with self._advice():
                self._sort()

    def _sort(self) -> None:
        siblings = self._siblings()
        self._needs, self._ages = {}, {}

        def rank_of(request: Request) -> Rank:
            name = request.request_id
            self._needs[name] = need = self._view.blocks_of(request.num_tokens)
            call = self.applications.calls.get(name)
            if call is None:  # it came while the plug-in failed: behind all others, in the order of arrival
                return (float("inf"), request.arrival_time)
            self._ages[name] = rank = self.space_policy.rank(call, need_blocks=need, is_sibling=False)
            return self.space_policy.rank(call, need_blocks=need, is_sibling=True) if name in siblings else rank

        self._line.sort(rank_of)
        self.running.sort(key=rank_of)

    def _siblings(self) -> set[str]:
        """Waiting calls most of whose prompt is held by others: they cost little, now."""
        found: set[str] = set()
        if not self.running:
            return found
        storing = self.storing()  # what a copy still reads of a call that lost its blocks makes nobody its sibling
        for request, _ in zip(self._line, range(self.space.scan), strict=False):
            if request.status in ADMISSIBLE:
                held = self._view.held_prefix_blocks(request, storing)
                if held and held >= self._view.blocks_of(request.num_tokens) - held:
                    found.add(request.request_id)
        return found

    def _note_started(self, output: SchedulerOutput, now: float, *, is_ranked: bool) -> None:
        started = [new.req_id for new in output.scheduled_new_reqs]
        started += output.scheduled_cached_reqs.resumed_req_ids
        self._swap.note_step(output)
        for name in started:
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
            now = time.monotonic()
            call = self.applications.calls.get(request.request_id)
            if call is None or self._is_plain or not (self.running or self._inflight_prefills):
                return True
            if not self._swap.may_start(request.request_id, now):
                self._gate.note_kept(request, call, now)
                return False
            return self._gate.admits(request, call, self.admitted, now)
        return True

    def admitted(self) -> list[Request]:
        """Who has blocks: the calls that run and those that load their prefix."""
        loading = [request for request in self._inflight_prefills if request.status != RequestStatus.RUNNING]
        return [*self.running, *loading]

    # --- views ---------------------------------------------------------------------------------------

    def _held_share(self, request: Request) -> float:
        return self._view.blocks_of(request.num_computed_tokens) / self._view.total_blocks

    def tokencake_decisions(
        self, call: str | None, app: str | None, limit: int, tenant: str | None = None, before: float | None = None
    ) -> dict[str, Any]:
        """A page of decisions, for `GET /v1/tokencake/decisions`."""
        return self._words.view(
            self.epoch_offset_s(),
            time.monotonic(),
            call=call,
            app=app,
            tenant=tenant,
            limit=limit,
            before=before,
        )

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
