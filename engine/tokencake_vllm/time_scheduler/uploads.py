"""Uploads: KV of stalled agents comes back to the device before the agents do.

An upload may use only free blocks in excess of what waiting requests need: unreferenced ones first, then blocks of
agents that return much later and have a host copy. What it has brought is not pinned. It is the newest of the free
blocks, so that it is given away last, and no request waits for it. Each stall has one upload: a wrong forecast costs
one copy.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

from tokencake_vllm.vllm_adapter.block_pool import move_to_head, move_to_tail

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.sched.scheduler import Scheduler

    from tokencake.registry.metric_names import CountByName
    from tokencake.time_scheduler.prefixes import CachedPrefix, PrefixIndex
    from tokencake_vllm.time_scheduler.free_queue import FreeQueue
    from tokencake_vllm.transfer.host_cache import HostCache
    from tokencake_vllm.vllm_adapter.block_view import BlockView

PER_STEP: Final = 4
RETRY_STEPS: Final = 4
"""Steps until an upload that found no room is tried again."""
QUEUE_SCAN: Final = 32
"""Waiting calls looked at for their demand: those behind will not get room in this step."""
IDLE_FREE_SHARE: Final = 0.5
"""A device with so much of it free has room to look ahead."""
GROWTH_BLOCKS: Final = 2
"""Left free for each running call."""


class Uploads:
    """Request-free copies to the device."""

    def __init__(
        self,
        scheduler: Scheduler,
        view: BlockView,
        cache: HostCache,
        prefixes: PrefixIndex,
        order: FreeQueue,
        is_worth: Callable[[CachedPrefix], bool],
        count: CountByName,
    ) -> None:
        self._scheduler, self._view, self._cache, self._prefixes = scheduler, view, cache, prefixes
        self._free_queue, self._is_worthwhile, self._count = order, is_worth, count
        self._pool = scheduler.kv_cache_manager.block_pool
        self._ready: dict[str, int] = {}
        """Prefixes whose upload is due; the step at which it found no room, or 0."""
        self._spans: dict[str, tuple[int, int]] = {}
        """First and last block of what was uploaded for a prefix and has not been used."""

    def __len__(self) -> int:
        return len(self._ready)

    def add_due(self, prefix_id: str) -> None:
        """Its time has come."""
        self._ready.setdefault(prefix_id, 0)

    def cancel(self, prefix_id: str) -> None:
        """Start nothing more for it."""
        self._ready.pop(prefix_id, None)

    def has_uploaded(self, prefix_id: str) -> bool:
        """Whether blocks were uploaded for it, or are on their way."""
        return prefix_id in self._spans

    def is_late(self, prefix: CachedPrefix) -> bool:
        """Whether its blocks are still on their way."""
        span = self._spans.get(prefix.id)
        return span is not None and any(key in self._cache.loading for key in prefix.block_hashes[span[0] : span[1]])

    def resolve(self, prefix_id: str, local_blocks: int | None) -> int:
        """The call came and hit `local_blocks` on the device, or (None) it will not come.

        Returns:
            How many of the blocks it hit the upload had brought.
        """
        self.cancel(prefix_id)
        span = self._spans.pop(prefix_id, None)
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

    def start(self, step: int, now: float) -> None:
        """Start what is due and finds room."""
        due = [name for name, refused in self._ready.items() if not refused or step - refused >= RETRY_STEPS]
        room = self._spare_blocks() if due else 0
        for name in due[:PER_STEP]:
            prefix = self._prefixes.by_id.get(name)
            if prefix is None or prefix.is_uploaded:
                self.cancel(name)
                continue
            here = self._cache.on_device(prefix.block_hashes)
            left = len(self._cache.tier.ready(prefix.block_hashes[len(here) :]))
            if not left or len(here) < self._spans.get(name, (0, 0))[1]:
                # There is nothing to bring, or what was brought has been displaced: once is enough.
                prefix.is_uploaded = name in self._spans
                self.cancel(name)
                move_to_tail(self._pool, here)
                continue
            if name not in self._spans and not self._is_worthwhile(prefix):
                self.cancel(name)
                continue
            # Gradually, half of what is missing at a time (paper 4.3); every piece is a hit of its own.
            piece = (left + 1) // 2 if left > self._cache.job_blocks else left
            found = self._free_queue.reclaimable(prefix, min(piece, room), now) if room > 0 else []
            if len(found) < min(piece, self._cache.job_blocks):
                self._refuse(name, step)
                break
            room -= len(found)
            self.cancel(name)
            self._upload(prefix, here, found)

    def _refuse(self, name: str, step: int) -> None:
        if not self._ready[name]:
            self._count("kv_uploads", "no_room")
        self._ready[name] = step

    def _upload(self, prefix: CachedPrefix, here: list[KVCacheBlock], found: list[KVCacheBlock]) -> None:
        cache = self._cache
        is_first = prefix.id not in self._spans
        move_to_head(self._pool, found)
        cache.unpin(prefix.id)
        cache.pin(prefix.id, here)

        def landed(ok: bool) -> None:  # a callback has no keywords
            cache.unpin(prefix.id)
            if prefix.id in self._prefixes.by_id and ok:
                self.add_due(prefix.id)  # perhaps there is more of it
            elif not ok:
                self._spans.pop(prefix.id, None)
                self._count("kv_uploads", "failed")

        started = cache.upload(prefix.id, prefix.block_hashes, len(here), len(found), landed)
        if not started:
            cache.unpin(prefix.id)
            return
        if is_first:
            self._count("kv_uploads", "started")
        first = self._spans.get(prefix.id, (len(here), 0))[0]
        self._spans[prefix.id] = (first, len(here) + started)

    # --- room ---------------------------------------------------------------------------------------

    def _spare_blocks(self) -> int:
        """Free blocks beyond what waits and what grows."""
        head = itertools.islice(self._scheduler.waiting, QUEUE_SCAN)
        needed = sum(self._view.needed_blocks(request) for request in head)
        return self._view.free_blocks - needed - GROWTH_BLOCKS * len(self._scheduler.running)

    def is_idle(self) -> bool:
        """Whether no request waits, no copy is under way and half of the device is free."""
        is_free = self._pool.get_num_free_blocks() >= IDLE_FREE_SHARE * self._pool.num_gpu_blocks
        return is_free and not self._scheduler.waiting and not self._cache.loading and not self._ready
