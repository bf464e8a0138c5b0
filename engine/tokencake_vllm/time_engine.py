"""What does the Time Scheduler do when a call comes, runs, ends or is preempted, and when an event tells of its stall?

Decisions come from `tokencake.time_scheduler`, copies go through `HostCache`, uploads through `Uploads`; here is what
joins them for one vLLM scheduler: which chain a call extends, what is pinned and for how long, and what is counted.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id
from vllm.v1.request import Request, RequestStatus

from tokencake.forecast import Forecast, Stall
from tokencake.host_tier import Distance
from tokencake.replacement import distances, least_recent, unbounded
from tokencake.stalls import Chain, Chains, expected_rest, give_up_after
from tokencake.time_scheduler import CHURN_STEPS, Decision, Finished, TimeSettings, policy_of
from tokencake_vllm.alarm import Alarm
from tokencake_vllm.uploads import GROWTH_BLOCKS, QUEUE_SCAN, Uploads, demand, key_of

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

    from tokencake.protocol import Hint
    from tokencake.records import Call, Session
    from tokencake_vllm.host_cache import HostCache

_ENDED_WELL: Final = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
_PAPER_BACKOFF_STEPS: Final = 8
_PREFILL_STEP_TOKENS: Final = 256
"""A step with at least so many tokens tells how fast prefill is."""


class TimeEngine:
    """The Time Scheduler of one vLLM scheduler. Lives on the engine loop."""

    def __init__(self, scheduler: Any, cache: HostCache, settings: TimeSettings) -> None:
        self.cache = cache
        self.settings = settings
        self.chains = Chains()
        self.forecast = Forecast()
        self.alarm = Alarm()
        self.is_resetting = False
        self._scheduler = scheduler
        self._registry = scheduler.registry
        self._pool = scheduler.kv_cache_manager.block_pool
        self._policy = policy_of(settings)
        self.uploads = Uploads(scheduler, cache, self.chains, self.count, settings.keep_share)
        self._parents: dict[str, str] = {}
        """Of a waiting call: the chain that it extends, and whose pins it takes over."""
        self._dead: list[tuple[KVCacheBlock, bytes]] = []
        self._steps = 0
        self._stored_at_step: deque[int] = deque()
        self._scheduled_s: deque[float] = deque()
        """When each step under way was scheduled."""
        self._completed_s = 0.0
        self._now = 0.0
        """Of the newest step or event, for what happens within."""
        self._admitted_s: float | None = None
        cache.count = self._add

    # --- a call comes -----------------------------------------------------------------------------------

    def arrive(self, request: Request, now: float) -> None:
        """See whose stall this call ends."""
        hint = self._registry.hint_of(request.request_id)
        parent = self.chains.arrive(request.request_id, list(request.block_hashes), hint, now)
        if parent is None:
            return
        self._learn_return(parent, now)
        self._parents[request.request_id] = parent.id
        parent.due_s = None
        self.uploads.cancel(parent.id)
        if self.uploads.is_late(parent):
            self.count("kv_uploads", "late")

    def _learn_return(self, parent: Chain, now: float) -> None:
        agent = parent.hint.agent if parent.hint else None
        call = self._call_of(parent)
        tools = list(call.tools.values()) if call else []
        if not tools and not (parent.hint and parent.hint.expects_tools):
            self.forecast.learn(agent, None, now - parent.since_s)
        for tool in tools:
            if tool.is_open and tool.started_s is not None:  # its end was lost: the next call is one
                self.forecast.learn(agent, tool.tool, now - tool.started_s)

    def start(self, request: Request) -> None:
        """A call has its first slot, and with it its own hold on what it hit."""
        if (chain := self.chains.by_id.get(request.request_id)) is not None:
            chain.phase = "running"
        stats = request.prefill_stats
        local, external = (stats.num_local_cached_tokens, stats.num_external_cached_tokens) if stats else (0, 0)
        self.count("kv_tokens_saved", "load", by=external)
        parent = self._parents.pop(request.request_id, None)
        if parent is not None:
            block_tokens = self.cache.rates.block_tokens
            gained = self.uploads.settle(parent, local // block_tokens)
            self.count("kv_tokens_saved", "upload", by=gained * block_tokens)
            self.cache.release(parent)

    def preempt(self, request: Request) -> None:
        """A call is about to lose its blocks: what it computed goes to the host."""
        chain = self.chains.by_id.get(request.request_id)
        if chain is not None:
            chain.phase = "waiting"
            if not self.is_resetting and self.settings.policy != "paper":
                self._store(chain, *self._computed(request))

    # --- a call ends ------------------------------------------------------------------------------------

    def finish(self, request: Request, now: float) -> dict[str, Any] | None:
        """The call still holds its blocks; returns what the client is told of them."""
        name = request.request_id
        if (parent := self._parents.pop(name, None)) is not None:
            self.uploads.settle(parent, None)
            self.cache.release(parent)
        if request.status not in _ENDED_WELL:
            self.chains.remove(name)
            return None
        known_chain = self.chains.by_id.get(name)
        hint = known_chain.hint if known_chain else None
        keys, blocks = self._computed(request)
        rest = self._first_rest(name, hint, now)
        chain = self.chains.stall(name, keys, now, now + give_up_after(rest, ()))
        if chain is None:
            return None
        chain.back_s = now + rest.quantile(0.5)
        decision = self._policy.at_finish(self._finished(chain, rest), self.cache.rates, self.settings)
        stored = self._do(decision, chain, blocks, rest, now)
        for old in self.chains.overflow():
            self._drop(old)
        return None if hint is None else {"tokencake": self._told(chain, decision, stored, rest)}

    def _told(self, chain: Chain, decision: Decision, stored: int, rest: Stall) -> dict[str, Any]:
        """What goes back with the answer."""
        call = self._call_of(chain)
        return {
            "decision": decision.action,
            "why": decision.why,
            "blocks": len(chain.keys),
            "stored_blocks": stored,
            "expected_stall_s": round(rest.quantile(0.5), 3),
            "prefix_tokens": {"device": call.cached_device_tokens, "host": call.cached_host_tokens} if call else None,
            "queued_s": round(call.scheduled_s - call.arrived_s, 3) if call and call.scheduled_s is not None else None,
        }

    def _do(self, decision: Decision, chain: Chain, blocks: list[KVCacheBlock], rest: Stall, now: float) -> int:
        """Act on a decision; returns how many blocks are copied."""
        self.count("kv_decisions", decision.action, decision.why)
        chain.outcome = decision.action
        if decision.action == "drop":
            self._drop(chain)
            return 0
        stored = 0
        if decision.action == "keep":
            self.cache.hold(chain.id, blocks)
            chain.keep_until_s = now + rest.quantile(0.95) + self.settings.short_stall_s
            self.alarm.set(chain.id, chain.keep_until_s)
        elif decision.action == "offload":
            stored = self._store(chain, chain.keys, blocks)
            self.cache.part(chain.id, chain.keys)
        self._plan_upload(chain, now, None if self._is_back(chain) else rest)
        self.alarm.set(chain.id, chain.give_up_s or now)
        return stored

    def _computed(self, request: Request) -> tuple[list[bytes], list[KVCacheBlock]]:
        """The full blocks of a call that are surely computed: hashes come earlier, at scheduling."""
        count = max(0, request.num_computed_tokens - request.num_in_flight_tokens) // self._scheduler.block_size
        held = self._scheduler.kv_cache_manager.coordinator.get_blocks(request.request_id)
        blocks = list(held[0][:count]) if held else []
        keys: list[bytes] = list(request.block_hashes[: len(blocks)])
        return keys, blocks[: len(keys)]

    def _finished(self, chain: Chain, rest: Stall) -> Finished:
        hint, cache = chain.hint, self.cache
        waiting_calls, waiting_blocks, fitting_blocks = demand(self._scheduler)
        while self._stored_at_step and self._stored_at_step[0] < self._steps - CHURN_STEPS:
            self._stored_at_step.popleft()
        return Finished(
            reuse=hint.reuse if hint else None,
            is_over=self._is_over(hint),
            rest=rest,
            queue_s=waiting_calls * cache.rates.admission.seconds,
            blocks=len(chain.keys),
            missing=len(chain.keys) - cache.tier.known(chain.keys),
            host_free=cache.tier.free_slots,
            device_blocks=self._pool.num_gpu_blocks - 1,
            free_blocks=self._pool.get_num_free_blocks(),
            pinned_blocks=cache.pinned_blocks,
            waiting_calls=waiting_calls,
            waiting_blocks=waiting_blocks,
            fitting_blocks=fitting_blocks,
            importance=(hint.importance if hint else None) or 0.0,
            is_near_end=bool(hint and hint.max_depth and hint.remaining is not None and hint.remaining <= 1),
            recent_stores=len(self._stored_at_step),
        )

    def _is_over(self, hint: Hint | None) -> bool:
        if hint is None:
            return False
        session = self._registry.sessions.get(hint.session)
        app = self._registry.apps.get(hint.app) if hint.app else None
        return bool((session and session.ended) or (app and app.ended))

    def _store(self, chain: Chain, keys: Sequence[bytes], blocks: Sequence[KVCacheBlock]) -> int:
        cache, now = self.cache, self._now
        distance: Distance = unbounded
        own_s = 0.0
        if cache.tier.free_slots < len(keys):
            if self.settings.policy == "lru":
                distance, own_s = least_recent(now), -1.0
            else:
                line = itertools.chain(self._scheduler.kv_holding_waiting, self._scheduler.waiting)
                places = {request.request_id: place for place, request in enumerate(line)}
                pace_s = cache.rates.admission.seconds
                distance, own_s = distances(self.chains, cache.tier, places, chain, now, pace_s)
        stored = cache.store(keys, blocks, now, distance, own_s)
        if stored:
            self._stored_at_step.append(self._steps)
        return stored

    # --- nobody will come -------------------------------------------------------------------------------

    def _drop(self, chain: Chain) -> None:
        """Nobody will extend it: what only it wanted is the first to be reused, and stays a hit until then."""
        self.chains.remove(chain.id)
        self.uploads.settle(chain.id, None)
        self.cache.release(chain.id)
        find = self._pool.cached_block_hash_to_block.get_one_block
        for key in self.chains.dead(chain):
            full = make_block_hash_with_group_id(BlockHash(key), 0)
            if (block := find(full)) is not None:
                self._dead.append((block, full))

    def demote_dead(self) -> None:
        """Dead blocks that are free go to the head of the free queue, the tail of a chain first."""
        dead, self._dead = self._dead, []
        first: dict[int, KVCacheBlock] = {}
        for block, full in dead:
            if block.block_hash != full or key_of(full) in self.chains.wanted:
                continue
            if block.ref_cnt == 0:
                first[block.block_id] = block
            elif self._scheduler.defer_block_free and self._steps % _PAPER_BACKOFF_STEPS:
                # With async scheduling the blocks of a call are set free a step after its end.
                self._dead.append((block, full))
        queue = self._pool.free_block_queue
        for block in first.values():
            queue.remove(block)
        queue.prepend_n(list(first.values()))

    # --- events -----------------------------------------------------------------------------------------

    def hear(self, event: dict[str, Any], now: float) -> None:
        """The registry has taken `event` in: see whose stall it changes."""
        match event["type"]:
            case "tool_start" | "tool_progress" | "tool_end":
                self._hear_tool(event, now)
            case "stall_start" | "stall_end":
                for chain in self._stalled(event["session"]):
                    self._refine(chain, now)
            case "session_end":
                for chain in self._stalled(event["session"]):
                    self._drop(chain)
            case "app_end":
                for chain in [c for c in self.chains if c.hint is not None and c.hint.app == event["app"]]:
                    if chain.phase == "stalled":
                        self._drop(chain)
        self.demote_dead()

    def _hear_tool(self, event: dict[str, Any], now: float) -> None:
        call = self._registry.calls.get(event["call"])
        if call is None:
            return
        tool = call.tools.get(event["tool_call"])
        if event["type"] == "tool_end" and tool is not None and tool.duration_s is not None:
            expected = self.forecast.stall(call.hint.agent, tool.tool, tool.estimate_s)
            self._registry.observe("forecast_error_s", abs(expected.quantile(0.5) - tool.duration_s))
            self.forecast.learn(call.hint.agent, tool.tool, tool.duration_s)
        for chain in self._stalled(call.hint.session):
            if self._call_of(chain) is call:
                self._refine(chain, now)

    def _stalled(self, session: str) -> list[Chain]:
        return [chain for chain in self.chains.of_session(session) if chain.phase == "stalled"]

    def _refine(self, chain: Chain, now: float) -> None:
        """An event told more about how long a stall will last."""
        if self._is_back(chain):
            chain.back_s = now
            self._plan_upload(chain, now, None)
            return
        call = self._call_of(chain)
        rest = expected_rest(chain, call, self._session_of(chain), self.forecast, now)
        chain.back_s = now + rest.quantile(0.5)
        chain.give_up_s = now + give_up_after(rest, [tool.deadline_s for tool in call.tools.values()] if call else ())
        self.alarm.set(chain.id, chain.give_up_s)
        self._plan_upload(chain, now, rest)

    def _is_back(self, chain: Chain) -> bool:
        """Whether the last tool has ended, and every other wait."""
        call, session = self._call_of(chain), self._session_of(chain)
        waits = list(session.waits.values()) if session else []
        tools = list(call.tools.values()) if call else []
        if any(tool.is_open for tool in tools) or any(wait.ended_s is None for wait in waits):
            return False
        return bool(tools) or any(wait.ended_s is not None and wait.ended_s >= chain.since_s for wait in waits)

    def _first_rest(self, request_id: str, hint: Hint | None, now: float) -> Stall:
        stalled = Chain(request_id, (), hint, "stalled", now)
        return expected_rest(stalled, self._call_of(stalled), self._session_of(stalled), self.forecast, now)

    def _call_of(self, chain: Chain) -> Call | None:
        return None if chain.hint is None else self._registry.calls.get(chain.hint.call or chain.id)

    def _session_of(self, chain: Chain) -> Session | None:
        return None if chain.hint is None else self._registry.sessions.get(chain.hint.session)

    # --- the step ---------------------------------------------------------------------------------------

    def before_step(self, now: float) -> None:
        """What is due, and room for those who wait."""
        self._steps += 1
        self._scheduled_s.append(now)
        self._now = now
        if self._dead:
            self.demote_dead()
        for name in self.alarm.take_due(now):
            chain = self.chains.by_id.get(name)
            if chain is not None and chain.phase == "stalled":
                self._look(chain, now)
        if self._policy.does_wait_for_demand and self._steps % _PAPER_BACKOFF_STEPS == 0 and self._scheduler.waiting:
            self._ask_again(now)
        if self.cache.held:
            self.yield_pins()
        if len(self.uploads):
            self.uploads.start()

    def _look(self, chain: Chain, now: float) -> None:
        if chain.give_up_s is not None and chain.give_up_s <= now:
            self.count("kv_stalls", "given_up")
            self._drop(chain)
            return
        if chain.due_s is not None and chain.due_s <= now:
            chain.due_s = None
            self.uploads.want(chain.id)
        if chain.keep_until_s is not None and chain.keep_until_s <= now:
            self._stop_keeping(chain)

    def _plan_upload(self, chain: Chain, now: float, rest: Stall | None) -> None:
        """Time the upload by the forecast; the agent is back already where `rest` is None."""
        if self.settings.upload:
            blocks = len(chain.keys)
            wait_s = 0.0 if rest is None else self._policy.upload_in_s(rest, blocks, self.cache.rates, self.settings)
            chain.due_s = now + wait_s
            self.alarm.set(chain.id, chain.due_s)

    def _stop_keeping(self, chain: Chain) -> None:
        """A short stall has become a long one, or somebody needs the room: copy, then let go."""
        blocks = self.cache.held.get(chain.id)
        if blocks and not self.uploads.has_brought(chain.id):
            self._store(chain, chain.keys[: len(blocks)], blocks)
        self.cache.release(chain.id)
        self.cache.part(chain.id, chain.keys)
        chain.outcome, chain.keep_until_s = "offload", None

    def yield_pins(self) -> None:
        """Pins go before anybody has to wait or to be preempted for them."""
        need = GROWTH_BLOCKS * len(self._scheduler.running)
        heir = None
        for request in itertools.islice(self._scheduler.waiting, 1):
            need += -(-request.num_tokens // self._scheduler.block_size)
            heir = self._parents.get(request.request_id)
        for name in sorted(self.cache.held, key=lambda name: name == heir):
            if self._pool.get_num_free_blocks() >= need:
                return
            chain = self.chains.by_id.get(name)
            if chain is not None and chain.keep_until_s is not None:
                self._stop_keeping(chain)
            else:
                self.cache.release(name)
            self.count("kv_pins", "yielded")

    def _ask_again(self, now: float) -> None:
        """The published gate looks again at what it refused, while the blocks are still there."""
        refused = (c for c in self.chains if c.phase == "stalled" and c.outcome == "leave")
        for chain in list(itertools.islice(refused, QUEUE_SCAN)):
            here = self.cache.on_device(chain.keys)
            if len(here) < len(chain.keys):
                continue
            rest = expected_rest(chain, self._call_of(chain), self._session_of(chain), self.forecast, now)
            decision = self._policy.at_finish(self._finished(chain, rest), self.cache.rates, self.settings)
            if decision.action == "offload":
                self._do(decision, chain, here, rest, now)

    def after_step(self, started: Sequence[Request], resumed: Sequence[str], now: float) -> None:
        """Some calls got a slot."""
        for request in started:
            self.start(request)
        for name in resumed:
            if (chain := self.chains.by_id.get(name)) is not None:
                chain.phase = "running"
        if started:
            is_queue = bool(self._scheduler.waiting)
            if is_queue and self._admitted_s is not None:
                self.cache.rates.admission.learn(len(started), now - self._admitted_s)
            self._admitted_s = now if is_queue else None

    def complete_step(self, tokens: int, now: float) -> None:
        """The device is through with a step of so many tokens."""
        began = max(self._scheduled_s.popleft() if self._scheduled_s else now, self._completed_s)
        self._completed_s = now
        if tokens >= _PREFILL_STEP_TOKENS:
            self.cache.rates.prefill.learn(tokens, now - began)
        self.demote_dead()

    def is_stalled(self, chain_id: str) -> bool:
        """Whether this chain still waits for somebody."""
        chain = self.chains.by_id.get(chain_id)
        return chain is not None and chain.phase == "stalled"

    # --- the rest -----------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Give back everything that is held; what the host has is as old as what the device had."""
        self.uploads.reset()
        self._dead.clear()
        self.cache.reset()

    def residency(self, session: str) -> list[dict[str, Any]]:
        """Where the KV of a session's calls is, in blocks."""
        return [
            {
                "call": (chain.hint.call if chain.hint else None) or chain.id,
                "phase": chain.phase,
                "decision": chain.outcome,
                "blocks": len(chain.keys),
                "on_device": len(self.cache.on_device(chain.keys)),
                "on_host": len(self.cache.tier.ready(chain.keys)),
                "pinned": len(self.cache.held.get(chain.id, ())),
            }
            for chain in self.chains.of_session(session)
        ]

    def count(self, *key: str, by: float = 1) -> None:
        """Add to a counter: name and labels."""
        self._add(key, by)

    def _add(self, key: tuple[str, ...], by: float) -> None:
        if by:
            self._registry.counts[key] += by
