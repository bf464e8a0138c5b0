"""Copies under way, and the device blocks and host slots that they hold.

A store holds the device blocks it reads and the slots it writes, a load holds the slots it reads; an upload also holds
the device blocks it writes. A copy is over when all ranks have reported it. A failed copy is never visible: its host
blocks are forgotten and its device blocks carry no hash.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from vllm.logger import init_logger

from tokencake.registry.metric_names import Count
from tokencake.time_scheduler.host_tier import HostBlock, HostTier
from tokencake_vllm.transfer.jobs import TransferJob, TransferKind

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

    from tokencake.forecast.costs import CostModel

logger = init_logger("vllm.tokencake")

MAX_FAILURES: Final = 8
"""Copies that fail in a row until nothing more is copied: the host memory is not there."""


@dataclass(slots=True)
class _Copy:
    """A job that the workers have, or will have with the next step."""

    job: TransferJob
    host: list[HostBlock]
    device: list[KVCacheBlock]
    """Held by the job; none of a load that a call waits for, which holds its own blocks."""
    then: Callable[[bool], None] | None
    epoch: int
    reports: int = 0
    seconds: float = 0.0
    ok: bool = True


@dataclass(slots=True)
class InFlightTransfers:
    """The copies of one engine between its block pool and its host tier."""

    tier: HostTier
    pool: BlockPool
    costs: CostModel
    world_size: int
    count: Count
    loading: Counter[bytes] = field(default_factory=Counter)
    """Blocks on their way to the device."""
    _copies: dict[int, _Copy] = field(default_factory=dict)
    _queue: list[TransferJob] = field(default_factory=list)
    _urgent: set[int] = field(default_factory=set)
    _ids: int = 0
    _epoch: int = 0
    _failures: int = 0

    def __len__(self) -> int:
        return len(self._copies)

    @property
    def is_broken(self) -> bool:
        """Whether so many copies failed in a row that no more are tried."""
        return self._failures >= MAX_FAILURES

    def held_blocks(self) -> Iterator[KVCacheBlock]:
        """Device blocks that a copy under way will set free, or hand to a prefix."""
        for copy in self._copies.values():
            yield from copy.device

    def storing(self) -> Counter[int]:
        """How often each device block is held by copies to the host, by its id."""
        copies = (copy for copy in self._copies.values() if copy.job.kind == "store")
        return Counter(block.block_id for copy in copies for block in copy.device)

    # --- begin --------------------------------------------------------------------------------------

    def begin(
        self,
        kind: TransferKind,
        host: list[HostBlock],
        device: list[KVCacheBlock],
        *,
        request: str | None = None,
        device_ids: Sequence[int] | None = None,
        then: Callable[[bool], None] | None = None,
    ) -> None:
        """Queue a copy for the workers' next step.

        Args:
            kind: what to do.
            host: the slots; a store's come pinned from `HostTier.reserve`.
            device: blocks that the copy holds from now on, one reference each.
            request: the call that waits for this load.
            device_ids: the blocks, where the call holds them itself.
            then: called with whether it went well, instead of giving the blocks of a load back.
        """
        self._ids += 1
        blocks = tuple(device_ids) if device_ids is not None else tuple(block.block_id for block in device)
        job = TransferJob(self._ids, kind, blocks, tuple(block.slot for block in host), request)
        if kind == "load":
            self.tier.pin(host)
            self.loading.update(block.key for block in host)
        self._copies[job.id] = _Copy(job, host, device, then, self._epoch)
        self._queue.append(job)

    def expedite(self, key: bytes) -> None:
        """A call waits for this block, which is on its way to the device."""
        for copy in self._copies.values():
            if copy.job.kind == "load" and any(block.key == key for block in copy.host):
                self._urgent.add(copy.job.id)

    def drain_jobs(self) -> tuple[list[TransferJob], tuple[int, ...]]:
        """The jobs for the workers' next step, and the jobs for which a call waits by now."""
        jobs, self._queue = self._queue, []
        return jobs, tuple(self._urgent)

    # --- end ----------------------------------------------------------------------------------------

    def report(self, job_id: int, ranks: int, seconds: float, *, ok: bool) -> None:
        """A number of ranks report that they have finished a job."""
        copy = self._copies.get(job_id)
        if copy is None:
            return
        copy.reports += ranks
        copy.seconds = max(copy.seconds, seconds)
        copy.ok &= ok
        if copy.reports >= self.world_size:
            self._finish(self._copies.pop(job_id))

    def is_current(self, job_id: int) -> bool:
        """Whether this copy is under way and was begun after the last reset."""
        copy = self._copies.get(job_id)
        return copy is not None and copy.epoch == self._epoch

    def reset(self) -> None:
        """What the host holds is void: give back every device block that no worker is writing."""
        self._epoch += 1
        queued = {job.id for job in self._queue if job.request is None}
        self._queue = [job for job in self._queue if job.id not in queued]
        for job_id in queued:
            self._settle(self._copies.pop(job_id), ok=False)
        for copy in self._copies.values():
            if copy.job.kind == "store":  # only the host's side is written, and that is void
                self.pool.free_blocks(reversed(copy.device))
                copy.device = []

    @contextmanager
    def counted_as_free(self) -> Iterator[None]:
        """Meanwhile the pool counts the blocks that uploads are writing as free; no block may be allocated."""
        device = list(self.held_blocks())
        self.pool.free_blocks(reversed(device))
        try:
            yield
        finally:
            self.pool.touch(device)

    def _finish(self, copy: _Copy) -> None:
        kind, count = copy.job.kind, len(copy.job.blocks)
        is_current = copy.epoch == self._epoch
        if copy.ok:
            self._failures = 0
            if kind != "wipe":
                (self.costs.to_host if kind == "store" else self.costs.to_device).learn(count, copy.seconds)
                self.count(("kv_copied_bytes", kind), count * self.costs.block_bytes)
                self.count(("kv_copy_seconds", kind), copy.seconds)
        elif is_current:
            self._failures += 1
            if self._failures == MAX_FAILURES:
                logger.error("TokenCake: the Time Scheduler is off: %d copies in a row failed", MAX_FAILURES)
            self.count(("kv_copy_failures", kind), 1)
        self._settle(copy, ok=copy.ok and is_current)

    def _settle(self, copy: _Copy, *, ok: bool) -> None:
        self._urgent.discard(copy.job.id)
        match copy.job.kind:
            case "load":
                self._unload(copy, ok=ok)
            case "store":
                self.tier.settle(copy.host, ok=ok)
        if copy.then is not None:
            copy.then(ok)
        else:
            self.pool.free_blocks(reversed(copy.device))

    def _unload(self, copy: _Copy, *, ok: bool) -> None:
        for block in copy.host:
            self.loading[block.key] -= 1
            if not self.loading[block.key]:
                del self.loading[block.key]
            if ok and not block.was_read:
                block.was_read = True
                self.count(("kv_offloads", "used"), 1)
        self.tier.unpin(copy.host)
        if not copy.ok:
            self.tier.forget(copy.host)
