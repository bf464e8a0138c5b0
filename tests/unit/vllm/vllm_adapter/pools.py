"""A block pool of vLLM's own, and requests that hold blocks of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import RequestStatus

from tokencake_vllm.vllm_adapter.block_pool import publish_block

BLOCK_TOKENS = 16


def keys(name: str, count: int) -> list[bytes]:
    """Hashes of a prefix."""
    return [f"{name}{place}".encode().ljust(32) for place in range(count)]


class Device:
    """A pool of `count` blocks that can be allocated, and what vLLM's manager and scheduler tell of it."""

    def __init__(self, count: int = 20) -> None:
        self.pool = BlockPool(count + 1, enable_caching=True, hash_block_size=BLOCK_TOKENS)
        self.tables: dict[str, list[KVCacheBlock]] = {}
        manager = SimpleNamespace(req_to_blocks=self.tables)
        self.manager: Any = SimpleNamespace(
            block_pool=self.pool,
            coordinator=SimpleNamespace(
                get_blocks=lambda name: (self.tables.get(name, []),), single_type_managers=[manager]
            ),
        )
        self.requests: dict[str, Any] = {}

    def take(self, block_hashes: list[bytes], *, free: bool = False) -> list[KVCacheBlock]:
        """Blocks that hold these hashes; `free`: nobody holds them any more."""
        blocks = list(self.pool.get_new_blocks(len(block_hashes)))
        for place, (block, key) in enumerate(zip(blocks, block_hashes, strict=True), start=1):
            publish_block(self.pool, block, key, place * BLOCK_TOKENS)
        if free:
            self.pool.free_blocks(reversed(blocks))
        return blocks

    def hold(self, name: str, blocks: list[KVCacheBlock], status: Any = RequestStatus.RUNNING, **fields: Any) -> Any:
        """The request has these blocks, shared ones once more."""
        self.tables[name] = blocks
        return self.request(name, status=status, **fields)

    def request(self, name: str, status: Any = RequestStatus.WAITING, **fields: Any) -> Any:
        """A request of which vLLM's scheduler knows."""
        usual = {"request_id": name, "status": status, "num_tokens": 16, "block_hashes": [], "max_tokens": 100}
        usual |= {"num_output_tokens": 0, "is_finished": lambda: RequestStatus.is_finished(status)}
        self.requests[name] = SimpleNamespace(**{**usual, **fields})
        return self.requests[name]

    @property
    def order(self) -> list[int]:
        """Ids of the free blocks, the next to be given away first."""
        return [block.block_id for block in self.pool.free_block_queue.get_all_free_blocks()]


def ids(blocks: list[KVCacheBlock]) -> list[int]:
    """Their ids."""
    return [block.block_id for block in blocks]
