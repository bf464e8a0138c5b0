"""Reactions of the Time Scheduler to the arrival, start, end and preemption of a call, to events, and to due times.

What is expected comes from `StallTracker`, decisions from `tokencake.policies`; copies go through `HostCache`,
uploads through `Uploads`, the order of free blocks is kept by `FreeQueue`. Here is what joins them.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from tokencake.policies.registry import OFFLOAD
from tokencake.registry.metric_names import CounterName, CountKey
from tokencake.time_scheduler.policy import MIN_REUSE_PROBABILITY, FinishedRequest, OffloadDecision
from tokencake.time_scheduler.stall_tracker import StallTracker
from tokencake_vllm.time_scheduler import kv_report
from tokencake_vllm.time_scheduler.free_queue import FreeQueue
from tokencake_vllm.time_scheduler.host_stores import HostStores
from tokencake_vllm.time_scheduler.pins import Pins
from tokencake_vllm.time_scheduler.policy_inputs import paper_inputs
from tokencake_vllm.time_scheduler.uploads import QUEUE_SCAN, Uploads
from tokencake_vllm.time_scheduler.wakeup import WakeupTimer
from tokencake_vllm.vllm_adapter.block_view import BlockView
from tokencake_vllm.vllm_adapter.requests import cached_tokens, computed_blocks, is_answered

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    from tokencake.forecast.durations import DurationDistribution
    from tokencake.protocol import Event
    from tokencake.registry.registry import Registry
    from tokencake.time_scheduler.prefixes import CachedPrefix
    from tokencake.time_scheduler.settings import TimeSettings
    from tokencake_vllm.component import TaggedRequest
    from tokencake_vllm.transfer.host_cache import HostCache

_PAPER_BACKOFF_STEPS: Final = 8
_PREFILL_STEP_TOKENS: Final = 256
"""Steps with at least this many tokens are used to learn the prefill rate."""
MIN_RETRY_S: Final = 0.5
"""An upload that was not worthwhile yet is asked for again after this time at the earliest."""
IDLE_STEPS: Final = 16
LOOK_AHEAD: Final = 4
"""Uploads that are started ahead of time at once, while the device has room."""


class StallManager:
    """The Time Scheduler of one vLLM scheduler. Lives on the engine loop."""

    def __init__(self, scheduler: Scheduler, registry: Registry, cache: HostCache, settings: TimeSettings) -> None:
        self.cache = cache
        self.settings = settings
        self.tracker = StallTracker(registry, scheduler.kv_cache_manager.block_pool.num_gpu_blocks)
        self.prefixes = self.tracker.prefixes
        self.wakeups = WakeupTimer()
        self.is_resetting = False
        self._scheduler = scheduler
        self._registry = registry
        self._pool = scheduler.kv_cache_manager.block_pool
        self._policy = OFFLOAD[settings.policy]()
        self._stores = HostStores(scheduler, cache, self.prefixes, self.tracker.reuse, settings.eviction)
        manager, whole = scheduler.kv_cache_manager, self._policy.counts_whole_prompts
        self._view = view = BlockView(manager, scheduler.block_size, counts_whole_prompts=whole)
        self._free_queue = FreeQueue(scheduler, cache, self.prefixes, self.tracker.dropped)
        self.uploads = Uploads(scheduler, view, cache, self.prefixes, self._free_queue, self._is_worthwhile, self.count)
        self.pins = Pins(scheduler, view, cache, self.prefixes, self.uploads, self._store, self.count)
        self._predecessors: dict[str, CachedPrefix] = {}
        """By waiting call: the prefix that it extends, with the pins that it takes over."""
        self._steps = 0
        self._now = 0.0
        """Of the newest step or event, for what happens within."""
        self._admitted_s: float | None = None
        cache.count = self._add

    # --- a call comes -----------------------------------------------------------------------------------

    def arrive(self, tagged: TaggedRequest, now: float) -> None:
        """Find the stall that this call ends."""
        request, hint = tagged.request, tagged.hint
        keys = list(request.block_hashes)
        predecessor = self.tracker.arrive(request.request_id, keys, hint, now, tagged.tenant)
        self._free_queue.renew(self.tracker.wake(keys, request.request_id, hint))
        if hint is not None and hint.reuse == "final" and hint.parent_call is not None:
            # The last call of a sub-agent: the agent that waits for it is back soon.
            for caller in self.tracker.stalled_at(hint.parent_call):
                self._reforecast(caller, now)
        if predecessor is None:
            return
        self._predecessors[request.request_id] = predecessor
        predecessor.due_s = None
        self.uploads.cancel(predecessor.id)
        if self.uploads.is_late(predecessor):
            self.count("kv_uploads", "late")

    def start(self, request: Request, now: float) -> None:
        """A call has its first slot, and holds the blocks that it hit."""
        self.tracker.start(request.request_id, now)
        self.cache.costs.residency.take(self._view.blocks_of(request.num_tokens), now)
        local, external = cached_tokens(request)
        self.count("kv_tokens_saved", "load", by=external)
        if (predecessor := self._predecessors.pop(request.request_id, None)) is not None:
            blocks = local // self.cache.costs.block_tokens
            if predecessor.id not in self.cache.pinned and not self.uploads.has_uploaded(predecessor.id):
                was_there = blocks >= len(predecessor.block_hashes) - 1
                self.cache.costs.residency.learn(now - predecessor.since_s, was_there=was_there)
            gained = self.uploads.resolve(predecessor.id, blocks)
            self.count("kv_tokens_saved", "upload", by=gained * self.cache.costs.block_tokens)
            self.cache.unpin(predecessor.id)

    @property
    def can_restore(self) -> bool:
        """Whether `preempt` copies to the host, as far as there is room."""
        return self._policy.restores_preempted and self.cache.tier.capacity > 0 and not self.cache.is_off

    def preempt(self, request: Request) -> None:
        """A call is about to lose its blocks: what it computed goes to the host."""
        prefix = self.prefixes.by_id.get(request.request_id)
        if prefix is not None:
            keys, blocks = computed_blocks(self._scheduler, request)
            self.prefixes.on_preempt(prefix, keys)
            if not self.is_resetting and self.can_restore:
                self._store(prefix, keys, blocks)

    # --- a call ends ------------------------------------------------------------------------------------

    def finish(self, request: Request, now: float) -> dict[str, Any] | None:
        """The call still holds its blocks; returns what the client is told of them."""
        name = request.request_id
        if (predecessor := self._predecessors.pop(name, None)) is not None:
            self.uploads.resolve(predecessor.id, None)
            self.cache.unpin(predecessor.id)
        if not is_answered(request):
            self.prefixes.remove(name)
            return None
        keys, blocks = computed_blocks(self._scheduler, request)
        stalled = self.tracker.finish(name, keys, now)
        if stalled is None:
            return None
        prefix, remaining = stalled
        decision = self._policy.on_finish(self._finished(prefix, remaining), self.cache.costs, self.settings)
        stored = self._carry_out(decision, prefix, blocks, remaining, now)
        for old in self.prefixes.overflow():
            self.prefixes.remove(old.id)
            self._release(old)
        if prefix.hint is None:
            return None
        return {"tokencake": kv_report.with_answer(prefix, self.tracker.call_of(prefix), decision, stored, remaining)}

    def _carry_out(
        self,
        decision: OffloadDecision,
        prefix: CachedPrefix,
        blocks: list[KVCacheBlock],
        remaining: DurationDistribution,
        now: float,
    ) -> int:
        """Act on a decision; returns how many blocks are copied."""
        self.count("kv_decisions", decision.action, decision.why)
        prefix.outcome = decision.action
        if decision.action == "drop":
            self._drop(prefix)
            return 0
        stored = 0
        if decision.action == "keep":
            self.cache.pin(prefix.id, blocks)
            prefix.keep_until_s = now + remaining.quantile(0.95) + self.settings.short_stall_s
            self.wakeups.set(prefix.id, prefix.keep_until_s)
        elif decision.action == "offload":
            stored = self._store(prefix, prefix.block_hashes, blocks)
            self.cache.mark_offloaded(prefix.id, prefix.block_hashes)
        self._plan_upload(prefix, now, remaining)
        self.wakeups.set(prefix.id, prefix.give_up_s or now)
        return stored

    def _finished(self, prefix: CachedPrefix, remaining: DurationDistribution) -> FinishedRequest:
        cache, waiting_calls = self.cache, len(self._scheduler.waiting)
        return FinishedRequest(
            claim=self.tracker.believed_claim(prefix),
            remaining=remaining,
            queue_s=waiting_calls * cache.costs.admission.seconds,
            blocks=len(prefix.block_hashes),
            missing=len(prefix.block_hashes) - cache.tier.known(prefix.block_hashes),
            device_blocks=self._pool.num_gpu_blocks - 1,
            free_blocks=self._pool.get_num_free_blocks(),
            pinned_blocks=cache.pinned_blocks,
            waiting_calls=waiting_calls,
            residency_s=self._residency_s(),
            paper_inputs=lambda: paper_inputs(
                self._scheduler, self._view, prefix.hint, cache.tier.free_slots, self._stores.recent.count(self._steps)
            ),
        )

    def _store(self, prefix: CachedPrefix, keys: Sequence[bytes], blocks: Sequence[KVCacheBlock]) -> int:
        return self._stores.store(prefix, keys, blocks, self._steps, self._now)

    # --- no call is expected ----------------------------------------------------------------------------

    def _drop(self, prefix: CachedPrefix) -> None:
        """Nothing will extend it: what only it wanted is the first to be reused, and stays a hit until then."""
        self.tracker.drop(prefix)
        self._release(prefix)

    def _release(self, prefix: CachedPrefix) -> None:
        """No call is expected: nothing is held or uploaded for it, and its blocks age as any others."""
        self.uploads.resolve(prefix.id, None)
        self.cache.unpin(prefix.id)

    # --- events -----------------------------------------------------------------------------------------

    def on_event(self, event: Event, now: float) -> None:
        """The registry has applied `event`: forecast the stalls that it changes anew."""
        told, ended = self.tracker.on_event(event)
        for prefix in told:
            self._reforecast(prefix, now)
        for prefix in ended:
            self._drop(prefix)

    def _reforecast(self, prefix: CachedPrefix, now: float) -> None:
        remaining = self.tracker.reforecast(prefix, now)
        self.wakeups.set(prefix.id, prefix.give_up_s or now)
        self._plan_upload(prefix, now, remaining)

    # --- the step ---------------------------------------------------------------------------------------

    def before_step(self, now: float) -> None:
        """Do what is due, and make room for waiting requests."""
        self._steps += 1
        self._now = now
        self._free_queue.put_dropped_first()
        for name in self.wakeups.take_due(now):
            prefix = self.prefixes.by_id.get(name)
            if prefix is not None and prefix.phase == "stalled":
                self._on_due(prefix, now)
        if self._policy.waits_for_demand and self._steps % _PAPER_BACKOFF_STEPS == 0 and self._scheduler.waiting:
            self._retry_refused(now)
        if self.cache.pinned:
            self.make_room()
        if len(self.uploads):
            self.uploads.start(self._steps, now)
        if self._steps % IDLE_STEPS == 0 and self.uploads.is_idle():
            self._look_ahead(now)

    def _on_due(self, prefix: CachedPrefix, now: float) -> None:
        if prefix.give_up_s is not None and prefix.give_up_s <= now:
            self.count("kv_stalls", "given_up")
            self.tracker.give_up(prefix)
            self._release(prefix)
            return
        if prefix.due_s is not None and prefix.due_s <= now:
            prefix.due_s = None
            self._learn_residency(prefix, now)
            self.uploads.add_due(prefix.id)
        if prefix.keep_until_s is not None and prefix.keep_until_s <= now:
            self.pins.offload(prefix)

    def _is_worthwhile(self, prefix: CachedPrefix) -> bool:
        """Whether an upload now will be there still when the agent is back; if not, when to ask again."""
        remaining = self.tracker.remaining(prefix, self._now)
        probability, residency_s = self.tracker.reuse.probability(prefix.hint), self._residency_s()
        if not self.tracker.has_open_subagents(prefix) and self._policy.may_upload(remaining, probability, residency_s):
            return True
        if probability >= MIN_REUSE_PROBABILITY:
            prefix.due_s = self._now + max(MIN_RETRY_S, remaining.quantile(self.settings.upload_quantile))
            self.wakeups.set(prefix.id, prefix.due_s)
        return False

    def _residency_s(self) -> float:
        return self.cache.costs.residency.from_now_s(self._pool.get_num_free_blocks(), self._now)

    def _learn_residency(self, prefix: CachedPrefix, now: float) -> None:
        """Learn whether its blocks, unused since, are still on the device."""
        if prefix.id not in self.cache.pinned and not self.uploads.has_uploaded(prefix.id):
            self.cache.costs.residency.learn(now - prefix.since_s, was_there=self._is_here(prefix))

    def _plan_upload(self, prefix: CachedPrefix, now: float, remaining: DurationDistribution) -> None:
        """Time the upload by the forecast."""
        if self.settings.upload and not prefix.is_uploaded:
            prefix.due_s = now + self._policy.upload_in_s(
                remaining, len(prefix.block_hashes), self.cache.costs, self.settings
            )
            self.wakeups.set(prefix.id, prefix.due_s)

    def _look_ahead(self, now: float) -> None:
        """Start the uploads of the agents that are expected next: the device has room."""
        planned = [c for c in self.prefixes if c.due_s is not None and not c.is_uploaded and not self._is_here(c)]
        for prefix in heapq.nsmallest(LOOK_AHEAD, planned, key=lambda c: c.remaining_s(now)):
            self._learn_residency(prefix, now)
            self.uploads.add_due(prefix.id)

    def _is_here(self, prefix: CachedPrefix) -> bool:
        """Whether its end is on the device: the ends go first."""
        return bool(self.cache.on_device(prefix.block_hashes[-1:]))

    def make_room(self) -> None:
        """Give up pins before any request has to wait or to be preempted for them."""
        self.pins.make_room(self._predecessors)

    def _retry_refused(self, now: float) -> None:
        """The published gate looks again at what it refused, while the blocks are still there."""
        refused = (c for c in self.prefixes if c.phase == "stalled" and c.outcome == "leave")
        for prefix in list(itertools.islice(refused, QUEUE_SCAN)):
            here = self.cache.on_device(prefix.block_hashes)
            if len(here) < len(prefix.block_hashes):
                continue
            remaining = self.tracker.remaining(prefix, now)
            decision = self._policy.on_finish(self._finished(prefix, remaining), self.cache.costs, self.settings)
            if decision.action == "offload":
                self._carry_out(decision, prefix, here, remaining, now)

    def after_step(self, started: Sequence[Request], resumed: Sequence[str], now: float) -> None:
        """Some calls got a slot."""
        for request in started:
            self.start(request, now)
        for name in resumed:
            self.tracker.start(name, now)
        if started:
            is_queue = bool(self._scheduler.waiting)
            if is_queue and self._admitted_s is not None:
                self.cache.costs.admission.learn(len(started), now - self._admitted_s)
            self._admitted_s = now if is_queue else None

    def learn_step(self, tokens: int, step_s: float) -> None:
        """The device computed a step of `tokens` tokens in `step_s` seconds."""
        if tokens >= _PREFILL_STEP_TOKENS:
            self.cache.costs.prefill.learn(tokens, step_s)

    def is_stalled(self, prefix_id: str) -> bool:
        """Whether this prefix still waits for a call."""
        prefix = self.prefixes.by_id.get(prefix_id)
        return prefix is not None and prefix.phase == "stalled"

    # --- the rest -----------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Give back everything that is held; what the host has is as old as what the device had."""
        self.uploads.reset()
        self.tracker.dropped.clear()
        self.cache.reset()

    def count(self, name: CounterName, /, *labels: str, by: float = 1) -> None:
        """Add to a counter."""
        self._add((name, *labels), by)

    def _add(self, key: CountKey, by: float) -> None:
        if by:
            self._registry.counts[key] += by  # type: ignore[assignment]  # seconds and bytes are counted, too
