"""Occupancy of the KV blocks, and how much of what stayed cached was hit again.

Watches the block pool of vLLM: a block is held (referenced), cached (free, but a later call may hit it) or empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.sched.scheduler import Scheduler

    from tokencake_sim.clients.calls import SimCall
    from tokencake_sim.device.clock import Clock


@dataclass(frozen=True, slots=True)
class KVSample:
    """Shares of the blocks at one moment."""

    time_s: float
    running: float
    """Held by calls that run or load."""
    pinned: float
    """Held by none of these: pinned by a policy, or held by a copy under way."""
    stalled: float
    """Cached and free, the context of an agent whose tool runs."""
    other_cached: float
    calls_running: int
    calls_waiting: int


class KVOccupancy:
    """Block-seconds of one scheduler's pool."""

    def __init__(self, scheduler: Scheduler, clock: Clock) -> None:
        self._scheduler = scheduler
        self._pool: BlockPool = scheduler.kv_cache_manager.block_pool
        self._clock = clock
        self._free_since_s: dict[int, float] = {}
        self._held = 0
        self._held_since_s = 0.0
        self.total_blocks = self._pool.num_gpu_blocks - 1
        """Without the null block."""
        self.held_block_s = 0.0
        self.reused_block_s = 0.0
        """Cached block-seconds that ended in a hit."""
        self.samples: list[KVSample] = []
        self._watch()

    def _watch(self) -> None:
        pool = self._pool
        touch, free, new = pool.touch, pool.free_blocks, pool.get_new_blocks

        def watched_touch(blocks: Sequence[KVCacheBlock]) -> None:
            now_s = self._clock.now_s
            for block in blocks:
                if block.ref_cnt == 0 and (since_s := self._free_since_s.pop(block.block_id, None)) is not None:
                    self.reused_block_s += now_s - since_s
            touch(blocks)

        def watched_free(ordered_blocks: Iterable[KVCacheBlock]) -> None:
            blocks = list(ordered_blocks)
            free(blocks)
            now_s = self._clock.now_s
            for block in blocks:
                if block.ref_cnt == 0 and block.block_hash is not None:
                    self._free_since_s[block.block_id] = now_s

        def watched_new(num_blocks: int) -> list[KVCacheBlock]:
            blocks = new(num_blocks)
            for block in blocks:
                self._free_since_s.pop(block.block_id, None)
            return blocks

        pool_as_any: Any = pool
        pool_as_any.touch, pool_as_any.free_blocks, pool_as_any.get_new_blocks = (
            watched_touch,
            watched_free,
            watched_new,
        )

    @property
    def free_blocks(self) -> int:
        """Free blocks, cached ones included."""
        return self._pool.get_num_free_blocks()

    def account(self) -> None:
        """Account for the blocks held since the last call; call it after every change and before the clock moves."""
        now_s = self._clock.now_s
        self.held_block_s += self._held * (now_s - self._held_since_s)
        self._held, self._held_since_s = self.total_blocks - self.free_blocks, now_s

    def sample(self, stalled: Iterable[SimCall]) -> None:
        """Record the state of all blocks now."""
        blocks_of = self._scheduler.kv_cache_manager.get_blocks
        holders = [
            request_id
            for request_id, request in self._scheduler.requests.items()
            if request.num_computed_tokens and not request.is_finished()
        ]
        running = {block.block_id for name in holders for block in blocks_of(name).blocks[0]}
        find = self._pool.cached_block_hash_to_block.get_one_block
        contexts: set[int] = set()
        for call in stalled:
            for block_hash in call.block_hashes:
                block = find(make_block_hash_with_group_id(block_hash, 0))  # type: ignore[arg-type]  # a NewType of bytes
                if block is not None and block.ref_cnt == 0:
                    contexts.add(block.block_id)
        held = self.total_blocks - self.free_blocks
        share = 1.0 / self.total_blocks
        self.samples.append(
            KVSample(
                time_s=self._clock.now_s,
                running=len(running) * share,
                pinned=max(0, held - len(running)) * share,
                stalled=len(contexts) * share,
                other_cached=(len(self._free_since_s) - len(contexts)) * share,
                calls_running=len(self._scheduler.running),
                calls_waiting=len(self._scheduler.waiting) + len(self._scheduler.kv_holding_waiting),
            )
        )
