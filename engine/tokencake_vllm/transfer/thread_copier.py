"""Copies where the device is the CPU itself: on one thread, in small pieces, with rests between them.

Copy and computation share the cores: while a step computes, a copy without a waiting request takes at most `SHARE` of
the time. A copy that a request waits for, and every copy of an engine that computes nothing, goes at full speed.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final

import numpy as np
import torch
from vllm.logger import init_logger

from tokencake_vllm.transfer.block_memory import parts_of
from tokencake_vllm.transfer.checksums import ChecksumError, Checksums
from tokencake_vllm.transfer.jobs import DRAIN_S, TransferJob, TransferResult

logger = init_logger("vllm.tokencake")

SHARE: Final = 0.02
"""Of the time while a step computes: a step is delayed by no more than 5 %, even if the copy takes a core from it."""
PIECE_S: Final = 0.0005
"""A piece is one block, or as many as fit into this time: each rest costs a wake-up."""
_GARBAGE: Final = 0x3C
_URGENT, _UPLOAD, _STORE = range(3)


@dataclass(slots=True)
class _Task:
    """A job under way: the first `place` blocks are copied."""

    job: TransferJob
    order: int
    place: int = 0
    seconds: float = 0.0


def _leave_the_cores_of_the_computation() -> None:
    """Copy on whatever core is free: vLLM binds its own threads, and a new one inherits the binding."""
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(threading.get_native_id(), range(os.cpu_count() or 1))


class ThreadCopier:
    """Copies on one thread beside the computation: what a call waits for, then uploads, then stores."""

    def __init__(self, views: list[torch.Tensor], rows: torch.Tensor, *, checksums: Checksums) -> None:
        self._views, self._slots = views, parts_of(rows, views)
        # numpy copies on the calling thread; torch would start a team of threads that spin on the computation's cores.
        self._arrays = [(view.numpy(), slots.numpy()) for view, slots in zip(views, self._slots, strict=True)]
        self._checksums = checksums
        self._tasks: list[_Task] = []
        self._done: SimpleQueue[TransferResult] = SimpleQueue()
        self._changed = threading.Condition()
        self._is_computing = self._is_closed = False
        self._rests_until = 0.0
        self._thread = threading.Thread(target=self._work, name="tokencake-copies", daemon=True)
        self._thread.start()

    def start(self, job: TransferJob) -> None:
        """Queue it."""
        is_urgent = job.request is not None or job.kind == "wipe"
        order = _URGENT if is_urgent else _STORE if job.kind == "store" else _UPLOAD
        with self._changed:
            self._tasks.append(_Task(job, order))
            self._changed.notify_all()

    def pace(self, *, is_computing: bool, urgent: Collection[int]) -> None:
        """A step begins."""
        with self._changed:
            self._is_computing = is_computing
            for task in self._tasks:
                if task.job.id in urgent:
                    task.order = _URGENT
            self._changed.notify_all()

    def finished(self) -> list[TransferResult]:
        """What the thread has done."""
        done = []
        while not self._done.empty():
            done.append(self._done.get())
        return done

    def drain(self) -> None:
        """Wait until the thread has nothing left to do; it does not rest meanwhile."""
        with self._changed:
            self._is_computing = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_closed or not self._tasks, timeout=DRAIN_S)

    def close(self) -> None:
        """Let the thread end."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(timeout=DRAIN_S)

    # --- the thread -----------------------------------------------------------------------------------

    def _work(self) -> None:
        _leave_the_cores_of_the_computation()
        while (task := self._next()) is not None:
            began, is_over, ok, is_mismatch = time.perf_counter(), False, True, False
            try:
                is_over = self._copy_some(task, began + PIECE_S)
            except Exception as error:
                is_over, ok, is_mismatch = True, False, isinstance(error, ChecksumError)
                logger.exception("TokenCake: a %s of %d blocks failed", task.job.kind, len(task.job.blocks))
            ended = time.perf_counter()
            task.seconds += ended - began
            self._rests_until = ended + (ended - began) * (1 / SHARE - 1)
            if is_over:
                with self._changed:
                    self._tasks.remove(task)
                    self._done.put(TransferResult(task.job, task.seconds, ok, is_mismatch))
                    self._changed.notify_all()

    def _next(self) -> _Task | None:
        """What to copy a piece of now; waits for it. None at the end."""
        with self._changed:
            while not self._is_closed:
                task = min(self._tasks, key=lambda task: (task.order, task.job.id), default=None)
                if task is None:
                    self._changed.wait()
                    continue
                remaining_s = self._rests_until - time.perf_counter()
                if remaining_s <= 0 or task.order == _URGENT or not self._is_computing:
                    return task
                self._changed.wait(remaining_s)
            return None

    def _copy_some(self, task: _Task, until: float) -> bool:
        """Copy a piece; returns whether it was the last."""
        job = task.job
        while task.place < len(job.blocks):
            block = job.blocks[task.place]
            for blocks, slots in self._arrays:
                match job.kind:
                    case "store":
                        np.copyto(slots[job.slots[task.place]], blocks[block])
                    case "load":
                        np.copyto(blocks[block], slots[job.slots[task.place]])
                    case "wipe":
                        blocks[block] = _GARBAGE
            task.place += 1
            if time.perf_counter() >= until:
                break
        is_over = task.place == len(job.blocks)
        if is_over and job.kind != "wipe":
            self._checksums.check(job, self._views, self._slots)
        return is_over
