"""KV blocks in host memory, as the scheduler sees them: stores, loads for a request, uploads, and pinned blocks.

`InFlightTransfers` holds the copies under way. A store pins the device blocks that it reads. An upload, for which no
request waits, owns fresh device blocks; they become prefix-cache hits only when all ranks have reported it done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from tokencake.registry.metric_names import Count, CountKey
from tokencake.time_scheduler.host_tier import Distance, HostBlock, HostTier, leading
from tokencake_vllm.transfer.in_flight import MAX_FAILURES, InFlightTransfers
from tokencake_vllm.vllm_adapter.block_pool import find_block, publish_block

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

    from tokencake.forecast.costs import CostModel
    from tokencake_vllm.transfer.self_check import SelfCheck

logger = init_logger("vllm.tokencake")


def _uncounted(key: CountKey, by: float) -> None:
    """Until there are counters."""


class HostCache:
    """What one engine's block pool and its host tier hold for each other."""

    def __init__(
        self,
        tier: HostTier,
        pool: BlockPool,
        costs: CostModel,
        world_size: int,
        job_blocks: int,
        clock: Callable[[], float],
    ) -> None:
        self.tier, self.pool, self.costs, self.job_blocks = tier, pool, costs, job_blocks
        self.count: Count = _uncounted
        self.pinned: dict[str, list[KVCacheBlock]] = {}
        """Device blocks pinned for a prefix, by its id."""
        self.transfers = InFlightTransfers(tier, pool, costs, world_size, self._count)
        self._clock = clock
        self._matched: dict[str, tuple[int, list[HostBlock]]] = {}
        self._waiting: set[str] = set()
        """Calls that wait while another call's copy brings their prefix."""
        self.self_check: SelfCheck | None = None
        """What the workers found when they started; None until they have told."""
        self._off_reason: str | None = None
        self._offloaded_since: dict[str, tuple[int, float]] = {}
        """By stalled prefix: blocks that need not stay on the device, and since when."""
        tier.on_evict = self._count_eviction

    def _count(self, key: CountKey, by: float) -> None:
        self.count(key, by)  # which is set later

    @property
    def is_busy(self) -> bool:
        """Whether a copy is queued or under way."""
        return len(self.transfers) > 0

    @property
    def off_reason(self) -> str | None:
        """Why nothing is copied any more, or None."""
        if self.transfers.is_broken:
            return f"{MAX_FAILURES} copies in a row failed; the workers' logs say why"
        return self._off_reason

    @property
    def is_off(self) -> bool:
        """Whether nothing is copied any more."""
        return self._off_reason is not None or self.transfers.is_broken

    def compare_slots(self, fewest: int, most: int, host_kv_gib: float) -> None:
        """The workers tell how many slots of host memory they have: the tier's number, or nothing is copied."""
        capacity = self.tier.capacity
        if fewest == most == capacity:
            return
        have = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        reason = f"the workers have host memory for {have} KV blocks, the scheduler counts on {capacity}"
        if not fewest:
            reason = (
                f"a worker has no host memory for {capacity} KV blocks, and its log says why; "
                f"`time.host_kv_gib` is {host_kv_gib:g}, less may do"
            )
        self._turn_off(reason)

    def take_self_check(self, found: SelfCheck | None) -> None:
        """The workers tell what their self-check found."""
        self.self_check = found
        if found is not None and found.problem is not None:
            self._turn_off(f"the self-check of the copies failed: {found.problem}")

    def take_mismatches(self, jobs: Sequence[int]) -> None:
        """Checksums of these copies differed: nothing that is copied can be trusted.

        Copies from before a reset do not count: their blocks may have been given to others meanwhile.
        """
        found = sum(1 for job_id in jobs if self.transfers.is_current(job_id))
        if found:
            self.count(("kv_checksum_mismatches",), found)
            self._turn_off("a copied block had another checksum than its source; the workers' logs say which")

    def _turn_off(self, reason: str) -> None:
        """Copy nothing any more. The first reason stays."""
        if self._off_reason is None:
            self._off_reason = reason
            logger.error("TokenCake: the Time Scheduler is off: %s", reason)

    @property
    def holds_blocks(self) -> bool:
        """Whether a copy under way will set device blocks free."""
        return any(True for _ in self.transfers.held_blocks())

    @property
    def loading(self) -> Counter[bytes]:
        """Blocks on their way to the device."""
        return self.transfers.loading

    @property
    def pinned_blocks(self) -> int:
        """Device blocks pinned for prefixes; shared ones count for each."""
        return sum(len(blocks) for blocks in self.pinned.values())

    # --- out ----------------------------------------------------------------------------------------

    def store(
        self,
        keys: Sequence[bytes],
        blocks: Sequence[KVCacheBlock],
        now_s: float,
        distance: Distance,
        own_distance: float,
    ) -> int:
        """Copy what the host does not have of the prefix `keys`, computed in `blocks`; returns how many blocks."""
        self.tier.touch(keys, now_s)
        if self.is_off:
            return 0
        taken = self.tier.reserve(keys, now_s, distance, own_distance=own_distance)
        if not taken:
            return 0
        first = self.tier.known(keys) - len(taken)
        for begin in range(0, len(taken), self.job_blocks):
            host = taken[begin : begin + self.job_blocks]
            device = list(blocks[first + begin : first + begin + len(host)])
            self.pool.touch(device)
            self.transfers.begin("store", host, device)
        self.count(("kv_stores", "queued"), 1)
        self.count(("kv_offloads", "stored"), len(taken))
        return len(taken)

    def mark_offloaded(self, prefix_id: str, keys: Sequence[bytes]) -> None:
        """From now on the blocks of a stalled prefix that the host has need not stay on the device."""
        self._offloaded_since[prefix_id] = (self.tier.known(keys), self._clock())

    def _unmark_offloaded(self, prefix_id: str) -> None:
        blocks, since_s = self._offloaded_since.pop(prefix_id, (0, 0.0))
        if blocks:
            self.count(("kv_freed_block_seconds",), blocks * (self._clock() - since_s))

    def _count_eviction(self, block: HostBlock) -> None:
        self.count(("kv_evictions", "host"), 1)
        if not block.was_read:
            self.count(("kv_offloads", "spare" if block.was_hit else "wasted"), 1)

    # --- in, for a call -----------------------------------------------------------------------------

    def match(self, request_id: str, keys: Sequence[bytes], first: int) -> int | None:
        """How many of `keys[first:]` can be loaded; None while a copy for another call is bringing them."""
        wanted = keys[first:]
        if wanted and wanted[0] in self.loading:
            if request_id not in self._waiting:
                self._waiting.add(request_id)
                self.count(("kv_loads", "waited"), 1)
                self.transfers.expedite(wanted[0])
            return None
        self._waiting.discard(request_id)
        found = [] if self.is_off else self.tier.ready(wanted)
        self._matched[request_id] = (first, found)
        return len(found)

    def admit(self, request_id: str, keys: Sequence[bytes], device_ids: Sequence[int], count: int) -> bool:
        """The call gets room: load the first `count` matched blocks into the blocks `device_ids` of its table.

        Returns:
            False where a matched block has left the host since; then nothing is loaded.
        """
        first, found = self._matched.pop(request_id, (0, []))
        self._waiting.discard(request_id)
        self.tier.hit(keys[:first])
        if not count:
            return True
        host = found[:count]
        if len(host) < count:
            raise RuntimeError(f"{request_id} was promised {count} blocks and matched {len(host)}")
        if any(block.is_gone or not block.is_ready for block in host):
            self.count(("kv_loads", "gone"), 1)
            return False
        self.tier.touch([block.key for block in host], self._clock())
        self.transfers.begin("load", host, [], request=request_id, device_ids=device_ids[first : first + count])
        self.count(("kv_loads", "queued"), 1)
        return True

    def forget_match(self, request_id: str) -> None:
        """The call has ended."""
        self._waiting.discard(request_id)
        self._matched.pop(request_id, None)

    # --- in, without a request ------------------------------------------------------------------------

    def on_device(self, keys: Sequence[bytes]) -> list[KVCacheBlock]:
        """The leading blocks of the prefix that are in the device's prefix cache."""
        found = []
        for key in keys:
            block = find_block(self.pool, key)
            if block is None:
                break
            found.append(block)
        return found

    def count_on_device(self, keys: Sequence[bytes]) -> int:
        """About how many leading blocks of the prefix are in the device's prefix cache; vLLM evicts its end first."""
        return leading(keys, lambda key: find_block(self.pool, key) is not None)

    def pin(self, prefix_id: str, blocks: Sequence[KVCacheBlock]) -> None:
        """Pin device blocks for a prefix."""
        if blocks:
            self._unmark_offloaded(prefix_id)
            self.pool.touch(blocks)
            self.pinned.setdefault(prefix_id, []).extend(blocks)

    def unpin(self, prefix_id: str) -> int:
        """Unpin them; they stay cached until their room is needed. Returns how many there were."""
        self._unmark_offloaded(prefix_id)
        blocks = self.pinned.pop(prefix_id, [])
        self.pool.free_blocks(reversed(blocks))
        return len(blocks)

    def upload(
        self, prefix_id: str, keys: Sequence[bytes], first: int, limit: int, then: Callable[[bool], None]
    ) -> int:
        """Bring up to `limit` blocks from `keys[first]` on to the device and hold them; returns how many."""
        host = self.tier.ready(keys[first : first + limit])
        if not host or self.is_off or host[0].key in self.loading:
            return 0
        self._unmark_offloaded(prefix_id)
        device = self.pool.get_new_blocks(len(host))

        def finish(ok: bool) -> None:  # a callback
            if ok:
                for index, (block, source) in enumerate(zip(device, host, strict=True)):
                    tokens = (first + index + 1) * self.costs.block_tokens
                    publish_block(self.pool, block, source.key, num_tokens=tokens)
                self.pinned.setdefault(prefix_id, []).extend(device)
            else:
                self.pool.free_blocks(reversed(device))
            then(ok)

        self.transfers.begin("load", host, device, then=finish)
        return len(host)

    # --- all of it ------------------------------------------------------------------------------------

    def wipe(self) -> int:
        """Overwrite every free device block: a test's proof that what is hit later was copied."""
        blocks = self.pool.get_new_blocks(self.pool.get_num_free_blocks())
        if blocks:
            self.transfers.begin("wipe", [], blocks)
        return len(blocks)

    def reset(self) -> None:
        """Forget the host's blocks and give back every device block that no worker is writing."""
        for prefix_id in list(self.pinned):
            self.unpin(prefix_id)
        self._offloaded_since.clear()
        self.transfers.reset()
        self.tier.reset()

    @contextmanager
    def counted_as_free(self) -> Iterator[None]:
        """Meanwhile the pool counts blocks that only a copy holds as free; no block may be allocated."""
        with self.transfers.counted_as_free():
            yield
