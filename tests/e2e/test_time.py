"""A real vLLM on the CPU: KV is offloaded, the device is overwritten, KV is uploaded, and the output is the same.

What it answers is compared, to the last bit, with a vLLM that has no plug-in and a connector that does nothing.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM")

from tests.e2e.conftest import PATIENCE_S, wait_until
from tests.harness.passive_connector import PASSIVE
from tokencake import protocol
from tokencake_vllm.serve import SCHEDULER, connector_config

BLOCK = 32
LENGTHS = (10 * BLOCK - 9, 10 * BLOCK - 8, 10 * BLOCK, 10 * BLOCK + 1)
"""With the eight tokens of the answer they end inside a block, at its edge and behind it."""
STOCK = {
    "max_model_len": 1_024,
    "block_size": BLOCK,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 128,  # every prompt is computed in chunks
    "num_gpu_blocks_override": 100,
    "enforce_eager": True,
    "disable_log_stats": True,
}
ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CPU_ATTN_SPLIT_KV": "0",  # else the number of cores and what runs beside a request change its last digits
}


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENV, **values}.items():
            patch.setenv(name, value)
        yield


class OfflineEngine:
    """vLLM's `LLM`, with or without the plug-in; its engine core is a separate process."""

    def __init__(self, model: Path, *, is_stock: bool = False, options: Any = None, **time_settings: Any) -> None:
        from vllm import LLM

        stock = {"kv_transfer_config": PASSIVE}
        ours = {
            "scheduler_cls": SCHEDULER,
            "kv_transfer_config": connector_config(),
            "additional_config": {"tokencake": {"time": {"host_kv_gib": 0.05, **time_settings}}},
        }
        self.llm = LLM(str(model), **{**STOCK, **(stock if is_stock else ours), **(options or {})})
        self.made = 0
        self.is_closed = False

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self.llm.llm_engine.engine_core.shutdown()

    def rpc(self, method: str, *args: Any) -> Any:
        return self.llm.llm_engine.engine_core.call_utility("tokencake", method, args)

    def send_events(self, *events: Any) -> list[str]:
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

    def state(self) -> dict[str, Any]:
        return self.rpc("tokencake_state", None, None, 10_000)

    def call(self, name: str) -> dict[str, Any]:
        (found,) = [c for c in self.state()["calls"] if c["call"] == name]
        return found

    def kv(self, name: str) -> dict[str, Any]:
        return next(kv for s in self.state()["sessions"].values() for kv in s.get("kv", ()) if kv["call"] == name)

    def wait_for(self, name: str, place: str) -> None:
        wait_until(lambda: self.kv(name)[place] == self.kv(name)["blocks"], PATIENCE_S, f"{name} is {place}")

    def wipe(self) -> None:
        assert self.rpc("tokencake_wipe") > 50
        wait_until(lambda: self.state()["kv_blocks"]["uploading"] == 0, PATIENCE_S, "all is overwritten")


def prompt(seed: int, length: int) -> list[int]:
    return [(seed * 7_919 + place * 104_729) % 1_800 + 50 for place in range(length)]


def follow_up(tokens: list[int], answer: Any) -> list[int]:
    return [*tokens, *answer.outputs[0].token_ids, *prompt(1, 20)]


CROWD = [prompt(99, 5 * BLOCK) + prompt(100 + number, 90 + 17 * number) for number in range(4)]
"""Calls that share a prefix."""
OTHERS = [prompt(200 + number, 150) for number in range(2)]
"""Calls that run beside them. All are asked for one token: on a CPU with AMX a step of up to four tokens goes through
other kernels than a larger one, and which calls decode in one step depends on when their loads end."""


@pytest.fixture(scope="module")
def stock(tiny_model: Path) -> dict[Any, Any]:
    """What a vLLM without the plug-in answers, with the same blocks found in its prefix cache."""
    answers: dict[Any, Any] = {}
    with environment(VLLM_PLUGINS=""):
        engine = OfflineEngine(tiny_model, is_stock=True)
        for length in LENGTHS:
            tokens = prompt(length, length)
            (answers[length],) = engine.ask(tokens)
            engine.ask(follow_up(tokens, answers[length]))
            (answers[length, "follow-up"],) = engine.ask(follow_up(tokens, answers[length]))
        engine.ask(*CROWD, *OTHERS, max_tokens=1)
        answers["crowd"] = engine.ask(*CROWD, *OTHERS, max_tokens=1)
        answers["alone"] = [engine.ask(tokens)[0] for tokens in CROWD]
        engine.close()
    return answers


@pytest.fixture(scope="module")
def engine(tiny_model: Path, stock: dict[Any, Any]) -> Iterator[OfflineEngine]:
    with environment(VLLM_PLUGINS="tokencake"):
        running = OfflineEngine(tiny_model, debug_checksums=True)
        yield running
        running.close()


def logprobs(answer: Any) -> list[dict[int, float]]:
    return [{token: entry.logprob for token, entry in one.items()} for one in answer.outputs[0].logprobs]


def same(first: Any, second: Any) -> bool:
    """Text and logprobs, bit by bit."""
    return list(first.outputs[0].token_ids) == list(second.outputs[0].token_ids) and logprobs(first) == logprobs(second)


@pytest.mark.parametrize("length", LENGTHS)
def test_offloaded_and_uploaded_kv_gives_the_same_output(
    engine: OfflineEngine, stock: dict[Any, Any], length: int
) -> None:
    tokens = prompt(length, length)
    (first,) = engine.ask(tokens)
    assert same(first, stock[length])
    (warm,) = engine.ask(follow_up(tokens, first))  # the prefix is still on the device
    (again,) = engine.ask(tokens)
    assert same(first, again)
    name = f"c{engine.made}"
    engine.wait_for(name, "on_host")
    engine.wipe()
    assert engine.kv(name)["on_device"] == 0
    assert engine.send_events(
        protocol.ToolStart(name, "t", "build"), protocol.ToolEnd(name, "t", duration_s=600.0)
    ) == [
        "applied",
        "applied",
    ]
    engine.wait_for(name, "on_device")
    (after,) = engine.ask(follow_up(tokens, first))
    found = engine.call(f"c{engine.made}")["cached_tokens"]
    assert found["device"] == (length + 7) // BLOCK * BLOCK
    assert found["host"] <= BLOCK  # of the follow-up before, one block more
    assert same(after, warm)
    assert same(after, stock[length, "follow-up"])


def test_loaded_on_demand_beside_others_with_a_shared_prefix(engine: OfflineEngine, stock: dict[Any, Any]) -> None:
    engine.ask(*CROWD, *OTHERS, max_tokens=1)
    names = [f"c{engine.made - len(CROWD) - len(OTHERS) + 1 + number}" for number in range(len(CROWD))]
    for name in names:
        engine.wait_for(name, "on_host")
    engine.wipe()
    together = engine.ask(*CROWD, *OTHERS, max_tokens=1)
    assert [same(ours, other) for ours, other in zip(together, stock["crowd"], strict=True)] == [True] * len(together)
    hosts = [engine.call(f"c{engine.made - number}")["cached_tokens"]["host"] for number in range(len(together))]
    assert max(hosts) >= 5 * BLOCK
    engine.wipe()
    alone = [engine.ask(tokens)[0] for tokens in CROWD]
    assert [same(ours, other) for ours, other in zip(alone, stock["alone"], strict=True)] == [True] * len(alone)


def test_a_reset_clears_the_host_cache(engine: OfflineEngine) -> None:
    tokens = prompt(7, 200)
    (before,) = engine.ask(tokens)
    engine.wait_for(f"c{engine.made}", "on_host")
    assert engine.llm.reset_prefix_cache()
    (after,) = engine.ask(tokens)
    assert engine.call(f"c{engine.made}")["cached_tokens"] == {"device": 0, "host": 0}
    assert same(before, after)


def test_sleep_clears_the_host_cache_and_the_engine_wakes_up(engine: OfflineEngine) -> None:
    tokens = prompt(8, 200)
    (before,) = engine.ask(tokens)
    engine.wait_for(f"c{engine.made}", "on_host")
    engine.llm.llm_engine.sleep(level=1)
    assert engine.kv(f"c{engine.made}")["on_host"] == 0
    engine.llm.llm_engine.wake_up()
    (after,) = engine.ask(tokens)
    assert engine.call(f"c{engine.made}")["cached_tokens"] == {"device": 0, "host": 0}
    assert same(before, after)


def test_the_self_check_of_the_worker_was_told(engine: OfflineEngine) -> None:
    found = engine.state()["time"]
    assert found["off"] is None
    assert found["self_check"]["problem"] is None
    assert found["self_check"]["blocks"] > 0


def test_no_error_was_contained(engine: OfflineEngine) -> None:
    counts = {tuple(key): count for key, count in engine.rpc("tokencake_metrics")["counts"]}
    assert counts.get(("errors",), 0) == 0
    assert not any(key[0] == "kv_copy_failures" for key in counts)
    assert counts["kv_uploads", "used"] >= 2


def naps(pid: int) -> int:
    """How often the process' main thread has gone to sleep: a count that a slow machine does not change."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *children(int(child))]
    return found


def engine_core() -> int:
    """The newest child is the worker, the one before it the engine core."""
    return sorted(children(os.getpid()))[-2]


def test_an_idle_engine_with_stalled_agents_and_timers_sleeps(engine: OfflineEngine) -> None:
    for number in range(4):
        engine.ask(prompt(number, 100), expects=600.0)
        engine.send_events(protocol.ToolStart(f"c{engine.made}", "t", "build", estimate_s=600.0))
    for number in range(4):
        engine.wait_for(f"c{engine.made - number}", "on_host")
    core = engine_core()
    before = naps(core)
    time.sleep(5)
    assert naps(core) - before < 50  # a loop that looks for work every millisecond has some thousands


def test_a_timer_wakes_an_idle_engine(engine: OfflineEngine) -> None:
    tokens = prompt(50, 200)
    engine.ask(tokens)
    name = f"c{engine.made}"
    engine.wait_for(name, "on_host")
    engine.wipe()
    engine.send_events(protocol.ToolStart(name, "t", "nap", estimate_s=6.0))
    core = engine_core()
    time.sleep(1)  # the answer is sent, the loop waits again
    before = naps(core)
    wait_until(lambda: naps(core) > before + 2, PATIENCE_S, "the engine wakes, although no RPC comes")
    engine.wait_for(name, "on_device")


def test_two_ranks_move_their_parts_of_each_block(tiny_model: Path, engine: OfflineEngine) -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("binds two ranks to cores of the CPU")
    cores = sorted(os.sched_getaffinity(0))  # one core is enough for both
    engine.close()  # the last test here: both ranks want its cores
    with environment(VLLM_PLUGINS="tokencake", VLLM_CPU_OMP_THREADS_BIND=f"{cores[0]}|{cores[-1]}"):
        ranks = OfflineEngine(tiny_model, options={"tensor_parallel_size": 2}, debug_checksums=True)
        tokens = prompt(320, 320)
        ranks.ask(tokens)
        (warm,) = ranks.ask(tokens)
        name = f"c{ranks.made}"
        ranks.wait_for(name, "on_host")
        ranks.wipe()
        ranks.send_events(protocol.ToolStart(name, "t", "build"), protocol.ToolEnd(name, "t", duration_s=600.0))
        ranks.wait_for(name, "on_device")
        (uploaded,) = ranks.ask(tokens)
        assert ranks.call(f"c{ranks.made}")["cached_tokens"] == {"device": 9 * BLOCK, "host": 0}
        ranks.wait_for(f"c{ranks.made}", "on_host")
        ranks.wipe()
        (loaded,) = ranks.ask(tokens)
        assert ranks.call(f"c{ranks.made}")["cached_tokens"] == {"device": 0, "host": 9 * BLOCK}
        assert same(uploaded, warm)
        assert same(loaded, warm)
        counts = {tuple(key): count for key, count in ranks.rpc("tokencake_metrics")["counts"]}
        assert counts.get(("errors",), 0) == 0
        assert not any(key[0] == "kv_copy_failures" for key in counts)
        ranks.close()
