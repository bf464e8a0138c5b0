"""Validation of the simulator against a real vLLM server, over HTTP and in wall time.

Stock decisions on a real server (`tokencake engine`, both schedulers off) with a model of SmolLM2-135M's shape and
random weights; every agent is an HTTP client. The rates are fitted to the steps that the server kept while it ran
another workload just before. Compared are the prefix hits of every call and the makespan. Needs a machine without
other work; `validate_cpu.py` compares by processor time and does not.

python benchmarks/validate_server.py [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "proxy")]

from benchmarks.validate_cpu import CONFIG, MAKESPAN_TOLERANCE, PROFILE, small_workload  # noqa: E402  # the path first
from tokencake_cli.processes import Processes, engine_command, free_port  # noqa: E402
from tokencake_sim import RunOptions, policy_named, simulate  # noqa: E402
from tokencake_sim.capture.calibrate import fit, read_steps  # noqa: E402
from tokencake_sim.engine.build import quiet_vllm  # noqa: E402
from tokencake_sim.workload.tokens import texts_of, token_ids  # noqa: E402

if TYPE_CHECKING:
    from tokencake_sim import App, Profile, Workload

RESULT = ROOT / "benchmarks" / "results" / "validate_server.json"
SEEDS = (2, 3, 4)
TWIN_GAP_S = 0.01
"""Between calls that become ready together: two connections would bring them in either order."""
ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
SETTINGS = {"tokencake": {"space": {"enabled": False}, "time": {"enabled": False}, "measure": {"steps": 20_000}}}
FLAGS = (
    *("--served-model-name", "m", "--load-format", "dummy", "--skip-tokenizer-init", "--dtype", "bfloat16"),
    *("--block-size", str(PROFILE.block_tokens), "--num-gpu-blocks-override", str(PROFILE.kv_blocks)),
    *("--max-model-len", str(PROFILE.max_model_len), "--max-num-batched-tokens", str(PROFILE.max_batched_tokens)),
    *("--max-num-seqs", str(PROFILE.max_seqs), "--enforce-eager", "--enable-prompt-tokens-details"),
    *("--additional-config", json.dumps(SETTINGS)),
)


class Clients:
    """The applications of a workload as HTTP clients."""

    def __init__(self, base: str) -> None:
        self.hits: dict[str, int] = {}
        self._http = httpx.AsyncClient(base_url=base, timeout=600)
        self._answers: dict[str, list[int]] = {}

    async def run(self, workload: Workload) -> float:
        """Run them all; returns the makespan in seconds."""
        began_s = time.perf_counter()
        await asyncio.gather(*(self._run_app(app) for app in workload.apps))
        return time.perf_counter() - began_s

    async def _run_app(self, app: App) -> None:
        await asyncio.sleep(app.arrival_s)
        over = {node.id: asyncio.Event() for node in app.nodes}
        texts = texts_of(app)

        async def node_of(name: str) -> None:
            node = next(node for node in app.nodes if node.id == name)
            for before in (*node.predecessors, *node.after):
                await over[before].wait()
            twins = [other.id for other in app.nodes if other.predecessors == node.predecessors]
            await asyncio.sleep(twins.index(name) * TWIN_GAP_S)
            prompt: list[int] = []
            for chunk in texts[name].prompt:
                prompt += self._answers.get(chunk.key) or token_ids(chunk, PROFILE.model.vocabulary)
            answered = await self._call(f"{app.id}/{name}", prompt, node.output_tokens)
            if (answer := texts[name].answer) is not None:
                self._answers[answer.key] = answered
            if node.tool is not None:
                await asyncio.sleep(node.tool.duration_s)
            over[name].set()

        await asyncio.gather(*(node_of(node.id) for node in app.nodes))

    async def _call(self, name: str, prompt: list[int], tokens: int) -> list[int]:
        body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        answer = await self._http.post("/v1/completions", json={**body, "return_token_ids": True, "detokenize": False})
        answer.raise_for_status()
        found = answer.json()
        self.hits[name] = (found["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return list(found["choices"][0]["token_ids"])


def compare(real_s: float, hits: dict[str, int], profile: Profile, workload: Workload) -> dict[str, Any]:
    """One workload through the simulator, beside what was measured."""
    result = simulate(workload, profile, policy_named("stock"), RunOptions())
    simulated = {f"{call['app']}/{call['node']}": call["device_hit_tokens"] for call in result.timeline["calls"]}
    return {
        "calls": len(simulated),
        "calls_with_other_hits": {n: (hits[n], simulated[n]) for n in simulated if hits[n] != simulated[n]},
        "hit_tokens": sum(simulated.values()),
        "real_makespan_s": real_s,
        "simulated_makespan_s": result.metrics["makespan_s"],
        "makespan_error": result.metrics["makespan_s"] / real_s - 1,
    }


async def _measure(base: str) -> tuple[Profile, list[tuple[float, dict[str, int], Workload]]]:
    clients = Clients(base)
    await clients.run(small_workload(0))  # first steps are slow: memory is touched for the first time
    known = len(read_steps(base))
    await clients.run(small_workload(1))
    profile = fit(read_steps(base)[known:], PROFILE)
    runs = []
    for seed in SEEDS:
        clients.hits.clear()
        workload = small_workload(seed)
        runs.append((await clients.run(workload), dict(clients.hits), workload))
    return profile, runs


def main() -> int:
    """Run both, print what differs; 0 where they agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULT, help="write the comparison there")
    options = parser.parse_args()
    quiet_vllm()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        port = free_port()
        base = f"http://127.0.0.1:{port}"
        with Processes(Path(folder)) as processes:
            processes.start("engine", engine_command(folder, port, list(FLAGS)), ENV)
            processes.wait_until_healthy("engine", f"{base}/health", timeout_s=300)
            profile, runs = asyncio.run(_measure(base))
    compared = [compare(real_s, hits, profile, workload) for real_s, hits, workload in runs]
    text = json.dumps({"runs": compared}, indent=1)
    print(text)
    options.json.write_text(text + "\n", encoding="utf-8")
    has_other_hits = any(run["calls_with_other_hits"] for run in compared)
    return int(has_other_hits or any(abs(run["makespan_error"]) > MAKESPAN_TOLERANCE for run in compared))


if __name__ == "__main__":
    sys.exit(main())
