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
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch
from vllm.logger import init_logger

from tokencake_vllm.transfer.block_memory import Checksums, new_rows, parts_of
from tokencake_vllm.transfer.jobs import DRAIN_S, TransferJob, TransferResult
from tokencake_vllm.transfer.slot_transfers import slot_transfers

logger = init_logger("vllm.tokencake")

STAGING_BYTES: Final = 16 * 2**20
"""Device memory of one of the four staging buffers; a block that is larger has a buffer of its own size."""
DEPTH: Final = 4
"""Pieces under way on one side stream: a request's load waits for at most those of two streams."""
SWITCH_S: Final = 0.0005
"""So long a busy thread keeps the interpreter while a thread of the copies waits for it. Beside a loop in Python that
never rests, copies reached 0.4 GB/s on an H200 with Python's own 5 ms, and 3 to 5 with this, the loop being as fast."""
_URGENT, _UPLOAD, _STORE = range(3)


class Cuda(Protocol):
    """What is used of `torch.cuda`."""

    Stream: Any
    Event: Any

    def current_stream(self, device: torch.device) -> Any:
        """The stream that the model computes on."""

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        """What is enqueued inside goes to `stream`."""


@dataclass(slots=True)
class _Task:
    """A job: the first `place` blocks are submitted."""

    job: TransferJob
    order: int
    ready: Any
    """The event behind what the compute stream had been given."""
    place: int = 0
    begin: Any = None
    ends: dict[int, Any] = field(default_factory=dict)
    """The event behind the last piece on each side stream."""
    ok: bool = True

    @property
    def is_submitted(self) -> bool:
        return not self.ok or self.place == len(self.job.blocks)


class _Half:
    """A staging buffer with its stream; block ids reach the device through a ring of pinned rows."""

    def __init__(self, views: list[torch.Tensor], count: int, cuda: Cuda) -> None:
        device = views[0].device
        self.stream = cuda.Stream(device)
        self.staging = new_rows(views, count, device)
        self.parts = parts_of(self.staging, views)
        self._ids = torch.empty((DEPTH, count), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device_ids = torch.empty(count, dtype=torch.int64, device=device)
        self._ends: deque[Any] = deque()
        self._turn = 0

    def make_room(self) -> None:
        """Wait until fewer than `DEPTH` pieces are under way."""
        if len(self._ends) == DEPTH:
            self._ends.popleft().synchronize()

    def device_ids(self, blocks: Sequence[int]) -> torch.Tensor:
        """The ids on the device, in the order of the stream."""
        row = self._ids[self._turn % DEPTH, : len(blocks)]
        self._turn += 1
        row.numpy()[:] = blocks
        return self._device_ids[: len(blocks)].copy_(row, non_blocking=True)

    def end_piece(self, event: Any) -> None:
        """`event` stands behind the piece."""
        event.record(self.stream)
        self._ends.append(event)


class _Lane:
    """One direction: jobs by urgency, then by age, in pieces on two halves in turn."""

    def __init__(
        self, views: list[torch.Tensor], rows: torch.Tensor, cuda: Cuda, move: Callable[[TransferJob, int, _Half], int]
    ) -> None:
        count = max(1, STAGING_BYTES // rows[0].nbytes) if len(rows) else 1
        self.halves = [_Half(views, count, cuda) for _ in range(2)]
        self._cuda, self._move = cuda, move
        self._tasks: list[_Task] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._turn = 0

    def add(self, task: _Task) -> None:
        """Queue it."""
        with self._changed:
            self._tasks.append(task)
            self._changed.notify_all()

    def expedite(self, jobs: Collection[int]) -> None:
        """Requests wait for these by now."""
        with self._changed:
            for task in self._tasks:
                if task.job.id in jobs:
                    task.order = _URGENT

    def drain(self) -> None:
        """Wait until everything is submitted and has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or not self._tasks, timeout=DRAIN_S)
        for half in self.halves:
            half.stream.synchronize()

    def close(self) -> None:
        """Submit nothing more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def work(self) -> None:
        """Submit pieces until the lane is closed: the body of the lane's thread."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._tasks)
                if self._is_closed:
                    return
            self.advance()

    def advance(self) -> bool:
        """Submit a piece of the first job; returns whether there was one. Does not raise."""
        half = self.halves[self._turn % 2]
        try:
            half.make_room()
        except Exception:
            logger.exception("TokenCake: the device does not answer")  # the job below will fail as well
        with self._changed:
            task = min(self._tasks, key=lambda task: (task.order, task.job.id), default=None)
        if task is None:
            return False
        try:
            self._submit(task, half)
        except Exception:
            task.ok = False
            logger.exception("TokenCake: a %s of %d blocks failed", task.job.kind, len(task.job.blocks))
        self._turn += 1
        if task.is_submitted:
            with self._changed:
                self._tasks.remove(task)
                self._changed.notify_all()
        return True

    def _submit(self, task: _Task, half: _Half) -> None:
        if id(half) not in task.ends:
            half.stream.wait_event(task.ready)
        event = self._cuda.Event(enable_timing=True, blocking=True)
        with self._cuda.stream(half.stream):
            if task.begin is None:
                begin = self._cuda.Event(enable_timing=True)
                begin.record(half.stream)
                task.begin = begin
            try:
                moved = self._move(task.job, task.place, half)
            finally:
                # Also behind a failure: what was submitted before it still writes, and must be over when it is told.
                half.end_piece(event)
                task.ends[id(half)] = event
        task.place += moved  # last, because `finished` reads it on another thread


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
        checks: bool,
        cuda: Cuda = torch.cuda,
        spawn: Callable[[Callable[[], None]], threading.Thread | None] = _in_thread,
    ) -> None:
        self._views, self._slots, self._cuda = views, parts_of(rows, views), cuda
        self._checksums = Checksums() if checks else None
        self._transfers = slot_transfers(rows, views[0].device)
        self._lanes = {
            "store": _Lane(views, rows, cuda, self._store),
            "load": _Lane(views, rows, cuda, self._load),
        }
        self._under_way: list[_Task] = []
        self._failed: list[TransferResult] = []
        self._switch_s = sys.getswitchinterval()
        sys.setswitchinterval(min(self._switch_s, SWITCH_S))
        self._threads = [spawn(lane.work) for lane in self._lanes.values()]

    def start(self, job: TransferJob) -> None:
        """Queue it, behind what the compute stream has been given so far."""
        is_urgent = job.request is not None or job.kind == "wipe"
        order = _URGENT if is_urgent else _STORE if job.kind == "store" else _UPLOAD
        try:
            ready = self._cuda.Event()
            ready.record(self._cuda.current_stream(self._views[0].device))
            task = _Task(job, order, ready)
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

    def _store(self, job: TransferJob, first: int, half: _Half) -> int:
        last = min(first + len(half.staging), len(job.blocks))
        slots, ids = job.slots[first:last], half.device_ids(job.blocks[first:last])
        for view, staged in zip(self._views, half.parts, strict=True):
            torch.index_select(view, 0, ids, out=staged[: last - first])
        self._transfers.to_slots(half.staging, slots, half.stream)
        return last - first

    def _load(self, job: TransferJob, first: int, half: _Half) -> int:
        last = min(first + len(half.staging), len(job.blocks))
        slots, ids = job.slots[first:last], half.device_ids(job.blocks[first:last])
        if job.kind == "wipe":
            for view in self._views:
                view.index_fill_(0, ids, 1)
            return last - first
        self._transfers.from_slots(half.staging, slots, half.stream)
        for view, staged in zip(self._views, half.parts, strict=True):
            view.index_copy_(0, ids, staged[: last - first])
        return last - first

    def finished(self) -> list[TransferResult]:
        """Jobs whose last events have been reached; nothing is waited for."""
        done, self._failed = self._failed, []
        under_way: list[_Task] = []
        for task in self._under_way:
            job = task.job
            try:
                if not task.is_submitted or not all(end.query() for end in task.ends.values()):
                    under_way.append(task)
                    continue
                if task.ok and self._checksums is not None and job.kind != "wipe":
                    self._checksums.check(job, self._views, self._slots)
                done.append(TransferResult(job, self._seconds(task), task.ok))
            except Exception:
                logger.exception("TokenCake: a %s of %d blocks failed", job.kind, len(job.blocks))
                task.ok = False  # the lane drops what is left of it
                done.append(TransferResult(job, 0.0, ok=False))
        self._under_way = under_way
        return done

    @staticmethod
    def _seconds(task: _Task) -> float:
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
