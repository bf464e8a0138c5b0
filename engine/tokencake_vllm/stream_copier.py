"""How are blocks copied between a CUDA device and the host? On a stream per direction, beside the computation.

Written from the documentation of CUDA, torch and vLLM and tested with made-up streams; it has not run on a device yet.

- A stream waits for what the compute stream was given before the job, the computation never waits for a copy. Whoever
  needs the result learns of it from the scheduler, after the host has seen the event behind the copy.
- Blocks pass through a small device buffer for each direction: one kernel gathers those of a chunk from all layers,
  one transfer for each run of neighbouring slots takes them to pinned host memory; and the other way round.
- A link of 25 GB/s moves a byte over the device's memory three times (gather, buffer, transfer). That is 4 % of the
  2 TB/s of an A800 and 2 % of the 4.8 TB/s of an H200, so that these copies need no pace.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol

import torch
from vllm.logger import init_logger

from tokencake_vllm.block_memory import Checksums, new_rows, parts_of
from tokencake_vllm.copies import Done, Job

logger = init_logger("vllm.tokencake")

STAGING_BYTES: Final = 64 * 2**20
"""Device memory through which the blocks of one direction pass."""


class Cuda(Protocol):
    """What is used of `torch.cuda`."""

    Stream: Any
    Event: Any

    def current_stream(self, device: torch.device) -> Any:
        """The stream that the model computes on."""

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        """What is enqueued inside goes to `stream`."""


def runs(slots: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where each run of neighbouring slots begins and ends in `slots`."""
    begin = 0
    for end in range(1, len(slots) + 1):
        if end == len(slots) or slots[end] != slots[end - 1] + 1:
            yield begin, end
            begin = end


class StreamCopier:
    """Copies on two side streams."""

    def __init__(
        self,
        views: list[torch.Tensor],
        rows: torch.Tensor,
        *,
        checks: bool,
        cuda: Cuda = torch.cuda,
    ) -> None:
        self._views, self._rows, self._slots, self._cuda = views, rows, parts_of(rows, views), cuda
        self._checksums = Checksums() if checks else None
        self._device = views[0].device
        self._streams = {"store": cuda.Stream(self._device), "load": cuda.Stream(self._device)}
        self._chunk = max(1, STAGING_BYTES // rows[0].nbytes) if len(rows) else 1
        self._staging = {kind: new_rows(views, self._chunk, self._device) for kind in self._streams}
        self._under_way: deque[tuple[Job, Any, Any, bool]] = deque()
        self._failed: list[Done] = []

    def start(self, job: Job) -> None:
        """Enqueue it on the stream of its direction, behind what the compute stream has been given so far."""
        stream = self._streams["store" if job.kind == "store" else "load"]
        ok = True
        try:
            begin, end = self._cuda.Event(enable_timing=True), self._cuda.Event(enable_timing=True)
            stream.wait_stream(self._cuda.current_stream(self._device))
            with self._cuda.stream(stream):
                begin.record(stream)
                try:
                    self._enqueue(job)
                except Exception:
                    ok = False
                    logger.exception("TokenCake: a %s of %d blocks failed", job.kind, len(job.blocks))
                # Also behind a failure: what was enqueued before it still writes, and must be over when it is told.
                end.record(stream)
        except Exception:
            logger.exception("TokenCake: a %s of %d blocks could not be enqueued", job.kind, len(job.blocks))
            self._failed.append(Done(job, 0.0, ok=False))
        else:
            self._under_way.append((job, begin, end, ok))

    def pace(self, *, is_computing: bool, urgent: Collection[int]) -> None:
        """Nothing to do: these copies take next to nothing from the computation."""

    def _enqueue(self, job: Job) -> None:
        for first in range(0, len(job.blocks), self._chunk):
            blocks = self._on_device(job.blocks[first : first + self._chunk])
            slots = job.slots[first : first + self._chunk]
            match job.kind:
                case "store":
                    self._store(blocks, slots)
                case "load":
                    self._load(blocks, slots)
                case "wipe":
                    for view in self._views:
                        view.index_fill_(0, blocks, 1)

    def _on_device(self, blocks: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor(blocks, pin_memory=self._device.type == "cuda")
        return ids.to(self._device, non_blocking=True)

    def _store(self, blocks: torch.Tensor, slots: Sequence[int]) -> None:
        staging = self._staging["store"][: len(slots)]
        for view, staged in zip(self._views, parts_of(staging, self._views), strict=True):
            torch.index_select(view, 0, blocks, out=staged)
        for begin, end in runs(slots):
            self._rows[slots[begin] : slots[end - 1] + 1].copy_(staging[begin:end], non_blocking=True)

    def _load(self, blocks: torch.Tensor, slots: Sequence[int]) -> None:
        staging = self._staging["load"][: len(slots)]
        for begin, end in runs(slots):
            staging[begin:end].copy_(self._rows[slots[begin] : slots[end - 1] + 1], non_blocking=True)
        for view, staged in zip(self._views, parts_of(staging, self._views), strict=True):
            view.index_copy_(0, blocks, staged)

    def finished(self) -> list[Done]:
        """Jobs whose last event has been reached; nothing is waited for."""
        done, self._failed = self._failed, []
        waiting: deque[tuple[Job, Any, Any, bool]] = deque()
        for job, begin, end, ok in self._under_way:
            try:
                if not end.query():
                    waiting.append((job, begin, end, ok))
                    continue
                if ok and self._checksums is not None and job.kind != "wipe":
                    self._checksums.check(job, self._views, self._slots)
                done.append(Done(job, begin.elapsed_time(end) / 1e3, ok))
            except Exception:
                logger.exception("TokenCake: a %s of %d blocks failed", job.kind, len(job.blocks))
                done.append(Done(job, 0.0, ok=False))
        self._under_way = waiting
        return done

    def close(self) -> None:
        """Wait for both streams."""
        for stream in self._streams.values():
            stream.synchronize()
