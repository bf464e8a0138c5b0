"""vLLM's block pool: blocks by their hash, and the order of its free list.

A free block keeps what was computed until vLLM gives it away. vLLM takes blocks from the head of the list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

GROUP: Final = 0
"""The KV-cache group whose blocks are moved."""
_GROUP_BYTES: Final = 4


def find_block(pool: BlockPool, block_hash: bytes) -> KVCacheBlock | None:
    """The block with this hash in the prefix cache, or None."""
    block: KVCacheBlock | None = pool.cached_block_hash_to_block.get_one_block(
        make_block_hash_with_group_id(BlockHash(block_hash), GROUP)
    )
    return block


def block_hash_of(block: KVCacheBlock) -> bytes | None:
    """The hash of a cached block, without the group that vLLM keeps with it; None for an empty block."""
    return None if block.block_hash is None else block.block_hash[:-_GROUP_BYTES]


def publish_block(pool: BlockPool, block: KVCacheBlock, block_hash: bytes, num_tokens: int) -> None:
    """Make a block that was filled without a request a prefix-cache hit, for prompts of `num_tokens` up to its end."""
    key = make_block_hash_with_group_id(BlockHash(block_hash), GROUP)
    pool._insert_block_hash(key, block, num_tokens=num_tokens)  # noqa: SLF001  # the public way wants a request


def free_list(pool: BlockPool) -> Iterator[KVCacheBlock]:
    """The free blocks, the next to be given away first. The list may not change meanwhile."""
    block = pool.free_block_queue.fake_free_list_head.next_free_block
    while block is not None and block.next_free_block is not None:  # the last one is vLLM's end mark
        yield block
        block = block.next_free_block


def next_free(block: KVCacheBlock) -> KVCacheBlock | None:
    """The free block that is given away after this one; None behind the last."""
    following = block.next_free_block
    return None if following is None or following.next_free_block is None else following


def move_to_head(pool: BlockPool, blocks: Sequence[KVCacheBlock]) -> None:
    """Let vLLM give these free blocks away next."""
    queue = pool.free_block_queue
    for block in blocks:
        queue.remove(block)
    queue.prepend_n(list(blocks))


def move_to_tail(pool: BlockPool, blocks: Iterable[KVCacheBlock]) -> None:
    """Let vLLM give away last those of these blocks that are free, as if they had been used now."""
    free = [block for block in blocks if not block.ref_cnt]
    pool.touch(free)
    pool.free_blocks(reversed(free))


def move_before(pool: BlockPool, position: KVCacheBlock | None, blocks: Sequence[KVCacheBlock]) -> None:
    """Put these free blocks before the free block `position`, which is none of them, or at the end."""
    queue: Any = pool.free_block_queue
    for block in blocks:
        queue.remove(block)
    after: Any = queue.fake_free_list_tail if position is None else position
    before = after.prev_free_block
    for block in blocks:
        before.next_free_block, block.prev_free_block = block, before
        before = block
    before.next_free_block, after.prev_free_block = after, before
    queue.num_free_blocks += len(blocks)
