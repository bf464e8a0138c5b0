"""Rates of the copies, and the delay of a load that a request waits for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from benchmarks.gpu.kv_caches import Shape, in_order
from benchmarks.gpu.report import Report
from benchmarks.gpu.rig import Rig
from tokencake_vllm.transfer.block_memory import pin

if TYPE_CHECKING:
    from benchmarks.gpu.worlds import Gpu, World
    from tokencake_vllm.transfer.jobs import TransferKind

GIB: Final = 2**30
JOB_BYTES: Final = 64 * 2**20
"""What the Time Scheduler cuts copies into."""
SHARE_OF_PLAIN: Final = 0.7
URGENT_MS: Final = 30.0
QWEN3_32B: Final = Shape(layers=64, heads=8, tokens=16, content=2 * 128)
SHAPES: Final = {
    "Qwen3-32B": QWEN3_32B,
    "Llama-3.3-70B, one of 8 ranks": Shape(layers=80, heads=1, tokens=16, content=2 * 128),
    "Kimi-K2, MLA": Shape(layers=61, heads=1, tokens=64, content=576),
}
KINDS: Final[tuple[TransferKind, TransferKind]] = ("store", "load")


def gbps(size: float, seconds: float) -> float:
    """10^9 bytes per second."""
    return round(size / seconds / 1e9, 2)


def best_s(world: World, work: Callable[[], object]) -> float:
    """Seconds of `work`, which waits for its own end; the better of two runs."""
    seconds = []
    for _ in range(2):
        world.settle()
        began_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began_s)
    return min(seconds)


def rates(report: Report, world: Gpu, native: Any) -> None:
    """Stores and loads of random blocks against one large copy of as many bytes, for blocks of several sizes."""
    for name, shape in SHAPES.items():
        count = 3 * GIB // 2 // shape.row_bytes
        caches = in_order("LBNHC", shape, 2 * count, world.device)
        with Rig(world, caches, 2 * count, count + 64) as rig:
            plain = _plain(rig, count)
            blocks = world.draw.sample(range(2 * count), count)
            scattered = world.draw.sample(range(len(rig.rows)), count)
            figures: dict[str, Any] = {f"one large copy, {kind}": figure for kind, figure in plain.items()}
            shares = []
            for place, slots in (("neighbouring", list(range(count))), ("scattered", scattered)):
                for kind in KINDS:
                    figure = _ours(rig, kind, blocks, slots)
                    shares.append(figure / plain[kind])
                    figures[f"{kind}, {place} slots"] = figure
            figures["store beside a busy interpreter"] = _ours(rig, "store", blocks, scattered, is_spinning=True)
            if native is not None:
                figures |= _native(rig, native, blocks, scattered)
            name_of_line = f"rate of {name}, of one large copy"
            report.at_least(SHARE_OF_PLAIN, name_of_line, min(shares), block_bytes=shape.row_bytes, gb_per_s=figures)
        del rig, caches
        torch.cuda.empty_cache()


def _ours(rig: Rig, kind: TransferKind, blocks: list[int], slots: list[int], *, is_spinning: bool = False) -> float:
    job_blocks = max(1, JOB_BYTES // rig.rows[0].nbytes)

    def copy() -> None:
        rig.begin_all(kind, blocks, slots, job_blocks)
        if not all(done.ok for done in rig.wait(is_spinning=is_spinning)):
            raise RuntimeError(f"a {kind} failed")

    return gbps(len(blocks) * rig.rows[0].nbytes, best_s(rig.world, copy))


def _plain(rig: Rig, count: int) -> dict[TransferKind, float]:
    host = _host_bytes(rig)[: count * rig.rows[0].nbytes]
    device = torch.empty_like(host, device=rig.world.device)
    ends: dict[TransferKind, tuple[torch.Tensor, torch.Tensor]] = {"store": (host, device), "load": (device, host)}

    def copy(kind: TransferKind) -> None:
        to, from_ = ends[kind]
        to.copy_(from_, non_blocking=True)
        rig.world.settle()

    return {kind: gbps(host.nbytes, best_s(rig.world, partial(copy, kind))) for kind in KINDS}


def _host_bytes(rig: Rig) -> torch.Tensor:
    return rig.rows.view(torch.uint8).flatten()


def _native(rig: Rig, native: Any, blocks: list[int], slots: list[int]) -> dict[str, float]:
    """The call of vLLM's own offloading, for layers of a block that lie apart, and for such that lie together."""
    count, row, flat = len(rig.views[0]), rig.rows[0].nbytes, _host_bytes(rig)
    layers = [by_block(cache) for cache in rig.caches.values()]
    page = layers[0].shape[1]
    host_pages = flat.view(len(layers), len(rig.rows), page)
    forms = {
        "by layer": (dict(enumerate(layers)), dict(enumerate(host_pages))),
        "by block": (
            {0: torch.empty((count, row), dtype=torch.uint8, device=rig.world.device)},
            {0: flat.view(-1, row)},
        ),
    }
    job_blocks, stream = max(1, JOB_BYTES // row), torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's
    figures = {}
    for form, (device, host) in forms.items():
        for kind, source, target, from_, to in (
            ("store", device, host, blocks, slots),
            ("load", host, device, slots, blocks),
        ):
            params = native.build_params(source, target, stream)

            def copy(params: Any = params, from_: list[int] = from_, to: list[int] = to) -> None:
                for at in range(0, len(from_), job_blocks):
                    native.copy_blocks(from_[at : at + job_blocks], to[at : at + job_blocks], params)
                stream.synchronize()

            figures[f"vLLM's call {form}, {kind}"] = gbps(len(blocks) * row, best_s(rig.world, copy))
    return figures


def by_block(cache: torch.Tensor) -> torch.Tensor:
    """A layer of the layout LBNHC as `[block, byte]`, the same memory."""
    pages = cache.permute(0, 2, 1, 3).flatten(1).view(torch.uint8)
    if pages.data_ptr() != cache.data_ptr():
        raise ValueError(f"a cache of strides {cache.stride()} cannot be seen as pages")
    return pages


def urgent_load(report: Report, world: Gpu) -> None:
    """A load that a request waits for, behind 6 GiB of uploads; the time that starting them takes."""
    count = 3 * GIB // QWEN3_32B.row_bytes
    with Rig(world, in_order("LBNHC", QWEN3_32B, count, world.device), count, count) as rig:
        waits_ms, starts_us, behind = [], list[float](), 0
        uploads, wanted = list(range(count - 16)), list(range(count - 16, count))
        rig.begin("load", wanted, wanted)  # the first use of anything takes longer
        rig.wait()
        for _ in range(5):
            for at in range(0, 2 * len(uploads), 16):
                chunk = (uploads * 2)[at : at + 16]
                began_s = time.perf_counter()
                rig.begin("load", chunk, chunk)
                starts_us.append((time.perf_counter() - began_s) * 1e6)
            began_s = time.perf_counter()
            rig.wait(until=rig.begin("load", wanted, wanted, "a request"))
            waits_ms.append((time.perf_counter() - began_s) * 1e3)
            behind = rig.open
            rig.wait()
    if not behind:
        raise RuntimeError("no upload was behind the request's load: this says nothing")
    report.at_most(
        URGENT_MS,
        "ms of a request's load behind uploads",
        max(waits_ms),
        all_ms=[round(wait_ms, 2) for wait_ms in waits_ms],
        jobs_still_behind=behind,
        start_us={"median": round(statistics.median(starts_us)), "max": round(max(starts_us))},
    )


def pinning(report: Report, world: Gpu) -> None:
    """Host memory as the product takes it, touched by several threads first, and without that, in turns."""
    gib = 4
    size = gib * GIB
    seconds: dict[str, list[float]] = {"touched first": [], "as it is": []}
    for _ in range(3):
        for way, found in seconds.items():
            rows = torch.empty((size // 2**20, 2**20), dtype=torch.uint8)
            began_s = time.perf_counter()
            if way == "touched first":
                rows.zero_()
            pin(rows, world.device)
            found.append(round(time.perf_counter() - began_s, 2))
            torch.cuda.cudart().cudaHostUnregister(rows.data_ptr())  # type: ignore[no-untyped-call]  # torch's
            del rows
    for_64_gib = round(statistics.median(seconds["touched first"]) * 64 / gib, 1)
    report.tell(
        "pinning", None, gib=gib, seconds=seconds, seconds_for_64_gib=for_64_gib, threads=torch.get_num_threads()
    )
