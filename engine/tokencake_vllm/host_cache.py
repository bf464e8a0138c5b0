"""Which copies are under way, and which device blocks and host slots do they hold?

The scheduler's side of every copy: a store pins the device blocks it reads, a load pins the host blocks it reads, and a
request-free upload owns fresh device blocks, which become prefix-cache hits only when all ranks have reported the copy
done. A failed copy is never visible: its host blocks are forgotten and its device blocks carry no hash.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

from tokencake.host_tier import Distance, HostBlock, HostTier
from tokencake_vllm.copies import Job

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

    from tokencake.rates import Rates

MAX_FAILURES: Final = 8
"""Copies that fail in a row until nothing more is copied: the host memory is not there."""

_GROUP: Final = 0


@dataclass(slots=True)
class _Copy:
    """A job that the workers have, or will have with the next step."""

    job: Job
    host: list[HostBlock]
    device: list[KVCacheBlock]
    """Held by the job; none of a load that a call waits for, which holds its own blocks."""
    first: int = 0
    """Place of the first block in its chain."""
    then: Callable[[bool], None] | None = None
    epoch: int = 0
    reports: int = 0
    seconds: float = 0.0
    ok: bool = True


@dataclass(slots=True)
class HostCache:
    """Copies between one engine's block pool and its host tier."""

    tier: HostTier
    pool: BlockPool
    rates: Rates
    world_size: int
    job_blocks: int
    count: Callable[[tuple[str, ...], float], None] = lambda key, by: None  # noqa: ARG005  # until somebody counts
    """Adds to a counter: name and labels, how much."""
    held: dict[str, list[KVCacheBlock]] = field(default_factory=dict)
    """Device blocks pinned for a chain, by its id."""
    loading: Counter[bytes] = field(default_factory=Counter)
    """Blocks on their way to the device."""
    _copies: dict[int, _Copy] = field(default_factory=dict)
    _queue: list[Job] = field(default_factory=list)
    _matched: dict[str, tuple[int, list[HostBlock]]] = field(default_factory=dict)
    _waiting: set[str] = field(default_factory=set)
    """Calls that wait while somebody else's copy brings their prefix."""
    _ids: int = 0
    _epoch: int = 0
    _failures: int = 0

    @property
    def is_busy(self) -> bool:
        """Whether a copy is queued or under way."""
        return bool(self._copies)

    @property
    def is_broken(self) -> bool:
        """Whether so many copies failed in a row that no more are tried."""
        return self._failures >= MAX_FAILURES

    @property
    def holds_blocks(self) -> bool:
        """Whether a copy under way will set device blocks free."""
        return any(copy.device for copy in self._copies.values())

    @property
    def pinned_blocks(self) -> int:
        """Device blocks pinned for chains; shared ones count for each."""
        return sum(len(blocks) for blocks in self.held.values())

    # --- out ----------------------------------------------------------------------------------------

    def store(
        self,
        keys: Sequence[bytes],
        blocks: Sequence[KVCacheBlock],
        now_s: float,
        distance: Distance,
        own_distance: float,
    ) -> int:
        """Copy what the host does not have of the chain `keys`, computed in `blocks`; returns how many blocks."""
        self.tier.touch(keys, now_s)
        if self.is_broken:
            return 0
        before = self.tier.evicted
        taken = self.tier.reserve(keys, now_s, distance, own_distance=own_distance)
        self.count(("kv_evictions", "host"), self.tier.evicted - before)
        if not taken:
            return 0
        first = self.tier.known(keys) - len(taken)
        for begin in range(0, len(taken), self.job_blocks):
            host = taken[begin : begin + self.job_blocks]
            device = list(blocks[first + begin : first + begin + len(host)])
            self.pool.touch(device)
            self._submit("store", host, device, first + begin)
        self.count(("kv_stores", "queued"), 1)
        return len(taken)

    # --- in, for a call -----------------------------------------------------------------------------

    def match(self, request_id: str, keys: Sequence[bytes], first: int) -> int | None:
        """How many of `keys[first:]` can be loaded; None while they are on their way for somebody else."""
        wanted = keys[first:]
        if wanted and wanted[0] in self.loading:
            if request_id not in self._waiting:
                self._waiting.add(request_id)
                self.count(("kv_loads", "waited"), 1)
            return None
        self._waiting.discard(request_id)
        found = self.tier.ready(wanted)
        self._matched[request_id] = (first, found)
        return len(found)

    def load(self, request_id: str, device_ids: Sequence[int], count: int, now_s: float) -> None:
        """Load the first `count` matched blocks into the blocks `device_ids` of the request's table."""
        first, found = self._matched.pop(request_id)
        host = found[:count]
        self.tier.touch([block.key for block in host], now_s)
        self._submit("load", host, [], first, request=request_id, device_ids=device_ids[first : first + count])
        self.count(("kv_loads", "queued"), 1)

    def forget_match(self, request_id: str) -> None:
        """The call was admitted without what it matched, or has ended."""
        self._waiting.discard(request_id)
        self._matched.pop(request_id, None)

    # --- in, for nobody yet ---------------------------------------------------------------------------

    def on_device(self, keys: Sequence[bytes]) -> list[KVCacheBlock]:
        """The leading blocks of the chain that are in the device's prefix cache."""
        find = self.pool.cached_block_hash_to_block.get_one_block
        found = []
        for key in keys:
            block = find(make_block_hash_with_group_id(BlockHash(key), _GROUP))
            if block is None:
                break
            found.append(block)
        return found

    def hold(self, chain_id: str, blocks: Sequence[KVCacheBlock]) -> None:
        """Pin device blocks for a chain."""
        if blocks:
            self.pool.touch(blocks)
            self.held.setdefault(chain_id, []).extend(blocks)

    def release(self, chain_id: str) -> int:
        """Unpin them; they stay cached until somebody needs the room. Returns how many there were."""
        blocks = self.held.pop(chain_id, [])
        self.pool.free_blocks(reversed(blocks))
        return len(blocks)

    def upload(self, chain_id: str, keys: Sequence[bytes], first: int, limit: int, then: Callable[[bool], None]) -> int:
        """Bring up to `limit` blocks from `keys[first]` on to the device and hold them; returns how many."""
        host = self.tier.ready(keys[first : first + limit])
        if not host or self.is_broken or host[0].key in self.loading:
            return 0
        device = self.pool.get_new_blocks(len(host))

        def finish(ok: bool) -> None:  # a callback
            if ok:
                for index, (block, source) in enumerate(zip(device, host, strict=True)):
                    key = make_block_hash_with_group_id(BlockHash(source.key), _GROUP)
                    tokens = (first + index + 1) * self.rates.block_tokens
                    self.pool._insert_block_hash(key, block, num_tokens=tokens)  # noqa: SLF001  # the public way wants a request
                self.held.setdefault(chain_id, []).extend(device)
            else:
                self.pool.free_blocks(reversed(device))
            then(ok)

        self._submit("load", host, device, first, then=finish)
        return len(host)

    # --- the step -------------------------------------------------------------------------------------

    def wipe(self) -> int:
        """Overwrite every free device block that holds nothing anybody references: a test's proof."""
        blocks = self.pool.get_new_blocks(self.pool.get_num_free_blocks())
        if blocks:
            self._submit("wipe", [], blocks, 0)
        return len(blocks)

    def take_jobs(self) -> list[Job]:
        """The jobs for the workers' next step."""
        jobs, self._queue = self._queue, []
        return jobs

    def report(self, job_id: int, ranks: int, seconds: float, *, ok: bool) -> None:
        """So many ranks say that they are through with a job."""
        copy = self._copies.get(job_id)
        if copy is None:
            return
        copy.reports += ranks
        copy.seconds = max(copy.seconds, seconds)
        copy.ok &= ok
        if copy.reports >= self.world_size:
            del self._copies[job_id]
            self._finish(copy)

    def reset(self) -> None:
        """Forget the host's blocks and give back every device block that no worker is writing."""
        self._epoch += 1
        for chain_id in list(self.held):
            self.release(chain_id)
        queued = {job.id for job in self._queue if job.request is None}
        self._queue = [job for job in self._queue if job.id not in queued]
        for job_id in queued:
            self._drop(self._copies.pop(job_id))
        for copy in self._copies.values():
            if copy.job.kind == "store":  # only the host's side is written, and that is forgotten
                self.pool.free_blocks(reversed(copy.device))
                copy.device = []
        self.tier.reset()

    def _submit(
        self,
        kind: str,
        host: list[HostBlock],
        device: list[KVCacheBlock],
        first: int,
        *,
        request: str | None = None,
        device_ids: Sequence[int] | None = None,
        then: Callable[[bool], None] | None = None,
    ) -> None:
        self._ids += 1
        blocks = tuple(device_ids) if device_ids is not None else tuple(block.block_id for block in device)
        job = Job(self._ids, kind, blocks, tuple(block.slot for block in host), request)  # type: ignore[arg-type]  # one of the three
        if kind == "load":
            self.tier.pin(host)
            self.loading.update(block.key for block in host)
        self._copies[job.id] = _Copy(job, host, device, first, then, self._epoch)
        self._queue.append(job)

    def _finish(self, copy: _Copy) -> None:
        kind, ok, count = copy.job.kind, copy.ok, len(copy.job.blocks)
        is_current = copy.epoch == self._epoch
        self._failures = 0 if ok else self._failures + 1
        if not ok:
            self.count(("kv_copy_failures", kind), 1)
        elif kind != "wipe":
            (self.rates.to_host if kind == "store" else self.rates.to_device).learn(count, copy.seconds)
            self.count(("kv_copied_bytes", kind), count * self.rates.block_bytes)
            self.count(("kv_copy_seconds", kind), copy.seconds)
        if kind == "load":
            self._unload(copy)
            if not ok:
                self.tier.forget(copy.host)
            if copy.then is not None:
                copy.then(ok and is_current)
        else:
            if kind == "store":
                self.tier.settle(copy.host, ok=ok and is_current)
            self.pool.free_blocks(reversed(copy.device))

    def _drop(self, copy: _Copy) -> None:
        """A job that no worker has seen."""
        if copy.job.kind == "load":
            self._unload(copy)
            if copy.then is not None:
                copy.then(False)  # as the callback has it
            return
        if copy.job.kind == "store":
            self.tier.settle(copy.host, ok=False)
        self.pool.free_blocks(reversed(copy.device))

    def _unload(self, copy: _Copy) -> None:
        self.tier.unpin(copy.host)
        for block in copy.host:
            self.loading[block.key] -= 1
            if not self.loading[block.key]:
                del self.loading[block.key]
