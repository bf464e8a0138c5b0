"""Slowdown of the computation beside copies."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch

from benchmarks.gpu.kv_caches import in_order
from benchmarks.gpu.report import Report
from benchmarks.gpu.rig import Rig
from benchmarks.gpu.speed import GIB, QWEN3_32B, by_block

if TYPE_CHECKING:
    from benchmarks.gpu.worlds import Gpu

SLOWDOWN: Final = 1.05
TOKENS_MS: Final = 1.0
JOB_BLOCKS: Final = 16
ROUNDS: Final = 5
STEPS: Final = 8
"""In a round: short enough to end before the copies do."""


def slowdown(report: Report, world: Gpu, native: Any) -> None:
    """Steps of the computation while both directions are busy, against steps alone.

    Matrix products, as in prefill, and reading memory, as in decoding. One large copy each way shows what the device
    itself makes of it.
    """
    count = GIB // QWEN3_32B.row_bytes
    caches = in_order("LBNHC", QWEN3_32B, 2 * count, world.device)
    matrix = torch.randn(8_192, 8_192, dtype=torch.bfloat16, device=world.device)
    memory = torch.randn(2_048, 2**19, dtype=torch.bfloat16, device=world.device)
    works: dict[str, Callable[[], object]] = {
        "matrix products": lambda: torch.mm(matrix, matrix),
        "reading memory": lambda: torch.sum(memory, dim=1),
    }
    with Rig(world, caches, 2 * count, 2 * count) as rig:
        copies: dict[str, Callable[[], object]] = {
            "ours": lambda: _ours(rig, count),
            "one large copy each way": _plain(rig, count),
        }
        if native is not None:
            copies["vLLM's call"] = _native(rig, native, count)
        for name, work in works.items():
            alone_ms = _step_ms(rig, work, lambda: None)
            ratios = {kind: round(_step_ms(rig, work, begin) / alone_ms, 3) for kind, begin in copies.items()}
            again = round(_step_ms(rig, work, lambda: None) / alone_ms, 3)
            report.at_most(
                SLOWDOWN,
                f"time of {name} beside copies",
                ratios["ours"],
                alone_ms=round(alone_ms, 3),
                ratios={**ratios, "alone again": again},
            )


def _step_ms(rig: Rig, work: Callable[[], object], begin_copies: Callable[[], object]) -> float:
    """Median of the rounds."""
    work()
    rounds: list[float] = []
    for _ in range(ROUNDS):
        rig.world.settle()
        begin_copies()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
        begin.record()
        for _ in range(STEPS):
            work()
        end.record()
        end.synchronize()
        rounds.append(begin.elapsed_time(end) / STEPS)
        rig.wait()
    return statistics.median(rounds)


def _ours(rig: Rig, count: int) -> None:
    for at in range(0, count, JOB_BLOCKS):
        here = list(range(at, min(at + JOB_BLOCKS, count)))
        there = [count + block for block in here]
        rig.begin("store", here, here)
        rig.begin("load", there, there)


def _streams() -> list[Any]:
    return [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]  # torch's


def _plain(rig: Rig, count: int) -> Callable[[], None]:
    half = count * rig.rows[0].nbytes
    host = rig.rows.view(torch.uint8).flatten()
    device = torch.empty_like(host, device=rig.world.device)
    pairs = [(host[:half], device[:half]), (device[half:], host[half:])]
    streams = _streams()

    def begin() -> None:
        for stream, (to, from_) in zip(streams, pairs, strict=True):
            with torch.cuda.stream(stream):
                to.copy_(from_, non_blocking=True)

    return begin


def _native(rig: Rig, native: Any, count: int) -> Callable[[], None]:
    device = {number: by_block(cache) for number, cache in enumerate(rig.caches.values())}
    pages = rig.rows.view(torch.uint8).view(len(device), 2 * count, -1)
    host = dict(enumerate(pages))
    out, into = _streams()
    store, load = native.build_params(device, host, out), native.build_params(host, device, into)

    def begin() -> None:
        for at in range(0, count, JOB_BLOCKS):
            here = list(range(at, min(at + JOB_BLOCKS, count)))
            there = [count + block for block in here]
            native.copy_blocks(here, here, store)
            native.copy_blocks(there, there, load)

    return begin


def sampled_tokens(report: Report, world: Gpu) -> None:
    """A step's sampled tokens go to the host through the copy engine that the stores use: how long do they take?"""
    count = GIB // QWEN3_32B.row_bytes
    tokens = torch.zeros(256, dtype=torch.int64, device=world.device)
    host = torch.empty(256, dtype=torch.int64, pin_memory=True)
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's
    figures = {}
    with Rig(world, in_order("LBNHC", QWEN3_32B, count, world.device), count, count) as rig:
        everything, scattered = list(range(count)), world.draw.sample(range(count), count)
        for name, slots in (("alone", None), ("neighbouring slots", everything), ("scattered slots", scattered)):
            waits_ms = []
            for _ in range(ROUNDS):
                world.settle()
                if slots is not None:
                    rig.begin_all("store", everything, slots, JOB_BLOCKS)
                for _ in range(10):
                    began_s = time.perf_counter()
                    with torch.cuda.stream(stream):
                        host.copy_(tokens, non_blocking=True)
                    stream.synchronize()
                    waits_ms.append((time.perf_counter() - began_s) * 1e3)
                rig.wait()
            figures[name] = {"median_ms": round(statistics.median(waits_ms), 3), "max_ms": round(max(waits_ms), 3)}
    worst_ms = max(figure["median_ms"] for figure in figures.values())
    report.at_most(TOKENS_MS, "ms of sampled tokens beside stores", worst_ms, waits=figures)
