"""Self-check of the copies: before the engine serves, a few blocks go to the host and back and are compared.

They take the way that all copies take, beside a computation that writes to other blocks. Blocks keep what they held.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from tokencake_vllm.transfer.jobs import Copier, TransferJob, TransferKind

BLOCKS: Final = 4
"""Blocks that are copied; as many others are written to meanwhile."""
TIMEOUT_S: Final = 10.0
"""A copy of a few blocks that takes longer is of no use."""
_POLL_S: Final = 0.0005
_MIX: Final = 0x9E3779B1


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """What the self-check found."""

    problem: str | None
    """Why the copies cannot be trusted, or None."""
    blocks: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    """Of both ways together."""


def self_check(copier: Copier, views: Sequence[torch.Tensor], slots: int, timeout_s: float = TIMEOUT_S) -> SelfCheck:
    """Copy blocks out and back with `copier`, which has nothing else to do. Does not raise.

    Args:
        copier: copies between `views` and `slots` slots of host memory; what these hold is lost.
        views: the KV caches, dimension 0 being the block.
        slots: how many there are.
        timeout_s: for each way.
    """
    # Block 0 is vLLM's null block. The last blocks are those that vLLM uses last.
    count = min(BLOCKS, slots, (len(views[0]) - 1) // 2)
    if count < 1:
        return SelfCheck(None)
    first = len(views[0]) - 2 * count
    copied, others = list(range(first, first + count)), list(range(first + count, first + 2 * count))
    before = [view[first:].clone() for view in views]
    try:
        return _round_trip(copier, views, copied, others, timeout_s)
    except Exception as error:  # noqa: BLE001  # whatever it is, the copies cannot be trusted
        return SelfCheck(f"{type(error).__name__}: {error}", count)
    finally:
        for view, blocks in zip(views, before, strict=True):
            view[first:] = blocks


def _round_trip(
    copier: Copier, views: Sequence[torch.Tensor], copied: list[int], others: list[int], timeout_s: float
) -> SelfCheck:
    began = time.perf_counter()
    patterns = [_pattern(view, copied) for view in views]
    nbytes = sum(pattern.nbytes for pattern in patterns)
    for view, pattern in zip(views, patterns, strict=True):
        view[copied] = pattern
    for kind in ("store", "load"):
        problem = _copy(copier, kind, views, copied, others, timeout_s)
        if problem is not None:
            return SelfCheck(problem, len(copied), nbytes, time.perf_counter() - began)
        if kind == "store":
            for view in views:
                view[copied] = 0
    wrong = [
        block
        for place, block in enumerate(copied)
        if not all(torch.equal(view[block], pattern[place]) for view, pattern in zip(views, patterns, strict=True))
    ]
    seconds = time.perf_counter() - began
    problem = f"{len(wrong)} of {len(copied)} blocks came back with other bytes" if wrong else None
    return SelfCheck(problem, len(copied), nbytes, seconds)


def _copy(
    copier: Copier,
    kind: TransferKind,
    views: Sequence[torch.Tensor],
    copied: list[int],
    others: list[int],
    timeout_s: float,
) -> str | None:
    """Carry out one job, beside writes to other blocks; returns what is wrong, or None."""
    job = TransferJob(-1, kind, tuple(copied), tuple(range(len(copied))))
    copier.pace(is_computing=False, urgent=())
    copier.start(job)
    for _ in _polls(timeout_s):
        for result in copier.finished():
            return None if result.ok else f"a {kind} of {len(copied)} blocks failed; the worker's log says why"
        for view in views:
            view[others] += 1
    return f"a {kind} of {len(copied)} blocks took more than {timeout_s:g} s"


def _polls(timeout_s: float) -> Iterator[None]:
    until = time.perf_counter() + timeout_s
    while time.perf_counter() < until:
        yield
        time.sleep(_POLL_S)


def _pattern(view: torch.Tensor, blocks: list[int]) -> torch.Tensor:
    """Other bytes for each block and place. No random numbers: those of the model must stay as they are."""
    shape = (len(blocks), *view.shape[1:])
    numbers = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.int64, device=view.device)
    return (numbers * _MIX).to(view.dtype).view(shape)
