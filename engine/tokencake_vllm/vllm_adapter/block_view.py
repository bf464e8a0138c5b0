"""Holders of KV blocks: questions to vLLM's block pool that cost a few look-ups, whatever the length of a prompt.

Requests share blocks from the first one on, so each border is found by bisection.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final

from tokencake_vllm.vllm_adapter.block_pool import find_block

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import Request

_NOTHING: Final[Mapping[int, int]] = {}


class BlockView:
    """The first KV-cache group of a block manager, read only.

    Args:
        manager: vLLM's.
        block_tokens: tokens of a block.
        counts_whole_prompts: whether a waiting request is taken to need blocks that others hold already.
    """

    def __init__(self, manager: KVCacheManager, block_tokens: int, *, counts_whole_prompts: bool = False) -> None:
        self._manager = manager
        self._counts_whole_prompts = counts_whole_prompts
        self.block_tokens = block_tokens
        self.total_blocks = max(1, manager.block_pool.num_gpu_blocks - 1)
        """Without the null block."""

    @property
    def free_blocks(self) -> int:
        """Free blocks, cached ones included."""
        return self._manager.block_pool.get_num_free_blocks()

    def blocks_of(self, tokens: int) -> int:
        """Blocks that a number of tokens needs."""
        return -(-tokens // self.block_tokens)

    def held_prefix_blocks(self, request: Request, excluding: Mapping[int, int] = _NOTHING) -> int:
        """Blocks at the head of a waiting request that are on the device and held by others: they cost it nothing.

        Holds in `excluding` (block id -> number) do not count.
        """
        hashes, pool = request.block_hashes, self._manager.block_pool

        def is_held(index: int) -> bool:
            block = find_block(pool, hashes[index])
            return block is not None and block.ref_cnt > excluding.get(block.block_id, 0)

        # The last token is always computed, so vLLM hits no block that ends behind it.
        return _first_without(is_held, min(len(hashes), (request.num_tokens - 1) // self.block_tokens))

    def needed_blocks(self, request: Request) -> int:
        """Blocks that a waiting request needs to start: its own without those that others hold already.

        The one rule for it. The published scheduler counts whole prompts.
        """
        held = 0 if self._counts_whole_prompts else self.held_prefix_blocks(request)
        return self.blocks_of(request.num_tokens) - held

    def freed_by(self, leaving: Iterable[str], request: Request) -> int:
        """Blocks that come free when these requests lose theirs, without those that the waiting `request` will hit."""
        tables = (self._manager.coordinator.get_blocks(name)[0] for name in leaving)
        holds = Counter(block.block_id for table in tables for block in table)
        for key in request.block_hashes[: self.held_prefix_blocks(request)]:
            if (block := find_block(self._manager.block_pool, key)) is not None:
                holds.pop(block.block_id, None)
        return self.freed_if_released(holds)

    def freed_if_released(self, holds: Mapping[int, int]) -> int:
        """Blocks whose reference count equals the given holds (block id -> number)."""
        blocks = self._manager.block_pool.blocks
        return sum(1 for number, count in holds.items() if blocks[number].ref_cnt == count)

    def allocated_blocks(self, request_id: str) -> int:
        """Blocks that a request has."""
        return len(self._manager.coordinator.get_blocks(request_id)[0])

    def exclusive_blocks(self, request_id: str, *, holders: int = 1) -> int:
        """Blocks of a request with at most `holders` references; with 1, those that come free when it ends."""
        blocks = self._manager.coordinator.get_blocks(request_id)[0]
        return len(blocks) - _first_without(lambda index: blocks[index].ref_cnt > holders, len(blocks))


def _first_without(has: Callable[[int], bool], count: int) -> int:
    """The first of `count` places that `has` denies; it grants none behind one that it denies."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if has(middle):
            low = middle + 1
        else:
            high = middle
    return low
