"""Stores: which blocks of a prefix go to host memory, and what leaves a full host for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokencake.policies.eviction import unbounded
from tokencake.policies.registry import EVICTION
from tokencake.time_scheduler.policy import EvictionInputs
from tokencake_vllm.time_scheduler.policy_inputs import RecentStores, queue_positions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.sched.scheduler import Scheduler

    from tokencake.forecast.reuse import ReuseProbability
    from tokencake.time_scheduler.host_tier import Distance
    from tokencake.time_scheduler.prefixes import CachedPrefix, PrefixIndex
    from tokencake_vllm.transfer.host_cache import HostCache


class HostStores:
    """Copies prefixes to the host, by the eviction policy with this name."""

    def __init__(
        self, scheduler: Scheduler, cache: HostCache, prefixes: PrefixIndex, reuse: ReuseProbability, eviction: str
    ) -> None:
        self._scheduler, self._cache, self._prefixes, self._reuse = scheduler, cache, prefixes, reuse
        self._eviction = EVICTION[eviction]()
        self.recent = RecentStores()

    def store(
        self, prefix: CachedPrefix, keys: Sequence[bytes], blocks: Sequence[KVCacheBlock], step: int, now: float
    ) -> int:
        """Copy what the host does not have of `keys`, computed in `blocks`; returns how many blocks."""
        cache = self._cache
        distance: Distance = unbounded
        own_s = 0.0
        if cache.tier.free_slots < len(keys):
            inputs = EvictionInputs(
                prefix,
                self._prefixes,
                cache.tier,
                self._reuse,
                now,
                cache.costs.admission.seconds,
                lambda: queue_positions(self._scheduler),
            )
            distance, own_s = self._eviction.distances(inputs)
        stored = cache.store(keys, blocks, now, distance, own_s)
        if stored:
            self.recent.add(step)
        return stored
