"""Transfers between staging rows on the device and slots of the host memory.

Neighbouring slots are one transfer, of at most `TRANSFER_BYTES`. Scattered slots of small blocks make many transfers.
On an NVIDIA device each is one call of the driver, which costs less CPU time than a copy between two slices in torch
and does not give up the interpreter lock in between. Elsewhere torch makes them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

import torch

TRANSFER_BYTES: Final = 4 * 2**20
"""The most that one transfer moves, unless a block is larger: 0.1 ms of a link of 50 GB/s.

The sampled tokens of a step go through the same copy engine, behind what it was given before."""


class SlotTransfers(Protocol):
    """Enqueues transfers on a stream. `slots[i]` belongs to row `i` of the staging buffer."""

    def to_slots(self, staging: torch.Tensor, slots: Sequence[int], stream: Any) -> None:
        """Copy staging rows to their slots."""

    def from_slots(self, staging: torch.Tensor, slots: Sequence[int], stream: Any) -> None:
        """Copy slots to their staging rows."""


def runs(slots: Sequence[int], longest: int) -> Iterator[tuple[int, int]]:
    """Where each run of at most `longest` neighbouring slots begins and ends in `slots`."""
    begin = 0
    for end in range(1, len(slots) + 1):
        if end == len(slots) or slots[end] != slots[end - 1] + 1 or end - begin == longest:
            yield begin, end
            begin = end


class TorchTransfers:
    """With torch, on its current stream."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows
        self._longest = _longest(rows)

    def to_slots(self, staging: torch.Tensor, slots: Sequence[int], stream: Any) -> None:  # noqa: ARG002  # the protocol's
        """Copy staging rows to their slots."""
        for begin, end in runs(slots, self._longest):
            self._rows[slots[begin] : slots[end - 1] + 1].copy_(staging[begin:end], non_blocking=True)

    def from_slots(self, staging: torch.Tensor, slots: Sequence[int], stream: Any) -> None:  # noqa: ARG002  # the protocol's
        """Copy slots to their staging rows."""
        for begin, end in runs(slots, self._longest):
            staging[begin:end].copy_(self._rows[slots[begin] : slots[end - 1] + 1], non_blocking=True)


class DriverTransfers:
    """With `cuMemcpyAsync` of the CUDA driver.

    The calling thread needs a current CUDA context: any operation of torch on the device has set it.

    Raises:
        OSError: there is no CUDA driver.
    """

    def __init__(self, rows: torch.Tensor, driver: Any = None) -> None:
        driver = driver or ctypes.PyDLL("libcuda.so.1")
        self._copy = driver.cuMemcpyAsync
        self._copy.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
        self._address, self._count, self._row_bytes = rows.data_ptr(), len(rows), rows[0].nbytes
        self._longest = _longest(rows)

    def to_slots(self, staging: torch.Tensor, slots: Sequence[int], stream: Any) -> None:
        """Copy staging rows to their slots."""
        for device, host, size in self._spans(staging, slots):
            self._check(self._copy(host, device, size, stream.cuda_stream))

    def from_slots(self, staging: torch.Tensor, slots: Sequence[int], stream: Any) -> None:
        """Copy slots to their staging rows."""
        for device, host, size in self._spans(staging, slots):
            self._check(self._copy(device, host, size, stream.cuda_stream))

    def _spans(self, staging: torch.Tensor, slots: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Addresses on the device and on the host, and how many bytes."""
        if slots and not (0 <= min(slots) <= max(slots) < self._count and len(slots) <= len(staging)):
            raise IndexError(f"slots {min(slots)} to {max(slots)} of {self._count}, {len(staging)} staging rows")
        row, first = self._row_bytes, staging.data_ptr()
        for begin, end in runs(slots, self._longest):
            yield first + begin * row, self._address + slots[begin] * row, (end - begin) * row

    @staticmethod
    def _check(error: int) -> None:
        if error:
            raise RuntimeError(f"cuMemcpyAsync failed: CUDA error {error}")


def _longest(rows: torch.Tensor) -> int:
    return max(1, TRANSFER_BYTES // rows[0].nbytes) if len(rows) else 1


def slot_transfers(rows: torch.Tensor, device: torch.device) -> SlotTransfers:
    """The transfers for `rows` of host memory and staging buffers on `device`."""
    if device.type == "cuda" and torch.version.cuda and len(rows):
        return DriverTransfers(rows)
    return TorchTransfers(rows)
