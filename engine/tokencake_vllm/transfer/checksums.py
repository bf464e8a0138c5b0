"""Checksums of copied blocks: a sample of the copies is compared on both sides, while the engine runs.

A slot of host memory is in the sample or it is not. So what was stored in it and what is loaded from it later are
compared, too: a slot that was overwritten in between is found.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch

from tokencake_vllm.transfer.jobs import TransferJob, TransferKind


class ChecksumError(RuntimeError):
    """A copy left other bytes than it was to copy."""


def checksum(parts: Iterable[torch.Tensor], index: int) -> int:
    """The checksum of one block or slot over all layers; of device memory it waits for the current stream."""
    total = 0
    for part in parts:
        total = zlib.crc32(part[index].contiguous().cpu().numpy().tobytes(), total)
    return total


class Checksums:
    """Checksums of the slots in the sample.

    Args:
        every: one slot in this many is in the sample; 0 for none, 1 for all.
        slots: how many there are. Of fewer than `every`, one is in the sample.
    """

    def __init__(self, every: int, slots: int) -> None:
        self._every = min(every, max(1, slots))
        self._by_slot: dict[int, int] = {}

    @property
    def has_all(self) -> bool:
        """Whether every slot is in the sample."""
        return self._every == 1

    def has(self, slot: int) -> bool:
        """Whether a slot is in the sample."""
        return self._every > 0 and slot % self._every == 0

    def forget(self, slot: int) -> None:
        """The slot gets other bytes, which are not compared."""
        self._by_slot.pop(slot, None)

    def compare(self, kind: TransferKind, slot: int, on_device: int, on_host: int) -> None:
        """Compare the checksums of a block and its slot with each other, and with what was stored in the slot.

        Raises:
            ChecksumError: they differ.
        """
        stored = on_device if kind == "store" else self._by_slot.get(slot, on_host)
        if not on_device == on_host == stored:
            raise ChecksumError(f"after a {kind} the block's bytes differ from those of slot {slot} of host memory")
        self._by_slot[slot] = on_device

    def check(self, job: TransferJob, views: list[torch.Tensor], slots: list[torch.Tensor]) -> None:
        """Compare the copies of a job that are in the sample, where they lie.

        Raises:
            ChecksumError: two of them differ.
        """
        for block, slot in zip(job.blocks, job.slots, strict=True):
            if self.has(slot):
                self.compare(job.kind, slot, checksum(views, block), checksum(slots, slot))
