"""How do KV blocks get from the device to host memory and back? The worker's side, without ever raising.

The layers' caches are seen as one or a few tensors whose dimension 0 is the block, the host pool has the same shape
with slots instead, and a copy moves all layers of a block at once. On CPU a thread copies beside the computation. On
CUDA there is a stream per direction: it waits for the compute stream, never the other way round, and events are polled.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Literal, Protocol, TypeAlias

import torch
from vllm.logger import init_logger

logger = init_logger("vllm.tokencake")

Kind: TypeAlias = Literal["store", "load", "wipe"]
STAGING_BYTES: Final = 64 * 2**20
"""Device memory through which the blocks of one direction pass on CUDA."""


@dataclass(frozen=True, slots=True)
class Job:
    """Copy `blocks[i]` of the device to (`store`) or from (`load`) `slots[i]` of the host.

    `wipe` overwrites the blocks: a test's way to prove that what is read later was copied.
    """

    id: int
    kind: Kind
    blocks: tuple[int, ...]
    slots: tuple[int, ...] = ()
    request: str | None = None
    """The call that waits for this load."""


@dataclass(frozen=True, slots=True)
class Done:
    """A job is over; `seconds` without its time in the queue."""

    job: Job
    seconds: float
    ok: bool


class Copier(Protocol):
    """Carries jobs out in the background. Its methods do not raise."""

    def start(self, job: Job) -> None:
        """Begin `job`: stores read what the device has been told to compute so far, loads may overwrite at once."""

    def finished(self) -> list[Done]:
        """Jobs that ended since the last call."""

    def close(self) -> None:
        """Wait for what is under way and begin nothing more."""


# --- what is copied ---------------------------------------------------------------------------------


def block_views(kv_caches: Mapping[str, Any], num_blocks: int) -> list[torch.Tensor]:
    """Views of the layers' caches whose dimension 0 is the block of the manager, each byte once.

    Layers that lie evenly spaced in one allocation become one tensor `[block, layer, ...]`.
    """
    layers: list[torch.Tensor] = []
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for cache in kv_caches.values():
        for tensor in cache if isinstance(cache, list | tuple) else [cache]:
            by_block = _block_first(tensor, num_blocks)
            place = (by_block.data_ptr(), tuple(by_block.shape))
            if place not in seen:
                seen.add(place)
                layers.append(by_block)
    return _joined(layers)


def _block_first(tensor: torch.Tensor, num_blocks: int) -> torch.Tensor:
    if tensor.shape[0] % num_blocks == 0:
        per_block = tensor.shape[0] // num_blocks
        return tensor if per_block == 1 else tensor.view(num_blocks, per_block, *tensor.shape[1:])
    for dim, size in enumerate(tensor.shape):
        if size == num_blocks:
            return tensor.movedim(dim, 0)
    raise ValueError(f"a KV cache has the shape {tuple(tensor.shape)}; no dimension counts its {num_blocks} blocks")


def _joined(layers: list[torch.Tensor]) -> list[torch.Tensor]:
    if len(layers) < 2:  # noqa: PLR2004  # nothing to join
        return layers
    first = layers[0]
    kinds = {(t.untyped_storage().data_ptr(), t.dtype, tuple(t.shape), t.stride()) for t in layers}
    offsets = sorted(t.storage_offset() for t in layers)
    gaps = {after - before for before, after in pairwise(offsets)}
    if len(kinds) != 1 or len(gaps) != 1:
        return layers
    shape = (first.shape[0], len(layers), *first.shape[1:])
    stride = (first.stride(0), gaps.pop(), *first.stride()[1:])
    return [torch.as_strided(first, shape, stride, offsets[0])]


def host_pools(views: Iterable[torch.Tensor], slots: int) -> list[torch.Tensor]:
    """One tensor `[slot, ...]` in host memory for each view, pinned where the views lie on a CUDA device."""
    return [
        torch.empty((slots, *view.shape[1:]), dtype=view.dtype, device="cpu", pin_memory=view.device.type == "cuda")
        for view in views
    ]


class _Checksums:
    """Of every slot, taken from the device's block on its way out."""

    def __init__(self) -> None:
        self._by_slot: dict[int, int] = {}

    @staticmethod
    def of(tensors: Iterable[torch.Tensor], index: int) -> int:
        """The checksum of one block or slot over all layers."""
        total = 0
        for tensor in tensors:
            total = zlib.crc32(tensor[index].contiguous().cpu().view(torch.uint8).numpy().tobytes(), total)
        return total

    def check(self, job: Job, views: list[torch.Tensor], pools: list[torch.Tensor]) -> None:
        for block, slot in zip(job.blocks, job.slots, strict=True):
            on_device, on_host = self.of(views, block), self.of(pools, slot)
            expected = on_device if job.kind == "store" else self._by_slot.get(slot)
            if not expected == on_device == on_host:
                raise RuntimeError(f"block {block} and slot {slot} differ after a {job.kind}")
            self._by_slot[slot] = on_device


# --- CPU --------------------------------------------------------------------------------------------


def _leave_the_computation_alone() -> None:
    """Copy on one thread of whatever core is free: vLLM binds its own threads, and a new one inherits the binding."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(threading.get_native_id(), range(os.cpu_count() or 1))


class ThreadCopier:
    """Copies on one thread beside the computation, loads before stores."""

    def __init__(self, views: list[torch.Tensor], pools: list[torch.Tensor], *, checks: bool) -> None:
        self._views, self._pools = views, pools
        self._checksums = _Checksums() if checks else None
        self._todo: queue.PriorityQueue[tuple[int, int, Job | None]] = queue.PriorityQueue()
        self._done: queue.SimpleQueue[Done] = queue.SimpleQueue()
        self._count = 0
        self._thread = threading.Thread(target=self._work, name="tokencake-copies", daemon=True)
        self._thread.start()

    def start(self, job: Job) -> None:
        """Queue it."""
        self._put(1 if job.kind == "store" else 0, job)

    def _put(self, order: int, job: Job | None) -> None:
        self._count += 1
        self._todo.put((order, self._count, job))

    def finished(self) -> list[Done]:
        """What the thread has done."""
        done = []
        while not self._done.empty():
            done.append(self._done.get())
        return done

    def close(self) -> None:
        """Let the thread end."""
        self._put(2, None)
        self._thread.join(timeout=10.0)

    def _work(self) -> None:
        _leave_the_computation_alone()
        while True:
            _, _, job = self._todo.get()
            if job is None:
                return
            began = time.perf_counter()
            ok = True
            try:
                self._copy(job)
            except Exception:
                ok = False
                logger.exception("TokenCake: a %s of %d blocks failed", job.kind, len(job.blocks))
            self._done.put(Done(job, time.perf_counter() - began, ok))

    def _copy(self, job: Job) -> None:
        blocks, slots = torch.tensor(job.blocks), torch.tensor(job.slots, dtype=torch.long)
        for view, pool in zip(self._views, self._pools, strict=True):
            match job.kind:
                case "store":
                    pool.index_copy_(0, slots, view.index_select(0, blocks))
                case "load":
                    view.index_copy_(0, blocks, pool.index_select(0, slots))
                case "wipe":
                    view.index_fill_(0, blocks, 1.0)
        if self._checksums is not None and job.kind != "wipe":
            self._checksums.check(job, self._views, self._pools)


# --- CUDA: written from the documentation of vLLM and torch; it has not run yet ------------------------


class StreamCopier:
    """Copies on two side streams, through a small device buffer each."""

    def __init__(self, views: list[torch.Tensor], pools: list[torch.Tensor], *, checks: bool) -> None:
        self._views, self._pools = views, pools
        self._checksums = _Checksums() if checks else None
        self._device = views[0].device
        new_stream: Any = torch.cuda.Stream
        self._streams = {"store": new_stream(self._device), "load": new_stream(self._device)}
        block_bytes = sum(view[0].nbytes for view in views)
        self._chunk = max(1, STAGING_BYTES // block_bytes)
        self._staging = {
            kind: [view.new_empty((self._chunk, *view.shape[1:])) for view in views] for kind in ("store", "load")
        }
        self._under_way: deque[tuple[Job, Any, Any]] = deque()
        self._failed: list[Done] = []

    def start(self, job: Job) -> None:
        """Enqueue it on the stream of its direction, behind what the compute stream has been given so far."""
        try:
            stream = self._streams["load" if job.kind == "wipe" else job.kind]
            new_event: Any = torch.cuda.Event
            begin, end = new_event(enable_timing=True), new_event(enable_timing=True)
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                begin.record(stream)
                self._enqueue(job)
                end.record(stream)
            self._under_way.append((job, begin, end))
        except Exception:
            logger.exception("TokenCake: a %s of %d blocks failed", job.kind, len(job.blocks))
            self._failed.append(Done(job, 0.0, ok=False))

    def _enqueue(self, job: Job) -> None:
        for first in range(0, len(job.blocks), self._chunk):
            chunk = job.blocks[first : first + self._chunk]
            slots = job.slots[first : first + self._chunk]
            blocks = torch.tensor(chunk, pin_memory=True).to(self._device, non_blocking=True)
            if job.kind == "wipe":
                for view in self._views:
                    view.index_fill_(0, blocks, 1.0)
                continue
            for view, pool, staging in zip(self._views, self._pools, self._staging[job.kind], strict=True):
                staged = staging[: len(chunk)]
                if job.kind == "store":
                    torch.index_select(view, 0, blocks, out=staged)
                    for index, slot in enumerate(slots):
                        pool[slot].copy_(staged[index], non_blocking=True)
                else:
                    for index, slot in enumerate(slots):
                        staged[index].copy_(pool[slot], non_blocking=True)
                    view.index_copy_(0, blocks, staged)

    def finished(self) -> list[Done]:
        """Jobs whose last event has been reached; nothing is waited for."""
        done, self._failed = self._failed, []
        waiting: deque[tuple[Job, Any, Any]] = deque()
        for job, begin, end in self._under_way:
            try:
                if not end.query():
                    waiting.append((job, begin, end))
                    continue
                if self._checksums is not None and job.kind != "wipe":
                    self._checksums.check(job, self._views, self._pools)
                done.append(Done(job, begin.elapsed_time(end) / 1e3, ok=True))
            except Exception:
                logger.exception("TokenCake: a %s of %d blocks failed", job.kind, len(job.blocks))
                done.append(Done(job, 0.0, ok=False))
        self._under_way = waiting
        return done

    def close(self) -> None:
        """Wait for both streams."""
        for stream in self._streams.values():
            stream.synchronize()


# --- no memory --------------------------------------------------------------------------------------


class NoCopier:
    """Stands where there is no host memory: every job fails, and the calls compute what they need."""

    def __init__(self) -> None:
        self._failed: list[Done] = []

    def start(self, job: Job) -> None:
        """Refuse it."""
        self._failed.append(Done(job, 0.0, ok=False))

    def finished(self) -> list[Done]:
        """Everything, failed."""
        failed, self._failed = self._failed, []
        return failed

    def close(self) -> None:
        """Nothing to do."""


def make_copier(
    kv_caches: Mapping[str, Any],
    num_blocks: int,
    slots: int,
    *,
    checks: bool,
    allocate: Callable[[Iterable[torch.Tensor], int], list[torch.Tensor]] = host_pools,
) -> Copier:
    """The copier for where these caches lie, with its host memory; `NoCopier` where that cannot be had."""
    try:
        views = block_views(kv_caches, num_blocks)
        pools = allocate(views, slots)
        kind = StreamCopier if views[0].device.type == "cuda" else ThreadCopier
        return kind(views, pools, checks=checks)
    except Exception:
        logger.exception("TokenCake: no host memory for %d KV blocks; nothing is offloaded", slots)
        return NoCopier()
