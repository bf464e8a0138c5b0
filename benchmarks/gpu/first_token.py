"""Time to the first token after a tool, when another agent took the device meanwhile."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu import processes
from benchmarks.gpu.engine import Engine, Kind, Setup, gpu_options, prompt
from benchmarks.gpu.report import Report
from tokencake import protocol

KINDS: Final[tuple[Kind, ...]] = ("stock", "native", "ours")
OF_STOCK: Final = 1.0
"""Never later than stock vLLM."""
REPEATS: Final = 2
TOOL_TOKENS: Final = 200
EVERY: Final = {"async_scheduling": True, "load_format": "dummy", "max_num_batched_tokens": 8_192, "max_num_seqs": 8}
ON_GPU: Final[dict[str, Any]] = {
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2]},
    "attention_backend": "FLASH_ATTN",
    "max_model_len": 20_480,
    "num_gpu_blocks_override": 1_300,
    "kv_cache_memory_bytes": 2 * 2**30,
    "block_size": 16,
}
ON_CPU: Final[dict[str, Any]] = {
    "enforce_eager": True,
    "max_model_len": 3_200,
    "num_gpu_blocks_override": 101,
    "block_size": 32,
}


def check(report: Report, model: Path, logs: Path, *, is_cpu: bool) -> None:
    """The engines one after the other, each alone on the device."""
    sizes, other, host_gib = ([600], 3_000, 0.2) if is_cpu else ([4_000, 16_000], 20_000, 4.0)
    options = {**EVERY, **(ON_CPU if is_cpu else {**gpu_options(), **ON_GPU})}
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        if kind == "native" and is_cpu:
            continue  # vLLM's own offloading does not run there
        setup = Setup(f"first token, {kind}", kind, model, options, {"host_kv_gib": host_gib})
        work = partial(_measure, setup=setup, sizes=sizes, other=other)
        rows += processes.run(report, {setup.name: work}, logs).get(setup.name) or []
    for size in sizes:
        stock_s = _median_s(rows, "stock", size, "")
        for how in ("uploaded", "on demand"):
            ours_s = _median_s(rows, "ours", size, how)
            if stock_s is not None and ours_s is not None:
                _tell(report, size, how, stock_s, ours_s, rows, has_limit=not is_cpu)


def _tell(
    report: Report, size: int, how: str, stock_s: float, ours_s: float, rows: list[dict[str, Any]], *, has_limit: bool
) -> None:
    mine = [row for row in rows if (row["kind"], row["size"], row["how"]) == ("ours", size, how)]
    figures = {"ours_s": ours_s, "stock_s": stock_s, "native_s": _median_s(rows, "native", size, ""), "rows": mine}
    name = f"first token after a tool, {size} tokens {how}, of stock"
    if not all(row["decision"] == "offload" and row["on_host"] for row in mine):
        report.tell(name, None, why="the Time Scheduler decided otherwise", **figures)
    elif has_limit:
        report.at_most(OF_STOCK, name, ours_s / stock_s, **figures)
    else:
        report.tell(name, None, ratio=round(ours_s / stock_s, 3), **figures)


def _median_s(rows: list[dict[str, Any]], kind: str, size: int, how: str) -> float | None:
    seconds = [row["ttft_s"] for row in rows if (row["kind"], row["size"], row["how"]) == (kind, size, how)]
    return round(statistics.median(seconds), 4) if seconds else None


def _measure(report: Report, setup: Setup, sizes: list[int], other: int) -> list[dict[str, Any]]:
    engine, kind = Engine(report, setup), setup.kind
    engine.ask(prompt(7, max(sizes)), "warm/0", answer_tokens=2, is_last=True)
    rows = []
    for size in sizes:
        for how in ("uploaded", "on demand") if kind == "ours" else ("",):
            for repeat in range(REPEATS):
                session = f"{size}{how}{repeat}".replace(" ", "-")
                seed = 1_000 + 10 * size + 5 * len(how) + repeat
                rows.append({"kind": kind, "size": size, "how": how, **_one(engine, session, seed, size, other, how)})
    if kind == "ours":
        report.tell(f"{setup.name}: counts", None, **engine.counts())
    return rows


def _one(engine: Engine, session: str, seed: int, size: int, other: int, how: str) -> dict[str, Any]:
    """A call, its tool with another agent's call in it, and the next call: what was decided, and what was where."""
    tokens = prompt(seed, size)
    first = engine.ask(tokens, f"{session}/0", answer_tokens=8)
    row: dict[str, Any] = {}
    if engine.kind == "ours":
        row = {name: first.told[name] for name in ("decision", "why", "blocks")}
        engine.tell(protocol.ToolStart(first.call, "t", "build"))
        row["on_host"] = engine.settled(first.call, "on_host")
    engine.ask(prompt(seed + 50_000, other), f"other-{session}/0", answer_tokens=2, is_last=True)
    if engine.kind == "ours":
        row["left_on_device"] = engine.kv(first.call)["on_device"]
        if how == "uploaded":
            engine.tell(protocol.ToolEnd(first.call, "t", duration_s=600.0))
            row["uploaded"] = engine.settled(first.call, "on_device")
    follow = [*tokens, *first.tokens, *prompt(3, TOOL_TOKENS)]
    answer = engine.ask(follow, f"{session}/1", answer_tokens=1, is_last=True)
    where = {"prefix_tokens": answer.told["prefix_tokens"]} if engine.kind == "ours" else {}
    return {**row, **where, "cached": answer.cached, "ttft_s": round(answer.took_s, 4)}
