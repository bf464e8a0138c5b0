"""A real vLLM on the CPU: KV leaves the device, the device is overwritten, KV comes back, and nobody can tell."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM")

from tokencake import protocol
from tokencake_vllm.serve import SCHEDULER, connector_config

BLOCK = 32


class Engine:
    """vLLM's `LLM` with the plug-in; its engine core is a process of its own."""

    def __init__(self, model: Path, **time_settings: Any) -> None:
        from vllm import LLM

        self.llm = LLM(
            str(model),
            max_model_len=1_024,
            block_size=BLOCK,
            max_num_seqs=8,
            max_num_batched_tokens=128,
            num_gpu_blocks_override=100,
            enforce_eager=True,
            disable_log_stats=True,
            scheduler_cls=SCHEDULER,
            kv_transfer_config=connector_config(),
            additional_config={"tokencake": {"time": {"host_kv_gib": 0.05, **time_settings}}},
        )
        self.made = 0

    def rpc(self, method: str, *args: Any) -> Any:
        return self.llm.llm_engine.engine_core.call_utility("tokencake", method, args)

    def tell(self, *events: Any) -> list[str]:
        return self.rpc("tokencake_events", [protocol.to_wire(event) for event in events], time.time())["outcomes"]

    def ask(self, *prompts: list[int], expects: float | None = 600.0, max_tokens: int = 8) -> list[Any]:
        from vllm import SamplingParams

        params = []
        for _ in prompts:
            self.made += 1
            name = f"c{self.made}"
            hint = protocol.Hint(session=f"s{self.made}", call=name, reuse="extends", expects_tools={"build": expects})
            params.append(
                SamplingParams(
                    temperature=0,
                    ignore_eos=True,
                    max_tokens=max_tokens,
                    logprobs=3,
                    extra_args={"tokencake": hint.to_json()},
                )
            )
        return self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)

    def call(self, name: str) -> dict[str, Any]:
        (found,) = [c for c in self.rpc("tokencake_state", None, None, 10_000)["calls"] if c["call"] == name]
        return found

    def kv(self, name: str) -> dict[str, Any]:
        state = self.rpc("tokencake_state", None, None, 10_000)
        return next(kv for s in state["sessions"].values() for kv in s.get("kv", ()) if kv["call"] == name)

    def wait_for(self, name: str, place: str) -> None:
        until = time.monotonic() + 20
        while self.kv(name)[place] < self.kv(name)["blocks"]:
            assert time.monotonic() < until, self.kv(name)
            time.sleep(0.05)

    def wipe(self) -> None:
        assert self.rpc("tokencake_wipe") > 50
        time.sleep(0.3)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_PLUGINS": "tokencake",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        }.items():
            patch.setenv(name, value)
        running = Engine(tiny_model, debug_checksums=True)
        yield running
        running.llm.llm_engine.engine_core.shutdown()


def same(first: Any, second: Any) -> bool:
    """Text and logprobs, bit by bit."""
    a, b = first.outputs[0], second.outputs[0]
    if list(a.token_ids) != list(b.token_ids):
        return False
    return all(
        {token: entry.logprob for token, entry in one.items()} == {token: entry.logprob for token, entry in two.items()}
        for one, two in zip(a.logprobs, b.logprobs, strict=True)
    )


def prompt(seed: int, length: int) -> list[int]:
    return [(seed * 7_919 + place * 104_729) % 1_800 + 50 for place in range(length)]


@pytest.mark.parametrize("length", [10 * BLOCK - 9, 10 * BLOCK - 8, 10 * BLOCK, 10 * BLOCK + 1])
def test_what_was_offloaded_and_uploaded_gives_the_same_answer(engine: Engine, length: int) -> None:
    tokens = prompt(length, length)
    (first,) = engine.ask(tokens)
    name = f"c{engine.made}"
    follow_up = [*tokens, *first.outputs[0].token_ids, *prompt(1, 20)]
    (warm,) = engine.ask(follow_up)  # the prefix is still on the device
    (again,) = engine.ask(tokens)
    assert same(first, again)
    name = f"c{engine.made}"
    engine.wait_for(name, "on_host")
    engine.wipe()
    assert engine.kv(name)["on_device"] == 0
    assert engine.tell(protocol.ToolStart(name, "t", "build"), protocol.ToolEnd(name, "t", duration_s=600.0)) == [
        "applied",
        "applied",
    ]
    engine.wait_for(name, "on_device")
    (after,) = engine.ask(follow_up)
    found = engine.call(f"c{engine.made}")["cached_tokens"]
    assert found["device"] >= (length + 8) // BLOCK * BLOCK - BLOCK
    assert found["host"] <= 2 * BLOCK
    assert same(warm, after)


def test_loaded_on_demand_beside_others_with_a_shared_prefix(engine: Engine) -> None:
    shared = prompt(99, 5 * BLOCK)
    prompts = [shared + prompt(100 + number, 90 + 17 * number) for number in range(4)]
    before = engine.ask(*prompts)
    names = [f"c{engine.made - 3 + number}" for number in range(4)]
    for name in names:
        engine.wait_for(name, "on_host")
    engine.wipe()
    after = engine.ask(*prompts)
    assert all(same(one, two) for one, two in zip(before, after, strict=True))
    hosts = [engine.call(f"c{engine.made - 3 + number}")["cached_tokens"]["host"] for number in range(4)]
    assert max(hosts) >= 5 * BLOCK
    engine.wipe()
    alone = [engine.ask(tokens)[0] for tokens in prompts]
    assert [list(o.outputs[0].token_ids) for o in alone] == [list(o.outputs[0].token_ids) for o in before]


def test_reset_forgets_the_host(engine: Engine) -> None:
    tokens = prompt(7, 200)
    (before,) = engine.ask(tokens)
    engine.wait_for(f"c{engine.made}", "on_host")
    assert engine.llm.reset_prefix_cache()
    (after,) = engine.ask(tokens)
    assert engine.call(f"c{engine.made}")["cached_tokens"] == {"device": 0, "host": 0}
    assert same(before, after)


def test_nothing_was_caught(engine: Engine) -> None:
    counts = {tuple(key): count for key, count in engine.rpc("tokencake_metrics")["counts"]}
    assert counts.get(("errors",), 0) == 0
    assert not any(key[0] == "kv_copy_failures" for key in counts)
    assert counts["kv_uploads", "used"] >= 2


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *children(int(child))]
    return found


def test_an_idle_engine_with_stalled_agents_and_timers_sleeps(engine: Engine) -> None:
    for number in range(4):
        engine.ask(prompt(number, 100), expects=600.0)
        engine.tell(protocol.ToolStart(f"c{engine.made}", "t", "build", estimate_s=600.0))
    time.sleep(2)
    pids = children(os.getpid())
    before = {pid: cpu_seconds(pid) for pid in pids}
    time.sleep(10)
    spent = {pid: cpu_seconds(pid) - before[pid] for pid in pids if Path(f"/proc/{pid}").exists()}
    core, worker = sorted(pid for pid in pids if spent.get(pid) is not None)[-2:]
    assert spent[core] < 0.1, spent  # 1 % of a core
    assert spent[worker] < 0.4, spent  # stock vLLM's own worker takes 1.7 % to listen


def test_a_timer_wakes_an_idle_engine(engine: Engine) -> None:
    tokens = prompt(50, 200)
    engine.ask(tokens, expects=3.0)
    name = f"c{engine.made}"
    engine.tell(protocol.ToolStart(name, "t", "nap", estimate_s=4.0))
    engine.wait_for(name, "on_host")
    engine.wipe()
    time.sleep(4.0)  # no RPC in this time: the engine wakes by itself
    assert engine.kv(name)["on_device"] == engine.kv(name)["blocks"]
