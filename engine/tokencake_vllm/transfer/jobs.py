"""Transfer jobs: copies of KV blocks between device and host memory, and what carries them out.

A copier works in the background: a thread on the CPU (`thread_copier`), streams on CUDA (`stream_copier`). A job that
failed is reported as failed, and the request that waits for it computes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias

TransferKind: TypeAlias = Literal["store", "load", "wipe"]


@dataclass(frozen=True, slots=True)
class TransferJob:
    """Copy `blocks[i]` of the device to (`store`) or from (`load`) `slots[i]` of the host.

    `wipe` overwrites the blocks: a test's way to prove that what is read later was copied.
    """

    id: int
    kind: TransferKind
    blocks: tuple[int, ...]
    slots: tuple[int, ...] = ()
    request: str | None = None
    """The call that waits for this load."""


@dataclass(frozen=True, slots=True)
class TransferResult:
    """A job is over; `seconds` of copying, without its time in the queue and its rests."""

    job: TransferJob
    seconds: float
    ok: bool
    is_mismatch: bool = False
    """Whether it failed because a checksum differed."""


DRAIN_S: Final = 10.0
"""The longest that `drain` and `close` wait: enough for hundreds of gigabytes on a GPU."""


class Copier(Protocol):
    """Carries jobs out in the background. Its methods do not raise."""

    def start(self, job: TransferJob) -> None:
        """Begin `job`: stores read what the device has been told to compute so far, loads may overwrite at once."""

    def pace(self, *, is_computing: bool, urgent: Collection[int]) -> None:
        """A step begins: whether the device computes in it, and for which jobs a call waits by now."""

    def finished(self) -> list[TransferResult]:
        """Jobs that ended since the last call."""

    def drain(self) -> None:
        """Return when no copy is under way: the device's memory is about to be taken away."""

    def close(self) -> None:
        """Begin nothing more, and let what is being written right now be written."""


class NoCopier:
    """Stands where there is no host memory: every job fails, and the calls compute what they need."""

    def __init__(self) -> None:
        self._failed: list[TransferResult] = []

    def start(self, job: TransferJob) -> None:
        """Refuse it."""
        self._failed.append(TransferResult(job, 0.0, ok=False))

    def pace(self, *, is_computing: bool, urgent: Collection[int]) -> None:
        """Nothing to do."""

    def finished(self) -> list[TransferResult]:
        """Everything, failed."""
        failed, self._failed = self._failed, []
        return failed

    def drain(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""
