"""Which stalled agent's KV comes back before the agent does, where does it find room, and was it of use?

An upload takes free blocks only, beyond what waiting calls need, and only such as nobody wants. What it brought stays
pinned until the call is there, somebody needs the room, or the stall is given up.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

from vllm.logger import init_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.v1.core.kv_cache_utils import KVCacheBlock

    from tokencake.stalls import Chain, Chains
    from tokencake_vllm.host_cache import HostCache

logger = init_logger("vllm.tokencake")

PER_STEP: Final = 4
QUEUE_SCAN: Final = 32
"""Waiting calls looked at for their demand: those behind will not get room in this step."""
GROWTH_BLOCKS: Final = 2
"""Left free for each running call."""
_GROUP_BYTES: Final = 4


def key_of(full_hash: bytes) -> bytes:
    """A block's hash without the group it is kept for."""
    return full_hash[:-_GROUP_BYTES]


def demand(scheduler: Any) -> tuple[int, int, int]:
    """Calls that wait, the blocks that those at the head need, and how many of these could be had now."""
    blocks, fitting = 0, 0
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    for request in itertools.islice(scheduler.waiting, QUEUE_SCAN):
        need = -(-request.num_tokens // scheduler.block_size)
        blocks += need
        if fitting + need <= free:
            fitting += need
    return len(scheduler.waiting), blocks, fitting


class Uploads:
    """Request-free copies to the device."""

    def __init__(
        self,
        scheduler: Any,
        cache: HostCache,
        chains: Chains,
        count: Callable[..., None],
        keep_share: float,
    ) -> None:
        self._scheduler, self._cache, self._chains, self._count = scheduler, cache, chains, count
        self._pool = scheduler.kv_cache_manager.block_pool
        self._max_pinned = int(keep_share * self._pool.num_gpu_blocks)
        self._ready: dict[str, bool] = {}
        """Chains whose upload is due; whether it was refused for want of room."""
        self._spans: dict[str, tuple[int, int]] = {}
        """First and last block of what was uploaded for a chain and has not been used."""

    def __len__(self) -> int:
        return len(self._ready)

    def want(self, chain_id: str) -> None:
        """Its time has come."""
        self._ready.setdefault(chain_id, False)

    def cancel(self, chain_id: str) -> None:
        """Start nothing more for it."""
        self._ready.pop(chain_id, None)

    def has_brought(self, chain_id: str) -> bool:
        """Whether blocks were uploaded for it, or are on their way."""
        return chain_id in self._spans

    def is_late(self, chain: Chain) -> bool:
        """Whether its blocks are still on their way."""
        span = self._spans.get(chain.id)
        return span is not None and any(key in self._cache.loading for key in chain.keys[span[0] : span[1]])

    def settle(self, chain_id: str, local_blocks: int | None) -> int:
        """The call came and hit `local_blocks` on the device, or (None) it will not come.

        Returns:
            How many of the blocks it hit the upload had brought.
        """
        self.cancel(chain_id)
        span = self._spans.pop(chain_id, None)
        if span is None:
            return 0
        gained = 0 if local_blocks is None else max(0, min(local_blocks, span[1]) - span[0])
        self._count("kv_uploads", "used" if gained else "wasted")
        return gained

    def reset(self) -> None:
        """Forget all."""
        self._ready.clear()
        self._spans.clear()

    # --- start --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start what is due and finds room."""
        room = self._room()
        if room <= 0:
            self._refuse(next(iter(self._ready)))
            return
        for name in list(itertools.islice(self._ready, PER_STEP)):
            chain = self._chains.by_id.get(name)
            if chain is None:
                self.cancel(name)
                continue
            here = self._cache.on_device(chain.keys)
            left = len(self._cache.tier.ready(chain.keys[len(here) :]))
            if not left:
                self.cancel(name)
                self._stay(chain, here)
                continue
            budget = self._max_pinned - self._cache.pinned_blocks - len(here)
            # Gradually, half of what is missing at a time (paper 4.3); every piece is a hit of its own.
            piece = (left + 1) // 2 if left > self._cache.job_blocks else left
            # Beside it another call of this size must still find room, or it would only be in the way.
            count = min(piece, room - len(chain.keys), budget)
            if count <= 0:
                self._refuse(name)
                break
            room -= count
            self.cancel(name)
            self._upload(chain, here, count)

    def _refuse(self, name: str) -> None:
        if not self._ready[name]:
            self._ready[name] = True
            self._count("kv_uploads", "no_room")

    def _upload(self, chain: Chain, here: list[KVCacheBlock], count: int) -> None:
        cache = self._cache
        is_first = chain.id not in self._spans
        cache.release(chain.id)
        cache.hold(chain.id, here)

        def landed(ok: bool) -> None:  # a callback has no keywords
            if chain.id in self._chains.by_id and ok:
                self.want(chain.id)  # perhaps there is more of it
            elif not ok:
                self._spans.pop(chain.id, None)
                self._count("kv_uploads", "failed")
                cache.release(chain.id)
            elif chain.id not in self._spans:  # given up meanwhile
                cache.release(chain.id)

        started = cache.upload(chain.id, chain.keys, len(here), count, landed)
        if not started:
            cache.release(chain.id)
            return
        if is_first:
            self._count("kv_uploads", "started")
        first = self._spans.get(chain.id, (len(here), 0))[0]
        self._spans[chain.id] = (first, len(here) + started)

    def _stay(self, chain: Chain, here: list[KVCacheBlock]) -> None:
        """All of it is on the device: it only has to stay, if there is room for that."""
        budget = min(self._max_pinned - self._cache.pinned_blocks, self._pool.get_num_free_blocks() // 2)
        if here and chain.id not in self._cache.held and len(here) <= budget and not self._scheduler.waiting:
            self._cache.hold(chain.id, here)

    def _room(self) -> int:
        """Free blocks beyond what waits and what grows, up to the first that somebody wants."""
        _, waiting_blocks, _ = demand(self._scheduler)
        free = self._pool.get_num_free_blocks() - waiting_blocks - GROWTH_BLOCKS * len(self._scheduler.running)
        room = 0
        block = self._pool.free_block_queue.fake_free_list_head.next_free_block
        while room < free and block is not None and block.next_free_block is not None:
            if block.block_hash is not None and key_of(block.block_hash) in self._chains.wanted:
                break
            room += 1
            block = block.next_free_block
        return room
