"""Pins: device blocks that are held for a stalled agent, and given up as soon as a request needs the room."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from tokencake_vllm.time_scheduler.uploads import GROWTH_BLOCKS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.sched.scheduler import Scheduler

    from tokencake.registry.metric_names import CountByName
    from tokencake.time_scheduler.prefixes import CachedPrefix, PrefixIndex
    from tokencake_vllm.time_scheduler.uploads import Uploads
    from tokencake_vllm.transfer.host_cache import HostCache
    from tokencake_vllm.vllm_adapter.block_view import BlockView


class Pins:
    """The pinned blocks of one engine. `HostCache.pinned` keeps them; here is when they go.

    Args:
        scheduler: vLLM's.
        view: its blocks.
        cache: pins and unpins.
        prefixes: the stalled prefixes.
        uploads: blocks that an upload has brought are on the host already.
        store: copies blocks of a prefix to the host.
        count: counts pins that were given up.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        view: BlockView,
        cache: HostCache,
        prefixes: PrefixIndex,
        uploads: Uploads,
        store: Callable[[CachedPrefix, Sequence[bytes], Sequence[KVCacheBlock]], int],
        count: CountByName,
    ) -> None:
        self._scheduler, self._view, self._cache, self._prefixes = scheduler, view, cache, prefixes
        self._uploads, self._store, self._count = uploads, store, count

    def offload(self, prefix: CachedPrefix) -> None:
        """Copy the pinned blocks of a prefix to the host, then unpin them: its short stall has become a long one."""
        blocks = self._cache.pinned.get(prefix.id)
        if blocks and not self._uploads.has_uploaded(prefix.id):
            self._store(prefix, prefix.block_hashes[: len(blocks)], blocks)
        self._cache.unpin(prefix.id)
        self._cache.mark_offloaded(prefix.id, prefix.block_hashes)
        prefix.outcome, prefix.keep_until_s = "offload", None

    def make_room(self, predecessors: Mapping[str, CachedPrefix]) -> None:
        """Unpin blocks, as far as the first request in the queue and the growth of running ones need them.

        Args:
            predecessors: by waiting request, the prefix that it extends: its pins go last.
        """
        need = GROWTH_BLOCKS * len(self._scheduler.running)
        last = None
        for request in itertools.islice(self._scheduler.waiting, 1):
            need += self._view.needed_blocks(request)
            predecessor = predecessors.get(request.request_id)
            last = None if predecessor is None else predecessor.id
        for name in sorted(self._cache.pinned, key=lambda name: name == last):
            if self._view.free_blocks >= need:
                return
            prefix = self._prefixes.by_id.get(name)
            if prefix is not None and prefix.keep_until_s is not None:
                self.offload(prefix)
            else:
                self._cache.unpin(name)
            self._count("kv_pins", "yielded")

    def of_tenant(self, tenant: str) -> list[list[KVCacheBlock]]:
        """The pinned blocks of each stalled prefix of one tenant."""
        prefixes = ((self._prefixes.by_id.get(name), blocks) for name, blocks in self._cache.pinned.items())
        return [list(blocks) for prefix, blocks in prefixes if prefix is not None and prefix.tenant == tenant]
