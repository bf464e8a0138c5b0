"""Which free device block is given away first? By vLLM the longest unused; here what nobody wants goes before it.

Free blocks still hold what was computed. Those that only a dead chain wanted go to the head of vLLM's free queue; an
upload takes such as are worth less than what it brings.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from vllm.v1.core.kv_cache_utils import KVCacheBlock

    from tokencake.stalls import Chain, Chains
    from tokencake_vllm.host_cache import HostCache
    from tokencake_vllm.scheduler import TokenCakeMixin

_PATIENCE: Final = 8
"""With async scheduling the blocks of a call are set free a step after its end: so often a dead block is asked for."""
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

    def __init__(self, scheduler: TokenCakeMixin, cache: HostCache, chains: Chains) -> None:
        self._cache, self._chains = cache, chains
        self._pool = scheduler.kv_cache_manager.block_pool
        self._is_late = bool(scheduler.defer_block_free)
        self._dead: list[tuple[KVCacheBlock, bytes, int]] = []

    def bury(self, keys: Iterable[bytes]) -> None:
        """Nobody wants these any more."""
        for key in keys:
            if (block := self._find(key)) is not None and block.block_hash is not None:
                self._dead.append((block, block.block_hash, 0))

    def demote_dead(self) -> None:
        """Dead blocks that are free go to the head of the free queue, the tail of a chain first."""
        if not self._dead:
            return
        dead, self._dead = self._dead, []
        first: dict[int, KVCacheBlock] = {}
        for block, full, asked in dead:
            if block.block_hash != full or key_of(full) in self._chains.wanted:
                continue
            if block.ref_cnt == 0:
                first[block.block_id] = block
            elif self._is_late and asked < _PATIENCE:
                self._dead.append((block, full, asked + 1))
        self.prefer(list(first.values()))

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

    def worth_less(self, chain: Chain, count: int, now: float) -> list[KVCacheBlock]:
        """Up to `count` free blocks that hold nothing, or what is worth less than the blocks of `chain`."""
        found = list(itertools.islice(self._unwanted(), count))
        if len(found) < count:
            found += itertools.islice(self._of_later(chain, now), count - len(found))
        return found

    def forget(self) -> None:
        """What was dead has been reset."""
        self._dead.clear()

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
