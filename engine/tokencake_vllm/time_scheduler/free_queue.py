"""Order in which free device blocks are given away: empty ones, those of dropped prefixes, the longest unused.

Free blocks still hold what was computed. vLLM's queue has the empty ones first and then the longest unused. Blocks of
dropped prefixes are put between the two, no more than a step may take, so that none goes while there are empty ones. An
upload takes such as are worth less than what it brings.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.sched.scheduler import Scheduler

    from tokencake.time_scheduler.dropped import Dropped
    from tokencake.time_scheduler.prefixes import Chain, Chains
    from tokencake_vllm.transfer.host_cache import HostCache

_FREE_SCAN: Final = 1_024
"""Free blocks looked at for such as nobody wants."""
_DONORS: Final = 8
"""Stalled chains asked for blocks, those needed last first."""
_LATER_TIMES: Final = 2.0
_LATER_S: Final = 1.0
"""A chain gives its blocks to one that is needed in less than half the time, less a second (our choice)."""
_GROUP_BYTES: Final = 4


def key_of(full_hash: bytes) -> bytes:
    """A block's hash without the group it is kept for."""
    return full_hash[:-_GROUP_BYTES]


class FreeOrder:
    """The free queue of one block pool."""

    def __init__(self, scheduler: Scheduler, cache: HostCache, chains: Chains, dropped: Dropped) -> None:
        self._cache, self._chains, self._dropped = cache, chains, dropped
        self._pool = scheduler.kv_cache_manager.block_pool
        # An empty block for each running call, and the prompts of a step.
        self._step_blocks = scheduler.max_num_running_reqs + scheduler.max_num_scheduled_tokens // scheduler.block_size

    def put_dropped_first(self) -> None:
        """Put as many dropped blocks behind the empty ones as the next step may take beyond those."""
        if not len(self._dropped):
            return
        queue = self._pool.free_block_queue
        behind: Any
        behind, count = self._head_run(queue)
        held: list[bytes] = []
        first: list[KVCacheBlock] = []
        while count + len(first) < self._step_blocks and (key := self._dropped.take()) is not None:
            block = self._find(key)
            if key in self._chains.wanted:
                self._dropped.discard(key)
                continue
            if block is None:
                continue
            if block.ref_cnt:  # with async scheduling it comes free a step after the end of its call
                held.append(key)
                continue
            if block is behind:
                behind = block.next_free_block
            queue.remove(block)
            first.append(block)
        _insert(queue, behind, first)
        for key in held:
            self._dropped.put_back(key)

    def _head_run(self, queue: Any) -> tuple[KVCacheBlock, int]:
        """The first block behind the empty and the dropped ones, or behind those of a step, and how many these are."""
        block, count = queue.fake_free_list_head.next_free_block, 0
        while count < self._step_blocks and block is not queue.fake_free_list_tail:
            if block.block_hash is not None and not self._dropped.is_first(key_of(block.block_hash)):
                break
            block, count = block.next_free_block, count + 1
        return block, count

    def prefer(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Give these free blocks away next."""
        queue = self._pool.free_block_queue
        for block in blocks:
            queue.remove(block)
        queue.prepend_n(list(blocks))

    def renew(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Give those of these blocks that are free away last, as if they had been used now."""
        free = [block for block in blocks if not block.ref_cnt]
        self._pool.touch(free)
        self._pool.free_blocks(reversed(free))

    def renew_keys(self, keys: Iterable[bytes]) -> None:
        """The same, by the hashes of blocks."""
        self.renew([block for key in keys if (block := self._find(key)) is not None])

    def worth_less(self, chain: Chain, count: int, now: float) -> list[KVCacheBlock]:
        """Up to `count` free blocks that hold nothing, or what is worth less than the blocks of `chain`."""
        found = list(itertools.islice(self._unwanted(), count))
        if len(found) < count:
            found += itertools.islice(self._of_later(chain, now), count - len(found))
        return found

    def _unwanted(self) -> Iterator[KVCacheBlock]:
        block = self._pool.free_block_queue.fake_free_list_head.next_free_block
        for _ in range(_FREE_SCAN):
            if block is None or block.next_free_block is None:
                return
            if block.block_hash is None or key_of(block.block_hash) not in self._chains.wanted:
                yield block
            block = block.next_free_block

    def _of_later(self, chain: Chain, now: float) -> Iterator[KVCacheBlock]:
        """From the ends of chains that are needed far later: what is free, wanted by nobody else and on the host."""
        from_s = _LATER_TIMES * chain.rest_s(now) + _LATER_S
        later = [c for c in self._chains if c.phase == "stalled" and c.rest_s(now) > from_s]
        for donor in sorted(later, key=lambda c: -c.rest_s(now))[:_DONORS]:
            for key in reversed(donor.keys[: len(self._cache.tier.ready(donor.keys))]):
                if self._chains.wanted[key] > 1:
                    break
                block = self._find(key)
                if block is not None and not block.ref_cnt:
                    yield block

    def _find(self, key: bytes) -> KVCacheBlock | None:
        block: KVCacheBlock | None = self._pool.cached_block_hash_to_block.get_one_block(
            make_block_hash_with_group_id(BlockHash(key), 0)
        )
        return block


def _insert(queue: Any, behind: Any, blocks: Sequence[KVCacheBlock]) -> None:
    """Put `blocks` into the queue before `behind`, a block in it or its end; vLLM has no method for that."""
    before = behind.prev_free_block
    for block in blocks:
        before.next_free_block, block.prev_free_block = block, before
        before = block
    before.next_free_block, behind.prev_free_block = behind, before
    queue.num_free_blocks += len(blocks)
