"""The Space Scheduler on vLLM: order of the waiting queue and of `running`, the admission gate, and swapping.

Before a step all requests are ranked: vLLM tries the first waiting one first and preempts the last running one. The
gate skips waiting requests that may not start in this step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from vllm.logger import init_logger
from vllm.v1.core.sched.request_queue import SchedulingPolicy

from tokencake.policies.registry import ADMISSION
from tokencake.space_scheduler.applications import AppTracker
from tokencake.space_scheduler.explain import DecisionExplainer
from tokencake.space_scheduler.growth import peak_blocks
from tokencake_vllm.component import SchedulerComponent, TaggedRequest
from tokencake_vllm.space_scheduler.admission_gate import AdmissionGate
from tokencake_vllm.space_scheduler.ranked_queue import RankedQueue
from tokencake_vllm.space_scheduler.swap import Swap
from tokencake_vllm.vllm_adapter.block_view import BlockView
from tokencake_vllm.vllm_adapter.requests import (
    ADMISSIBLE,
    admitted_requests,
    has_admitted,
    is_aborted,
    started_requests,
)

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    from tokencake.registry.registry import Registry
    from tokencake.space_scheduler.policy import Rank
    from tokencake.space_scheduler.settings import SpaceSettings
    from tokencake_vllm.component import ErrorContainment, Offload

logger = init_logger("vllm.tokencake")

RANKING_STEPS: Final = 16
"""Requests are ranked again after this many steps, even if none came, went or changed its state."""


class SpaceComponent(SchedulerComponent):
    """Orders and admits the requests of `scheduler`.

    Args:
        scheduler: vLLM's; its waiting queue is replaced where the Space Scheduler is on.
        settings: the section `space`.
        registry: sessions, graphs and counters.
        offload: what moves blocks to the host.
        contain_errors: where errors of the plug-in end.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        settings: SpaceSettings,
        registry: Registry,
        offload: Offload,
        contain_errors: ErrorContainment,
    ) -> None:
        self.is_on = settings.enabled and scheduler.policy == SchedulingPolicy.FCFS
        self.settings = settings
        self.applications = AppTracker(registry.graphs.get, answer_quantile=settings.answer_quantile)
        self.policy = ADMISSION[settings.policy](settings)
        self.queue = RankedQueue()
        self._scheduler, self._registry, self._offload = scheduler, registry, offload
        self._view = BlockView(scheduler.kv_cache_manager, scheduler.block_size)
        self.explainer = DecisionExplainer(settings, self.policy, self.applications, registry)
        self.gate = AdmissionGate(
            settings, self.policy, self.applications, self._view, self.explainer, registry, contain_errors
        )
        self.swap = Swap(scheduler, settings, self.policy, self.applications, self._view, self.gate, offload)
        self._needs: dict[str, int] = {}
        self._ages: dict[str, Rank] = {}
        """Rank of each request as of the last ranking, without the bonus for a shared prefix."""
        self._steps = 0
        self._ranked_at = 0, -1
        self._is_ranked = False
        """Whether requests were ranked before the step under way."""
        self._is_plain = True
        """Whether no live request has a hint: then everything stays as in stock vLLM."""
        self._leaving: list[Request] = []
        if self.is_on:
            scheduler.waiting = self.queue
        elif settings.enabled:
            logger.warning("TokenCake: --policy priority was asked for; the Space Scheduler stays out of its way")

    # --- a request ------------------------------------------------------------------------------------

    def on_added(self, tagged: TaggedRequest, now: float) -> None:
        """Enter the request into its application."""
        if self.is_on:
            request = tagged.request
            self.applications.add(
                request.request_id,
                tagged.hint,
                prompt_tokens=request.num_prompt_tokens,
                max_tokens=request.max_tokens,
                now=now,
                tenant=tagged.tenant,
            )

    def before_preempt(self, request: Request, now: float) -> None:
        """Account for the memory that it has used so far."""
        if self.is_on:
            self.applications.account_service(request.request_id, self._held_share(request), now)
            self.applications.stop(request.request_id)
            running = [other.request_id for other in self._scheduler.running]
            self.explainer.note_preempted(request.request_id, running, now)

    def before_free(self, request: Request, now: float) -> None:
        """Account for it, and learn from it."""
        if self.is_on:
            self.applications.account_service(request.request_id, self._held_share(request), now)
            self.applications.end(
                request.request_id, request.num_output_tokens, is_aborted=is_aborted(request), now=now
            )
            self.explainer.forget(request.request_id)

    # --- the step -------------------------------------------------------------------------------------

    def before_step(self, now: float) -> None:
        """Rank all requests anew, where anything has changed, and choose those to swap out."""
        self._leaving = []
        if not self.is_on:
            return
        self._steps += 1
        step, version = self._ranked_at
        self._is_ranked = self.applications.version != version or self._steps - step >= RANKING_STEPS
        if self._is_ranked:
            self._leaving = self._rank(now)

    def take_leaving(self) -> list[Request]:
        """The running requests that are to be swapped out before this step; each is named once."""
        leaving, self._leaving = self._leaving, []
        return leaving

    def _rank(self, now: float) -> list[Request]:
        """Rank all anew; returns the running requests that are to be swapped out."""
        self._ranked_at = self._steps, self.applications.version
        running = self._scheduler.running
        for request in running:
            self.applications.account_service(request.request_id, self._held_share(request), now)
        self.gate.exclusive_blocks = {
            request.request_id: self._view.exclusive_blocks(request.request_id)
            for request in running
            if request.request_id in self.applications.calls
        }
        self.gate.step = self._steps
        self.policy.begin(self.applications, self.gate.state(), now)
        self._is_plain = all(call.hint is None for call in self.applications.calls.values())
        if not self._is_plain:
            self.sort()
        # Pins that are left from when another request was first in the queue go before any running request does.
        has_yielded = self._offload.yield_pins()
        return [] if has_yielded or self._is_plain else self.swap.choose(self._ages, now)

    def sort(self) -> None:
        """Bring the waiting queue and `running` into the order of their ranks."""
        siblings = self._siblings()
        self._needs, self._ages = {}, {}

        def rank_of(request: Request) -> Rank:
            name = request.request_id
            self._needs[name] = need = self._view.blocks_of(request.num_tokens)
            call = self.applications.calls.get(name)
            if call is None:  # it came while the plug-in failed: behind all others, in the order of arrival
                return (float("inf"), request.arrival_time)
            self._ages[name] = rank = self.policy.rank(call, need_blocks=need, shares_prefix=False)
            return self.policy.rank(call, need_blocks=need, shares_prefix=True) if name in siblings else rank

        self.queue.sort(rank_of)
        self._scheduler.running.sort(key=rank_of)

    def _siblings(self) -> set[str]:
        """Waiting requests with most of their prompt in blocks that others hold: they cost little now."""
        found: set[str] = set()
        if not self._scheduler.running:
            return found
        # A block that only a copy to the host holds is about to come free.
        storing = self._offload.storing()
        for request, _ in zip(self.queue, range(self.settings.scan), strict=False):
            if request.status in ADMISSIBLE:
                held = self._view.held_prefix_blocks(request, storing)
                if held and held >= self._view.blocks_of(request.num_tokens) - held:
                    found.add(request.request_id)
        return found

    def after_step(self, output: SchedulerOutput, now: float) -> None:
        """Note which requests started."""
        if not self.is_on:
            return
        try:
            self._note_started(output, now)
        finally:
            self.gate.reset()

    def _note_started(self, output: SchedulerOutput, now: float) -> None:
        started = started_requests(output)
        self.swap.note_step(output)
        for name in started:
            self.applications.start(name, now)
        if self._is_ranked or started:
            waiting = [request.request_id for request in self.queue if request.status in ADMISSIBLE]
            self.explainer.note_waiting(waiting, started, self.queue.ranks, self._needs, self._view.free_blocks, now)

    # --- the gate -------------------------------------------------------------------------------------

    def admits(self, request: Request, now: float) -> bool:
        """Whether this waiting request may get blocks in this step; vLLM skips one that may not."""
        if not self.is_on:
            return True
        call = self.applications.calls.get(request.request_id)
        if call is None or self._is_plain or not has_admitted(self._scheduler):
            return True
        if not self.swap.may_start(request.request_id, now):
            self.gate.note_reserved(request, call, now)
            return False
        return self.gate.admits(request, call, lambda: admitted_requests(self._scheduler), now)

    # --- views ----------------------------------------------------------------------------------------

    def _held_share(self, request: Request) -> float:
        return self._view.blocks_of(request.num_computed_tokens) / self._view.total_blocks

    def add_metrics(self, drained: dict[str, Any], now: float) -> None:
        """Add the gauges of admission to what `Registry.drain` gave."""
        if self.is_on:
            reservations = [self.gate.reservation(request) for request in self._scheduler.running]
            drained["gauges"]["promised_blocks"] = peak_blocks(reservations, self._view.block_tokens)
            drained["gauges"]["longest_wait_s"] = self.explainer.longest_wait_s(now)
            drained["labelled"]["space_reserve_blocks"] = self.policy.reserve()
