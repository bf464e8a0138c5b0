"""Copies of KV blocks between a CUDA device and pinned host memory.

Order, which is all that keeps the bytes right:

- A job is behind what the compute stream had been given when it was started: its first piece on each side stream waits
  for an event recorded there. So a store reads what the step has computed, and a load overwrites only what has been
  read. The computation never waits for a copy: the scheduler gives blocks to requests only after the host has seen the
  events behind the last pieces.
- A job goes through staging buffers on the device in pieces. One kernel gathers the blocks of a piece from all layers,
  a few transfers take them to their slots; a load does the same backwards. Each buffer has a stream of its own, whose
  order protects the buffer; the pieces of one job touch different blocks and slots, so they need no order.
- Each direction has two buffers that take turns: one gathers or scatters while the other uses the link. A thread for
  each direction submits the pieces, a few ahead of the device, the most urgent job first. A load that a request waits
  for therefore passes uploads that were started before it, and a step spends no time on submitting copies.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Final

import torch
from vllm.logger import init_logger

from tokencake_vllm.transfer.block_memory import parts_of
from tokencake_vllm.transfer.checksums import ChecksumError, Checksums, checksum
from tokencake_vllm.transfer.copy_lane import STORE, UPLOAD, URGENT, CopyLane, CopyTask, Cuda, StagingHalf
from tokencake_vllm.transfer.jobs import DRAIN_S, TransferJob, TransferResult
from tokencake_vllm.transfer.slot_transfers import slot_transfers

logger = init_logger("vllm.tokencake")

SWITCH_S: Final = 0.0005
"""Time that a busy thread keeps the interpreter while a thread of the copies waits for it. Beside a loop in Python that
never rests, copies reached 0.4 GB/s on an H200 with Python's own 5 ms, and 3 to 5 with this, the loop being as fast."""


def _in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, name="tokencake-copies", daemon=True)
    thread.start()
    return thread


class StreamCopier:
    """Copies on side streams, submitted by a thread for each direction."""

    def __init__(
        self,
        views: list[torch.Tensor],
        rows: torch.Tensor,
        *,
        checksums: Checksums,
        cuda: Cuda = torch.cuda,
        spawn: Callable[[Callable[[], None]], threading.Thread | None] = _in_thread,
    ) -> None:
        self._views, self._rows, self._slots, self._cuda = views, rows, parts_of(rows, views), cuda
        self._checksums = checksums
        self._transfers = slot_transfers(rows, views[0].device)
        self._lanes = {
            "store": CopyLane(views, rows, cuda, self._store),
            "load": CopyLane(views, rows, cuda, self._load),
        }
        self._under_way: list[CopyTask] = []
        self._failed: list[TransferResult] = []
        self._switch_s = sys.getswitchinterval()
        sys.setswitchinterval(min(self._switch_s, SWITCH_S))
        self._threads = [spawn(lane.work) for lane in self._lanes.values()]

    def start(self, job: TransferJob) -> None:
        """Queue it, behind what the compute stream has been given so far."""
        is_urgent = job.request is not None or job.kind == "wipe"
        order = URGENT if is_urgent else STORE if job.kind == "store" else UPLOAD
        try:
            ready = self._cuda.Event()
            ready.record(self._cuda.current_stream(self._views[0].device))
            task = CopyTask(job, order, ready)
            self._under_way.append(task)
            self._lanes["store" if job.kind == "store" else "load"].add(task)
        except Exception:
            logger.exception("TokenCake: a %s of %d blocks could not be queued", job.kind, len(job.blocks))
            self._failed.append(TransferResult(job, 0.0, ok=False))

    def pace(self, *, is_computing: bool, urgent: Collection[int]) -> None:  # noqa: ARG002  # copies need no rests here
        """A step begins: uploads for which a request waits by now go first."""
        if urgent:
            self._lanes["load"].expedite(urgent)

    def advance(self) -> bool:
        """Submit one piece of each direction on this thread; returns whether there was one."""
        results = [lane.advance() for lane in self._lanes.values()]
        return any(results)

    def _store(self, task: CopyTask, half: StagingHalf) -> int:
        job, first = task.job, task.place
        last = min(first + len(half.staging), len(job.blocks))
        slots, ids = job.slots[first:last], half.device_ids(job.blocks[first:last])
        for view, staged in zip(self._views, half.parts, strict=True):
            torch.index_select(view, 0, ids, out=staged[: last - first])
        self._transfers.to_slots(half.staging, slots, half.stream)
        self._read_back(task, half, slots, ids)
        return last - first

    def _load(self, task: CopyTask, half: StagingHalf) -> int:
        job, first = task.job, task.place
        last = min(first + len(half.staging), len(job.blocks))
        slots, ids = job.slots[first:last], half.device_ids(job.blocks[first:last])
        if job.kind == "wipe":
            for view in self._views:
                view.index_fill_(0, ids, 1)
            return last - first
        self._transfers.from_slots(half.staging, slots, half.stream)
        for view, staged in zip(self._views, half.parts, strict=True):
            view.index_copy_(0, ids, staged[: last - first])
        self._read_back(task, half, slots, ids)
        return last - first

    def _read_back(self, task: CopyTask, half: StagingHalf, slots: Sequence[int], ids: torch.Tensor) -> None:
        """Of the blocks of this piece that are in the sample, read one back; the block changes only after the job."""
        if self._checksums.has_all:  # then they are read where they lie when the job is over
            return
        for place, slot in enumerate(slots):
            if self._checksums.has(slot):
                if half.is_sampling:
                    self._checksums.forget(slot)
                else:
                    half.read_back(ids[place : place + 1])
                    task.sampled.append((half, slot))

    def _compare(self, task: CopyTask) -> None:
        """Compare what was read back with what lies in the slots now.

        Raises:
            ChecksumError: they differ.
        """
        if self._checksums.has_all and task.job.kind != "wipe":
            self._checksums.check(task.job, self._views, self._slots)
        try:
            for half, slot in task.sampled:
                self._checksums.compare(task.job.kind, slot, checksum([half.sample], 0), checksum([self._rows], slot))
        finally:
            for half, _ in task.sampled:
                half.is_sampling = False

    def finished(self) -> list[TransferResult]:
        """Jobs whose last events have been reached; nothing is waited for."""
        done, self._failed = self._failed, []
        under_way: list[CopyTask] = []
        for task in self._under_way:
            job = task.job
            try:
                if not task.is_submitted or not all(end.query() for end in task.ends.values()):
                    under_way.append(task)
                    continue
                if task.ok:
                    self._compare(task)
                done.append(TransferResult(job, self._seconds(task), task.ok))
            except Exception as error:
                logger.exception("TokenCake: a %s of %d blocks failed", job.kind, len(job.blocks))
                task.ok = False  # the lane drops what is left of it
                done.append(TransferResult(job, 0.0, ok=False, is_mismatch=isinstance(error, ChecksumError)))
        self._under_way = under_way
        return done

    @staticmethod
    def _seconds(task: CopyTask) -> float:
        """From the first piece's begin to the last one's end, without the time in the queue."""
        return max((task.begin.elapsed_time(end) / 1e3 for end in task.ends.values()), default=0.0)

    def drain(self) -> None:
        """Wait for the events behind the last pieces."""
        for lane in self._lanes.values():
            lane.drain()

    def close(self) -> None:
        """Submit nothing more, and wait for what is under way."""
        sys.setswitchinterval(self._switch_s)
        for lane in self._lanes.values():
            lane.close()
        for thread in self._threads:
            if thread is not None:
                thread.join(timeout=DRAIN_S)
        for lane in self._lanes.values():
            for half in lane.halves:
                half.stream.synchronize()
