"""What does the Time Scheduler do when a call comes, runs, ends or is preempted, and when an event tells of its stall?

What is expected comes from `StallBook`, decisions from `tokencake.policies`; copies go through `HostCache`,
uploads through `Uploads`, the order of free blocks is kept by `FreeQueue`. Here is what joins them.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from tokencake.policies.registry import OFFLOAD
from tokencake.registry.metric_names import CounterName, CountKey
from tokencake.time_scheduler.policy import MIN_CHANCE, Decision, FinishedRequest
from tokencake.time_scheduler.stall_tracker import StallBook
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

    from tokencake.forecast.durations import Stall
    from tokencake.protocol import Event
    from tokencake.registry.registry import Registry
    from tokencake.time_scheduler.prefixes import Chain
    from tokencake.time_scheduler.settings import TimeSettings
    from tokencake_vllm.component import TaggedRequest
    from tokencake_vllm.transfer.host_cache import HostCache

_PAPER_BACKOFF_STEPS: Final = 8
_PREFILL_STEP_TOKENS: Final = 256
"""A step with at least so many tokens tells how fast prefill is."""
MIN_RETRY_S: Final = 0.5
"""After so long at the earliest, where an upload was not worth its copy yet."""
IDLE_STEPS: Final = 16
LOOK_AHEAD: Final = 4
"""So often, and at so many stalled agents, is looked while the device has room."""


class StallManager:
    """The Time Scheduler of one vLLM scheduler. Lives on the engine loop."""

    def __init__(self, scheduler: Scheduler, registry: Registry, cache: HostCache, settings: TimeSettings) -> None:
        self.cache = cache
        self.settings = settings
        self.book = StallBook(registry, scheduler.kv_cache_manager.block_pool.num_gpu_blocks)
        self.chains = self.book.chains
        self.wakeups = WakeupTimer()
        self.is_resetting = False
        self._scheduler = scheduler
        self._registry = registry
        self._pool = scheduler.kv_cache_manager.block_pool
        self._policy = OFFLOAD[settings.policy]()
        self._stores = HostStores(scheduler, cache, self.chains, self.book.returns, settings.eviction)
        self._view = view = BlockView(scheduler.kv_cache_manager, scheduler.block_size)
        self._free_queue = FreeQueue(scheduler, cache, self.chains, self.book.dropped)
        self.uploads = Uploads(scheduler, view, cache, self.chains, self._free_queue, self._is_worthwhile, self.count)
        self.pins = Pins(scheduler, view, cache, self.chains, self.uploads, self._store, self.count)
        self._predecessors: dict[str, Chain] = {}
        """Of a waiting call: the chain that it extends, and whose pins it takes over."""
        self._steps = 0
        self._now = 0.0
        """Of the newest step or event, for what happens within."""
        self._admitted_s: float | None = None
        cache.count = self._add

    # --- a call comes -----------------------------------------------------------------------------------

    def arrive(self, tagged: TaggedRequest, now: float) -> None:
        """See whose stall this call ends."""
        request, hint = tagged.request, tagged.hint
        keys = list(request.block_hashes)
        parent = self.book.arrive(request.request_id, keys, hint, now, tagged.tenant)
        self._free_queue.renew(self.book.wake(keys, request.request_id, hint))
        if hint is not None and hint.reuse == "final" and hint.parent_call is not None:
            # The last call of a sub-agent: whoever waits for it is back soon.
            for employer in self.book.stalled_at(hint.parent_call):
                self._reforecast(employer, now)
        if parent is None:
            return
        self._predecessors[request.request_id] = parent
        parent.due_s = None
        self.uploads.cancel(parent.id)
        if self.uploads.is_late(parent):
            self.count("kv_uploads", "late")

    def start(self, request: Request, now: float) -> None:
        """A call has its first slot, and with it its own hold on what it hit."""
        self.book.start(request.request_id, now)
        self.cache.rates.residence.take(self._view.blocks_of(request.num_tokens), now)
        local, external = cached_tokens(request)
        self.count("kv_tokens_saved", "load", by=external)
        parent = self._predecessors.pop(request.request_id, None)
        if parent is not None:
            blocks = local // self.cache.rates.block_tokens
            if parent.id not in self.cache.pinned and not self.uploads.has_uploaded(parent.id):
                was_there = blocks >= len(parent.keys) - 1
                self.cache.rates.residence.learn(now - parent.since_s, was_there=was_there)
            gained = self.uploads.resolve(parent.id, blocks)
            self.count("kv_tokens_saved", "upload", by=gained * self.cache.rates.block_tokens)
            self.cache.unpin(parent.id)

    @property
    def can_restore(self) -> bool:
        """Whether `preempt` copies to the host, as far as there is room."""
        return self._policy.restores_preempted and self.cache.tier.capacity > 0 and not self.cache.is_off

    def preempt(self, request: Request) -> None:
        """A call is about to lose its blocks: what it computed goes to the host."""
        chain = self.chains.by_id.get(request.request_id)
        if chain is not None:
            keys, blocks = computed_blocks(self._scheduler, request)
            self.chains.give_way(chain, keys)
            if not self.is_resetting and self.can_restore:
                self._store(chain, keys, blocks)

    # --- a call ends ------------------------------------------------------------------------------------

    def finish(self, request: Request, now: float) -> dict[str, Any] | None:
        """The call still holds its blocks; returns what the client is told of them."""
        name = request.request_id
        if (parent := self._predecessors.pop(name, None)) is not None:
            self.uploads.resolve(parent.id, None)
            self.cache.unpin(parent.id)
        if not is_answered(request):
            self.chains.remove(name)
            return None
        keys, blocks = computed_blocks(self._scheduler, request)
        stalled = self.book.finish(name, keys, now)
        if stalled is None:
            return None
        chain, rest = stalled
        decision = self._policy.on_finish(self._finished(chain, rest), self.cache.rates, self.settings)
        stored = self._carry_out(decision, chain, blocks, rest, now)
        for old in self.chains.overflow():
            self.chains.remove(old.id)
            self._release(old)
        return (
            None
            if chain.hint is None
            else {"tokencake": kv_report.with_answer(chain, self.book.call_of(chain), decision, stored, rest)}
        )

    def _carry_out(self, decision: Decision, chain: Chain, blocks: list[KVCacheBlock], rest: Stall, now: float) -> int:
        """Act on a decision; returns how many blocks are copied."""
        self.count("kv_decisions", decision.action, decision.why)
        chain.outcome = decision.action
        if decision.action == "drop":
            self._drop(chain)
            return 0
        stored = 0
        if decision.action == "keep":
            self.cache.pin(chain.id, blocks)
            chain.keep_until_s = now + rest.quantile(0.95) + self.settings.short_stall_s
            self.wakeups.set(chain.id, chain.keep_until_s)
        elif decision.action == "offload":
            stored = self._store(chain, chain.keys, blocks)
            self.cache.mark_offloaded(chain.id, chain.keys)
        self._plan_upload(chain, now, rest)
        self.wakeups.set(chain.id, chain.give_up_s or now)
        return stored

    def _finished(self, chain: Chain, rest: Stall) -> FinishedRequest:
        cache, waiting_calls = self.cache, len(self._scheduler.waiting)
        return FinishedRequest(
            claim=self.book.believed_claim(chain),
            rest=rest,
            queue_s=waiting_calls * cache.rates.admission.seconds,
            blocks=len(chain.keys),
            missing=len(chain.keys) - cache.tier.known(chain.keys),
            device_blocks=self._pool.num_gpu_blocks - 1,
            free_blocks=self._pool.get_num_free_blocks(),
            pinned_blocks=cache.pinned_blocks,
            waiting_calls=waiting_calls,
            residence_s=self._residence_s(),
            paper_inputs=lambda: paper_inputs(
                self._scheduler, chain.hint, cache.tier.free_slots, self._stores.recent.count(self._steps)
            ),
        )

    def _store(self, chain: Chain, keys: Sequence[bytes], blocks: Sequence[KVCacheBlock]) -> int:
        return self._stores.store(chain, keys, blocks, self._steps, self._now)

    # --- nobody will come -------------------------------------------------------------------------------

    def _drop(self, chain: Chain) -> None:
        """Nothing will extend it: what only it wanted is the first to be reused, and stays a hit until then."""
        self.book.drop(chain)
        self._release(chain)

    def _release(self, chain: Chain) -> None:
        """No call is expected: nothing is held or uploaded for it, and its blocks age as any others."""
        self.uploads.resolve(chain.id, None)
        self.cache.unpin(chain.id)

    # --- events -----------------------------------------------------------------------------------------

    def on_event(self, event: Event, now: float) -> None:
        """The registry has applied `event`: see whose stall it changes."""
        told, ended = self.book.on_event(event)
        for chain in told:
            self._reforecast(chain, now)
        for chain in ended:
            self._drop(chain)

    def _reforecast(self, chain: Chain, now: float) -> None:
        rest = self.book.refine(chain, now)
        self.wakeups.set(chain.id, chain.give_up_s or now)
        self._plan_upload(chain, now, rest)

    # --- the step ---------------------------------------------------------------------------------------

    def before_step(self, now: float) -> None:
        """What is due, and room for those who wait."""
        self._steps += 1
        self._now = now
        self._free_queue.put_dropped_first()
        for name in self.wakeups.take_due(now):
            chain = self.chains.by_id.get(name)
            if chain is not None and chain.phase == "stalled":
                self._on_due(chain, now)
        if self._policy.does_wait_for_demand and self._steps % _PAPER_BACKOFF_STEPS == 0 and self._scheduler.waiting:
            self._retry_refused(now)
        if self.cache.pinned:
            self.make_room()
        if len(self.uploads):
            self.uploads.start(self._steps, now)
        if self._steps % IDLE_STEPS == 0 and self.uploads.is_idle():
            self._look_ahead(now)

    def _on_due(self, chain: Chain, now: float) -> None:
        if chain.give_up_s is not None and chain.give_up_s <= now:
            self.count("kv_stalls", "given_up")
            self.book.give_up(chain)
            self._release(chain)
            return
        if chain.due_s is not None and chain.due_s <= now:
            chain.due_s = None
            self._learn_residence(chain, now)
            self.uploads.add_due(chain.id)
        if chain.keep_until_s is not None and chain.keep_until_s <= now:
            self.pins.offload(chain)

    def _is_worthwhile(self, chain: Chain) -> bool:
        """Whether an upload now will be there still when the agent is back; if not, when to ask again."""
        rest = self.book.rest(chain, self._now)
        chance, residence_s = self.book.returns.chance(chain.hint), self._residence_s()
        if not self.book.may_last(chain) and self._policy.may_upload(rest, chance, residence_s):
            return True
        if chance >= MIN_CHANCE:
            chain.due_s = self._now + max(MIN_RETRY_S, rest.quantile(self.settings.upload_quantile))
            self.wakeups.set(chain.id, chain.due_s)
        return False

    def _residence_s(self) -> float:
        return self.cache.rates.residence.from_now_s(self._pool.get_num_free_blocks(), self._now)

    def _learn_residence(self, chain: Chain, now: float) -> None:
        """See whether its blocks, which nobody has touched since, are still on the device."""
        if chain.id not in self.cache.pinned and not self.uploads.has_uploaded(chain.id):
            self.cache.rates.residence.learn(now - chain.since_s, was_there=self._is_here(chain))

    def _plan_upload(self, chain: Chain, now: float, rest: Stall) -> None:
        """Time the upload by the forecast."""
        if self.settings.upload and not chain.is_uploaded:
            chain.due_s = now + self._policy.upload_in_s(rest, len(chain.keys), self.cache.rates, self.settings)
            self.wakeups.set(chain.id, chain.due_s)

    def _look_ahead(self, now: float) -> None:
        """The device has room: those who are back next need not wait until their upload is due."""
        planned = [c for c in self.chains if c.due_s is not None and not c.is_uploaded and not self._is_here(c)]
        for chain in heapq.nsmallest(LOOK_AHEAD, planned, key=lambda c: c.rest_s(now)):
            self._learn_residence(chain, now)
            self.uploads.add_due(chain.id)

    def _is_here(self, chain: Chain) -> bool:
        """Whether its end is on the device: the ends go first."""
        return bool(self.cache.on_device(chain.keys[-1:]))

    def make_room(self) -> None:
        """Give up pins before any request has to wait or to be preempted for them."""
        self.pins.make_room(self._predecessors)

    def _retry_refused(self, now: float) -> None:
        """The published gate looks again at what it refused, while the blocks are still there."""
        refused = (c for c in self.chains if c.phase == "stalled" and c.outcome == "leave")
        for chain in list(itertools.islice(refused, QUEUE_SCAN)):
            here = self.cache.on_device(chain.keys)
            if len(here) < len(chain.keys):
                continue
            rest = self.book.rest(chain, now)
            decision = self._policy.on_finish(self._finished(chain, rest), self.cache.rates, self.settings)
            if decision.action == "offload":
                self._carry_out(decision, chain, here, rest, now)

    def after_step(self, started: Sequence[Request], resumed: Sequence[str], now: float) -> None:
        """Some calls got a slot."""
        for request in started:
            self.start(request, now)
        for name in resumed:
            self.book.start(name, now)
        if started:
            is_queue = bool(self._scheduler.waiting)
            if is_queue and self._admitted_s is not None:
                self.cache.rates.admission.learn(len(started), now - self._admitted_s)
            self._admitted_s = now if is_queue else None

    def learn_step(self, tokens: int, step_s: float) -> None:
        """The device computed a step of `tokens` tokens in `step_s` seconds."""
        if tokens >= _PREFILL_STEP_TOKENS:
            self.cache.rates.prefill.learn(tokens, step_s)

    def is_stalled(self, chain_id: str) -> bool:
        """Whether this chain still waits for somebody."""
        chain = self.chains.by_id.get(chain_id)
        return chain is not None and chain.phase == "stalled"

    # --- the rest -----------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Give back everything that is held; what the host has is as old as what the device had."""
        self.uploads.reset()
        self.book.dropped.clear()
        self.cache.reset()

    def count(self, name: CounterName, /, *labels: str, by: float = 1) -> None:
        """Add to a counter."""
        self._add((name, *labels), by)

    def _add(self, key: CountKey, by: float) -> None:
        if by:
            self._registry.counts[key] += by  # type: ignore[assignment]  # seconds and bytes are counted, too
