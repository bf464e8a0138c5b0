"""How do KV blocks get from the device to host memory and back? The worker's side, without ever raising.

A copier carries jobs out in the background: a thread on the CPU (`thread_copier`), a stream per direction on CUDA
(`stream_copier`). A job that failed is reported as failed, and whoever waits for it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, TypeAlias

import torch
from vllm.logger import init_logger

from tokencake_vllm.transfer.block_memory import block_views, host_rows

logger = init_logger("vllm.tokencake")

Kind: TypeAlias = Literal["store", "load", "wipe"]


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
    """A job is over; `seconds` of copying, without its time in the queue and its rests."""

    job: Job
    seconds: float
    ok: bool


DRAIN_S: Final = 10.0
"""So long `drain` and `close` wait at most: hundreds of gigabytes on a GPU."""


class Copier(Protocol):
    """Carries jobs out in the background. Its methods do not raise."""

    def start(self, job: Job) -> None:
        """Begin `job`: stores read what the device has been told to compute so far, loads may overwrite at once."""

    def pace(self, *, is_computing: bool, urgent: Collection[int]) -> None:
        """A step begins: whether the device computes in it, and for which jobs a call waits by now."""

    def finished(self) -> list[Done]:
        """Jobs that ended since the last call."""

    def drain(self) -> None:
        """Return when no copy is under way: the device's memory is about to be taken away."""

    def close(self) -> None:
        """Begin nothing more, and let what is being written right now be written."""


class NoCopier:
    """Stands where there is no host memory: every job fails, and the calls compute what they need."""

    def __init__(self) -> None:
        self._failed: list[Done] = []

    def start(self, job: Job) -> None:
        """Refuse it."""
        self._failed.append(Done(job, 0.0, ok=False))

    def pace(self, *, is_computing: bool, urgent: Collection[int]) -> None:
        """Nothing to do."""

    def finished(self) -> list[Done]:
        """Everything, failed."""
        failed, self._failed = self._failed, []
        return failed

    def drain(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


def make_copier(
    kv_caches: Mapping[str, Any],
    num_blocks: int,
    slots: int,
    *,
    checks: bool,
    allocate: Callable[[list[torch.Tensor], int], torch.Tensor] = host_rows,
) -> Copier:
    """The copier for where these caches lie, with its host memory; `NoCopier` where that cannot be had."""
    from tokencake_vllm.transfer.stream_copier import StreamCopier  # noqa: PLC0415  # they implement what is declared here
    from tokencake_vllm.transfer.thread_copier import ThreadCopier  # noqa: PLC0415

    try:
        views = block_views(kv_caches, num_blocks)
        rows = allocate(views, slots)
        kind = StreamCopier if views[0].device.type == "cuda" else ThreadCopier
        return kind(views, rows, checks=checks)
    except Exception:
        logger.exception("TokenCake: no host memory for %d KV blocks; nothing is offloaded", slots)
        return NoCopier()
