"""Bytes of a KV block, on the device and in host memory.

The layers' caches are seen as one or a few tensors of whole words whose dimension 0 is the block. A slot of host memory
is one row that holds a block of all layers, so that it can be copied at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, Final

import torch

PIN_BYTES: Final = 64 * 2**30
"""At most so much is pinned by one call: from 512 GiB on, one registration for all fails on some drivers."""
_WORDS: Final = (torch.int64, torch.int32, torch.int16, torch.uint8)
"""Whatever a cache holds is moved as integers: not every type of number can be gathered on every device."""


def block_views(kv_caches: Mapping[str, Any], num_blocks: int) -> list[torch.Tensor]:
    """Views of the layers' caches whose dimension 0 is the block of the manager, each byte once, in the widest words.

    Layers that lie evenly spaced in one allocation become one tensor `[block, layer, ...]`.
    """
    layers: list[torch.Tensor] = []
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for cache in kv_caches.values():
        for tensor in cache if isinstance(cache, list | tuple) else [cache]:
            by_block = _block_first(tensor, num_blocks)
            place = (by_block.data_ptr(), tuple(by_block.shape))
            if place not in seen:
                seen.add(place)
                layers.append(by_block)
    return _in_words(_joined(layers))


def _block_first(tensor: torch.Tensor, num_blocks: int) -> torch.Tensor:
    if tensor.shape[0] % num_blocks == 0:
        per_block = tensor.shape[0] // num_blocks
        return tensor if per_block == 1 else tensor.view(num_blocks, per_block, *tensor.shape[1:])
    for dim, size in enumerate(tensor.shape):
        if size == num_blocks:
            return tensor.movedim(dim, 0)
    raise ValueError(f"a KV cache has the shape {tuple(tensor.shape)}; no dimension counts its {num_blocks} blocks")


def _joined(layers: list[torch.Tensor]) -> list[torch.Tensor]:
    if len(layers) < 2:  # noqa: PLR2004  # nothing to join
        return layers
    first = layers[0]
    kinds = {(t.untyped_storage().data_ptr(), t.dtype, tuple(t.shape), t.stride()) for t in layers}
    offsets = sorted(t.storage_offset() for t in layers)
    gaps = {after - before for before, after in pairwise(offsets)}
    if len(kinds) != 1 or len(gaps) != 1:
        return layers
    shape = (first.shape[0], len(layers), *first.shape[1:])
    stride = (first.stride(0), gaps.pop(), *first.stride()[1:])
    return [torch.as_strided(first, shape, stride, offsets[0])]


def _in_words(views: list[torch.Tensor]) -> list[torch.Tensor]:
    for word in _WORDS:
        try:
            return [view.view(word) for view in views]
        except RuntimeError:  # too wide for the last dimension or for where a block begins
            continue
    raise ValueError("the KV caches cannot be seen as bytes")


def parts_of(rows: torch.Tensor, views: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Rows of whole blocks, cut into what belongs to each view; the parts have the shape of its blocks."""
    parts: list[torch.Tensor] = []
    begin = 0
    for view in views:
        end = begin + view[0].numel()
        parts.append(rows[:, begin:end].view(len(rows), *view.shape[1:]))
        begin = end
    return parts


def new_rows(views: list[torch.Tensor], count: int, device: torch.device | str) -> torch.Tensor:
    """Memory for `count` blocks of all views."""
    words = sum(view[0].numel() for view in views)
    return torch.empty((count, words), dtype=views[0].dtype, device=device)


def host_rows(views: list[torch.Tensor], slots: int) -> torch.Tensor:
    """The host memory, one slot a row, pinned where the views lie on a CUDA device.

    Raises:
        RuntimeError: the memory cannot be had or cannot be pinned.
    """
    rows = new_rows(views, slots, "cpu")
    if views[0].device.type == "cuda":
        rows.zero_()  # touched by several threads first, 8 GiB were pinned in 1.0 s instead of 3.8 s
        pin(rows, views[0].device)
    return rows


def pin(rows: torch.Tensor, device: torch.device | str = "cuda") -> None:
    """Pin memory as it is: torch's own pinned allocations are rounded up to the next power of two.

    Raises:
        RuntimeError: it cannot be pinned; what was pinned of it before is undone, and no CUDA error is left pending.
    """
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's
    pinned: list[int] = []
    for part in torch.split(rows, max(1, PIN_BYTES // rows[0].nbytes)) if len(rows) else ():
        error = cudart.cudaHostRegister(part.data_ptr(), part.nbytes, 0)
        if int(getattr(error, "value", error)):
            for address in pinned:
                cudart.cudaHostUnregister(address)
            _take_pending_error(device)
            raise RuntimeError(f"{rows.nbytes} bytes of host memory cannot be pinned: CUDA error {int(error)}")
        pinned.append(part.data_ptr())


def _take_pending_error(device: torch.device | str) -> None:
    """A failed call of the CUDA runtime leaves its error to the next kernel launch: make that launch here."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device).add_(1)
