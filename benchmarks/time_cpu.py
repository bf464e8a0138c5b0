"""Time to an agent's first token after a tool, with the Time Scheduler and without, on a CPU.

    python benchmarks/time_cpu.py [--rounds N] [--json FILE]

A real vLLM on the CPU (a small Llama with random weights), eight agents that call tools, and KV memory for a third of
what they need together. Stock vLLM with prefix caching and ours take turns; each agent makes the same calls in both.
Ratios count, the seconds are this machine's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "proxy")]

from tests.harness.tiny_model import make_tiny_model  # noqa: E402  # the path comes first
from tokencake import protocol  # noqa: E402
from tokencake_cli.processes import STOCK_ENV, Processes, engine_command, free_port, stock_command  # noqa: E402

AGENTS, TURNS, BLOCK = 8, 4, 32
FIRST_TOKENS, MORE_TOKENS, ANSWER_TOKENS = 1_024, 64, 8
KV_BLOCKS = AGENTS * (FIRST_TOKENS + TURNS * MORE_TOKENS) // BLOCK // 3
TOOL_S = (3.0, 9.0)
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1_536,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
FLAGS = (
    *("--served-model-name", "small", "--max-model-len", "2048", "--block-size", str(BLOCK), "--max-num-seqs", "8"),
    *("--num-gpu-blocks-override", str(KV_BLOCKS), "--enforce-eager", "--load-format", "dummy"),
)
OURS = '{"tokencake": {"time": {"host_kv_gib": 0.5}, "space": {"enabled": false}}}'


def make_model(folder: Path) -> Path:
    """A model big enough for prefill to cost something; its weights are made up when it is loaded."""
    make_tiny_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **SHAPE}))
    (folder / "model.safetensors").unlink(missing_ok=True)
    return folder


async def agent(number: int, base: str, seed: int, first_tokens_s: list[float]) -> None:
    """Its turns: a call, a tool, a longer call."""
    draw = random.Random(f"{seed}/{number}")  # noqa: S311  # repeatable, not secret
    tokens = [draw.randrange(50, 1_800) for _ in range(FIRST_TOKENS)]
    session = f"{seed}-{number}"
    async with httpx.AsyncClient(base_url=base, timeout=300) as client:
        for turn in range(TURNS):
            call, is_last = f"{session}-{turn}", turn == TURNS - 1
            hint = protocol.Hint(
                session=session,
                call=call,
                agent="worker",
                reuse="final" if is_last else "extends",
                expects_tools=None if is_last else {"work": sum(TOOL_S) / 2},
            )
            waited_s = await _first_token_s(client, tokens, hint)
            if turn:
                first_tokens_s.append(waited_s)
            if not is_last:
                seconds = draw.uniform(*TOOL_S)
                await _tell(client, protocol.ToolStart(call, "t", "work"))
                await asyncio.sleep(seconds)
                await _tell(client, protocol.ToolEnd(call, "t", duration_s=seconds))
                tokens = tokens + [draw.randrange(50, 1_800) for _ in range(MORE_TOKENS)]


async def _first_token_s(client: httpx.AsyncClient, tokens: list[int], hint: protocol.Hint) -> float:
    body = {
        "model": "small",
        "prompt": tokens,
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "vllm_xargs": {protocol.HINT_KEY: hint.to_json()},
    }
    began, first = time.perf_counter(), None
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if first is None and line.startswith("data: {"):
                first = time.perf_counter() - began
    if first is None:
        raise RuntimeError("the engine answered without a token")
    return first


async def _tell(client: httpx.AsyncClient, event: protocol.Event) -> None:
    answer = await client.post(protocol.EVENTS_PATH, json={"v": 1, "events": [protocol.to_wire(event)]})
    if answer.status_code not in (200, 404, 405):  # stock vLLM does not know the route
        answer.raise_for_status()


def measure(kind: str, model: Path, seed: int, logs: Path) -> tuple[list[float], dict[str, float]]:
    """One run of all agents on a fresh engine."""
    port = free_port()
    if kind == "stock":
        command, env = stock_command(str(model), port, FLAGS), {**ENV, **STOCK_ENV}
    else:
        command, env = engine_command(str(model), port, [*FLAGS, "--additional-config", OURS]), ENV
    base = f"http://127.0.0.1:{port}"
    first_tokens_s: list[float] = []
    with Processes(logs) as processes:
        processes.start("engine", command, env)
        processes.wait_until_healthy("engine", f"{base}/health", timeout_s=300)

        async def everybody() -> None:
            await asyncio.gather(*(agent(number, base, seed, first_tokens_s) for number in range(AGENTS)))

        asyncio.run(everybody())
        return first_tokens_s, _counters(httpx.get(f"{base}/metrics", timeout=30).text)


def _counters(text: str) -> dict[str, float]:
    rows = (line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("tokencake:kv_"))
    return {name: float(value) for name, value in rows if "_created" not in name}


def main() -> int:
    """Print the table and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="turns of each engine")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, list[float]] = {"stock": [], "ours": []}
    counters: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model")
        for turn in range(options.rounds):
            for kind in found:
                logs = Path(folder) / f"{kind}-{turn}"
                logs.mkdir()
                seconds, told = measure(kind, model, turn, logs)
                found[kind] += seconds
                print(f"{kind}, round {turn}: median {statistics.median(seconds):.2f} s", flush=True)
                counters = told or counters
    rows = {
        kind: (statistics.median(seconds), sorted(seconds)[int(0.95 * (len(seconds) - 1))])
        for kind, seconds in found.items()
    }
    print(f"first token after a tool, {len(found['ours'])} calls each, {KV_BLOCKS} KV blocks, {os.cpu_count()} cores")
    print(f"{'':8}{'median s':>10}{'P95 s':>10}")
    for kind, (median, high) in rows.items():
        print(f"{kind:8}{median:10.2f}{high:10.2f}")
    ratio = [ours / stock for ours, stock in zip(rows["ours"], rows["stock"], strict=True)]
    print(f"{'ratio':8}{ratio[0]:10.2f}{ratio[1]:10.2f}")
    for name, value in sorted(counters.items()):
        print(f"  {name} {value:g}")
    if options.json:
        options.json.write_text(json.dumps({"seconds": found, "ratio": ratio, "counters": counters}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
