"""Test rig of the copies: KV caches, host memory and the copier; a block's content follows from a number, its stamp."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Self

import torch

from tokencake_vllm.transfer.block_memory import block_views, host_rows, parts_of
from tokencake_vllm.transfer.checksums import Checksums
from tokencake_vllm.transfer.jobs import TransferJob, TransferKind, TransferResult
from tokencake_vllm.transfer.stream_copier import StreamCopier

if TYPE_CHECKING:
    from types import TracebackType

    from benchmarks.gpu.kv_caches import Caches
    from benchmarks.gpu.worlds import World

PATIENCE_S: Final = 30.0


class Rig:
    """One copier at work. A context manager: at its end the host memory is no longer pinned."""

    def __init__(self, world: World, caches: Caches, blocks: int, slots: int) -> None:
        self.world, self.caches = world, caches
        self.views = block_views(caches, blocks)
        self.rows = host_rows(self.views, slots)
        checksums = Checksums(1_000, len(self.rows))
        self.copier = StreamCopier(self.views, self.rows, checksums=checksums, cuda=world.cuda, **world.copier_options)
        self.open = 0
        """Jobs that have not been told as ended."""
        self._jobs = 0
        base = torch.arange(self.rows.shape[1], dtype=torch.int64) * 2_654_435_761 + 97
        self._base = {"cpu": base, world.device.type: base.to(world.device)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.world.settle()
        self.copier.close()
        if self.world.is_real:
            torch.cuda.cudart().cudaHostUnregister(self.rows.data_ptr())  # type: ignore[no-untyped-call]  # torch's

    # --- content ------------------------------------------------------------------------------------

    def content(self, stamps: Sequence[int], where: str = "") -> torch.Tensor:
        """Rows with these stamps, on the device unless `where` says otherwise."""
        base = self._base[where or self.world.device.type]
        numbers = torch.tensor(stamps, dtype=torch.int64, device=base.device)
        return (base[None, :] ^ (numbers[:, None] * 11_400_714_819_323_199)).to(self.rows.dtype)

    def ids(self, blocks: Sequence[int]) -> torch.Tensor:
        """On the device."""
        return torch.tensor(blocks, device=self.world.device)

    def writer(self, blocks: Sequence[int], source: torch.Tensor) -> Callable[[], None]:
        """A step of the computation that writes `source`, read when it runs, to these blocks."""
        parts, index = parts_of(source, self.views), self.ids(blocks)

        def step() -> None:
            for view, part in zip(self.views, parts, strict=True):
                view.index_copy_(0, index, part)

        return step

    def write(self, blocks: Sequence[int], stamps: Sequence[int]) -> None:
        """Now."""
        self.writer(blocks, self.content(stamps))()

    def read(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of the device's blocks."""
        return torch.cat([view.index_select(0, index).reshape(len(index), -1) for view in self.views], dim=1)

    def is_on_device(self, blocks: Sequence[int], stamps: Sequence[int]) -> bool:
        """Whether these blocks are what the computation or a load is to have left there."""
        return torch.equal(self.read(self.ids(blocks)), self.content(stamps))

    def is_on_host(self, slots: Sequence[int], stamps: Sequence[int]) -> bool:
        """Whether these slots hold that; waits for nothing."""
        return torch.equal(self.rows[torch.tensor(slots)], self.content(stamps, "cpu"))

    # --- jobs ---------------------------------------------------------------------------------------

    def begin(
        self, kind: TransferKind, blocks: Sequence[int], slots: Sequence[int] = (), request: str | None = None
    ) -> int:
        """Start a job; returns its number."""
        self._jobs += 1
        self.open += 1
        self.world.start(self.copier, TransferJob(self._jobs, kind, tuple(blocks), tuple(slots), request))
        return self._jobs

    def begin_all(self, kind: TransferKind, blocks: Sequence[int], slots: Sequence[int], job_blocks: int) -> None:
        """Start jobs of `job_blocks` blocks each."""
        for at in range(0, len(blocks), job_blocks):
            self.begin(kind, blocks[at : at + job_blocks], slots[at : at + job_blocks])

    def finished(self) -> list[TransferResult]:
        """Jobs told as ended since the last call."""
        done = self.copier.finished()
        self.open -= len(done)
        return done

    def wait(self, *, until: int | None = None, is_spinning: bool = False) -> list[TransferResult]:
        """Wait until all jobs, or the one of number `until`, are told as ended.

        Raises:
            TimeoutError: they are not, after `PATIENCE_S`.
        """
        done, give_up_s = self.finished(), time.monotonic() + PATIENCE_S
        while self.open and not any(each.job.id == until for each in done):
            if time.monotonic() > give_up_s:
                raise TimeoutError(f"{self.open} copies have not ended after {PATIENCE_S:.0f} s")
            if not is_spinning:
                self.world.rest()
            done += self.finished()
        return done
