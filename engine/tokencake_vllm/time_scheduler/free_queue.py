"""Order in which free device blocks are given away: empty ones, those of dropped prefixes, the longest unused.

Free blocks still hold what was computed. vLLM gives away the empty ones first and then the least recently used. Blocks
of dropped prefixes are put between the two, as many as a step may take, so that none is lost while there are empty
ones. An upload takes blocks that are worth less than what it brings.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

from tokencake_vllm.vllm_adapter.block_pool import (
    block_hash_of,
    find_block,
    free_list,
    move_before,
    move_to_tail,
    next_free,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.sched.scheduler import Scheduler

    from tokencake.time_scheduler.dropped import Dropped
    from tokencake.time_scheduler.prefixes import CachedPrefix, PrefixIndex
    from tokencake_vllm.transfer.host_cache import HostCache

_FREE_SCAN: Final = 1_024
"""Free blocks scanned for unreferenced ones, for each upload."""
_MAX_SOURCES: Final = 8
"""Stalled prefixes asked for blocks, those needed last first."""
_LATER_TIMES: Final = 2.0
_LATER_S: Final = 1.0
"""A prefix gives its blocks to one that is needed in less than half the time, less a second."""


class FreeQueue:
    """The free queue of one block pool."""

    def __init__(self, scheduler: Scheduler, cache: HostCache, prefixes: PrefixIndex, dropped: Dropped) -> None:
        self._cache, self._prefixes, self._dropped = cache, prefixes, dropped
        self._pool = scheduler.kv_cache_manager.block_pool
        # An empty block for each running call, and the prompts of a step.
        self._step_blocks = scheduler.max_num_running_reqs + scheduler.max_num_scheduled_tokens // scheduler.block_size

    def put_dropped_first(self) -> None:
        """Put as many dropped blocks behind the empty ones as the next step may take beyond those."""
        if not len(self._dropped):
            return
        position, count = self._head_run()
        held: list[bytes] = []
        first: list[KVCacheBlock] = []
        while count + len(first) < self._step_blocks and (key := self._dropped.take()) is not None:
            block = find_block(self._pool, key)
            if key in self._prefixes.refcounts:
                self._dropped.discard(key)
            elif block is None:
                continue
            elif block.ref_cnt:  # with async scheduling it comes free a step after the end of its call
                held.append(key)
            else:
                first.append(block)
        moved = {block.block_id for block in first}
        while position is not None and position.block_id in moved:
            position = next_free(position)
        move_before(self._pool, position, first)
        for key in held:
            self._dropped.put_back(key)

    def _head_run(self) -> tuple[KVCacheBlock | None, int]:
        """The first block behind the empty and the dropped ones, or behind those of a step, and how many these are."""
        count = 0
        for block in free_list(self._pool):
            key = block_hash_of(block)
            if count >= self._step_blocks or (key is not None and not self._dropped.is_first(key)):
                return block, count
            count += 1
        return None, count

    def renew(self, keys: Iterable[bytes]) -> None:
        """Give the blocks with these hashes away last, as if they had been used now."""
        found = (find_block(self._pool, key) for key in keys)
        move_to_tail(self._pool, [block for block in found if block is not None])

    def reclaimable(self, prefix: CachedPrefix, count: int, now: float) -> list[KVCacheBlock]:
        """Up to `count` free blocks that hold nothing, or what is worth less than the blocks of `prefix`."""
        found = list(itertools.islice(self._unreferenced(), count))
        if len(found) < count:
            found += itertools.islice(self._of_later_prefixes(prefix, now), count - len(found))
        return found

    def _unreferenced(self) -> Iterator[KVCacheBlock]:
        for block in itertools.islice(free_list(self._pool), _FREE_SCAN):
            key = block_hash_of(block)
            if key is None or key not in self._prefixes.refcounts:
                yield block

    def _of_later_prefixes(self, prefix: CachedPrefix, now: float) -> Iterator[KVCacheBlock]:
        """Free blocks at the ends of prefixes that are needed far later, have a host copy and no other reference."""
        from_s = _LATER_TIMES * prefix.remaining_s(now) + _LATER_S
        later = [c for c in self._prefixes if c.phase == "stalled" and c.remaining_s(now) > from_s]
        for donor in sorted(later, key=lambda c: -c.remaining_s(now))[:_MAX_SOURCES]:
            for key in reversed(donor.block_hashes[: len(self._cache.tier.ready(donor.block_hashes))]):
                if self._prefixes.refcounts[key] > 1:
                    break
                block = find_block(self._pool, key)
                if block is not None and not block.ref_cnt:
                    yield block
