"""One direction of copies on a CUDA device: two staging buffers, each with a stream, and a queue of jobs in pieces."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch
from vllm.logger import init_logger

from tokencake_vllm.transfer.block_memory import new_rows, parts_of
from tokencake_vllm.transfer.jobs import DRAIN_S, TransferJob

logger = init_logger("vllm.tokencake")

STAGING_BYTES: Final = 16 * 2**20
"""Device memory of one of the four staging buffers; a block that is larger has a buffer of its own size."""
DEPTH: Final = 4
"""Pieces under way on one side stream: a request's load waits for at most those of two streams."""
URGENT, UPLOAD, STORE = range(3)


class Cuda(Protocol):
    """What is used of `torch.cuda`."""

    Stream: Any
    Event: Any

    def current_stream(self, device: torch.device) -> Any:
        """The stream that the model computes on."""

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        """What is enqueued inside goes to `stream`."""


@dataclass(slots=True)
class CopyTask:
    """A job: the first `place` blocks are submitted."""

    job: TransferJob
    order: int
    ready: Any
    """The event behind what the compute stream had been given."""
    place: int = 0
    begin: Any = None
    ends: dict[int, Any] = field(default_factory=dict)
    """The event behind the last piece on each side stream."""
    sampled: list[tuple[StagingHalf, int]] = field(default_factory=list)
    """Blocks read back for a checksum: on which half, and of which slot."""
    ok: bool = True

    @property
    def is_submitted(self) -> bool:
        """Whether the device has been given all of it, or it failed."""
        return not self.ok or self.place == len(self.job.blocks)


class StagingHalf:
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
        self._views = views
        self._sample = new_rows(views, 1, device)
        self._sample_parts = parts_of(self._sample, views)
        self.sample = torch.empty_like(self._sample, device="cpu", pin_memory=device.type == "cuda")
        """A block of the device as it was read back on this stream, for a checksum."""
        self.is_sampling = False
        """Whether `sample` is waiting to be compared."""

    def read_back(self, ids: torch.Tensor) -> None:
        """Read one block of the device into `sample`, behind what the stream was given."""
        self.is_sampling = True
        for view, part in zip(self._views, self._sample_parts, strict=True):
            torch.index_select(view, 0, ids, out=part)
        self.sample.copy_(self._sample, non_blocking=True)

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


class CopyLane:
    """One direction: jobs by urgency, then by age, in pieces on two halves in turn."""

    def __init__(
        self, views: list[torch.Tensor], rows: torch.Tensor, cuda: Cuda, move: Callable[[CopyTask, StagingHalf], int]
    ) -> None:
        count = max(1, STAGING_BYTES // rows[0].nbytes) if len(rows) else 1
        self.halves = [StagingHalf(views, count, cuda) for _ in range(2)]
        self._cuda, self._move = cuda, move
        self._tasks: list[CopyTask] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._turn = 0

    def add(self, task: CopyTask) -> None:
        """Queue it."""
        with self._changed:
            self._tasks.append(task)
            self._changed.notify_all()

    def expedite(self, jobs: Collection[int]) -> None:
        """Requests wait for these by now."""
        with self._changed:
            for task in self._tasks:
                if task.job.id in jobs:
                    task.order = URGENT

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

    def _submit(self, task: CopyTask, half: StagingHalf) -> None:
        if id(half) not in task.ends:
            half.stream.wait_event(task.ready)
        event = self._cuda.Event(enable_timing=True, blocking=True)
        with self._cuda.stream(half.stream):
            if task.begin is None:
                begin = self._cuda.Event(enable_timing=True)
                begin.record(half.stream)
                task.begin = begin
            try:
                moved = self._move(task, half)
            finally:
                # Also behind a failure: what was submitted before it still writes, and must be over when it is told.
                half.end_piece(event)
                task.ends[id(half)] = event
        task.place += moved  # last, because `finished` reads it on another thread
