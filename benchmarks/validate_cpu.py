"""Validation of the simulator against a real vLLM on this CPU.

One workload runs through vLLM itself (its engine in this process, a model of SmolLM2-135M's shape with random weights)
and through the simulator, whose rates were fitted to another workload just before. Compared are the prefix hits of
every call, which must be equal, and the makespan.

Time is the processor time of this process: vLLM computes in one thread, a step takes what the processor spent on it,
and a tool takes what the workload says. So other work on the machine slows the run down and hardly changes the result.

python benchmarks/validate_cpu.py [--json FILE] [--steps FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokencake_sim import PROFILES, App, Node, Prefix, RunOptions, Tool, Workload, policy_named, simulate
from tokencake_sim.capture.calibrate import MeasuredStep, fit, mean_error
from tokencake_sim.clients.applications import Applications
from tokencake_sim.device.clock import Clock
from tokencake_sim.device.cost import StepLoad
from tokencake_sim.engine.build import quiet_vllm
from tokencake_sim.errors import DeadlockError
from tokencake_sim.workload.tokens import token_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokencake.protocol import Event, Hint
    from tokencake_sim.clients.calls import SimCall
    from tokencake_sim.device.profiles import Profile

PROFILE = PROFILES["cpu-smollm2-135m"]
RESULT = Path(__file__).resolve().parent / "results" / "validate_cpu.json"
MAKESPAN_TOLERANCE = 0.20
SEEDS = (2, 3, 4, 5, 6, 7)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "vocab_size": PROFILE.model.vocabulary,
    "max_position_embeddings": PROFILE.max_model_len,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def small_workload(seed: int) -> Workload:
    """A few applications with tools, a fork and a join, in contexts that this CPU can bear."""
    draw = random.Random(seed)  # noqa: S311  repeatable, not secret
    apps = []
    for index in range(4):
        first = Node(
            "plan",
            "plan",
            draw.randint(150, 400),
            24,
            prefix=Prefix(f"rules-{seed}", 128),
            tool=Tool("search", 0.8, 60),
        )
        forks = [
            Node(f"code_{n}", "code", draw.randint(20, 60), 32, ("plan",), tool=Tool("test", 0.4 + n, 50))
            for n in (1, 2)
        ]
        last = Node("merge", "merge", 20, 24, ("code_1", "code_2"))
        apps.append(App(f"v{seed}-{index}", "small", 1.5 * index, (first, *forks, last)))
    return Workload(f"small-{seed}", tuple(apps), "benchmarks/validate_cpu.py")


class RealEngine:
    """vLLM in this process, seen by the applications as the simulated one is."""

    def __init__(self, model: Path) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine core in this process, where it can be watched
        os.environ["OMP_NUM_THREADS"] = "1"  # threads that wait for each other would spend processor time on it
        from vllm import EngineArgs, LLMEngine  # noqa: PLC0415  slow, and wants the environment set first

        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(model),
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype="bfloat16",
                enforce_eager=True,
                gpu_memory_utilization=0.3,  # of all memory, reserved on a CPU too; the default is nearly all
                block_size=PROFILE.block_tokens,
                num_gpu_blocks_override=PROFILE.kv_blocks,
                max_model_len=PROFILE.max_model_len,
                max_num_batched_tokens=PROFILE.max_batched_tokens,
                max_num_seqs=PROFILE.max_seqs,
                enable_prefix_caching=True,
            )
        )
        self.steps: list[MeasuredStep] = []
        self.hits: dict[str, int] = {}
        self._answers: dict[str, list[int]] = {}
        self._calls: dict[str, SimCall] = {}
        self._load = StepLoad(0, 0, 0)
        self._watch()

    def _watch(self) -> None:
        from tokencake_vllm.step_log import describe_step  # noqa: PLC0415  imports vLLM, which wants the environment set

        scheduler: Any = self._engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]  # in this process
        schedule = scheduler.schedule

        def watched_schedule(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            step = describe_step(scheduler, output)
            self._load = StepLoad(step.prefill_tokens, step.decode_seqs, step.kv_tokens_read)
            return output

        scheduler.schedule = watched_schedule

    def submit(self, call: SimCall, hint: Hint | None) -> None:
        """Take a call; its prompt holds what the model has really answered before."""
        del hint
        from vllm import SamplingParams  # noqa: PLC0415  as above

        ids: list[int] = []
        for chunk in call.texts.prompt:
            ids += self._answers.get(chunk.key) or token_ids(chunk, PROFILE.model.vocabulary)
        self._calls[call.id] = call
        self._engine.add_request(
            call.id,
            {"prompt_token_ids": ids},
            SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=len(call.answer), detokenize=False),
        )

    def send(self, event: Event) -> None:
        """Stock vLLM hears no events."""

    def run(self, workload: Workload) -> float:
        """Run `workload`, a second of processor time being a second; returns its makespan."""
        from vllm import RequestOutput  # noqa: PLC0415  as above

        clock = Clock()
        applications = Applications(workload, clock, self, PROFILE.model.vocabulary, lambda _app, _node: None)
        while not applications.is_over:
            if not self._engine.has_unfinished_requests():
                if clock.next_s is None:
                    raise DeadlockError(f"{workload.name} is not over and nothing will happen")
                clock.advance_to(clock.next_s)
                continue
            began_s = time.process_time()
            outputs = self._engine.step()
            seconds = time.process_time() - began_s
            if self._load.prefill_tokens or self._load.decode_seqs:
                self.steps.append(MeasuredStep(self._load, seconds))
            clock.advance_to(clock.now_s + seconds)
            for output in outputs:
                if output.finished and isinstance(output, RequestOutput):
                    call = self._calls.pop(output.request_id)
                    self.hits[call.id] = output.num_cached_tokens or 0
                    if call.texts.answer is not None:
                        self._answers[call.texts.answer.key] = list(output.outputs[0].token_ids)
                    call.finished_s = clock.now_s
                    applications.take_answer(call)
        return clock.now_s


def compare(real: RealEngine, profile: Profile, seed: int) -> dict[str, Any]:
    """One workload through both."""
    workload = small_workload(seed)
    began_s, before = time.perf_counter(), len(real.steps)
    real_s = real.run(workload)
    wall_s = time.perf_counter() - began_s
    result = simulate(workload, profile, policy_named("stock"), RunOptions())
    hits = {f"{call['app']}/{call['node']}": call["device_hit_tokens"] for call in result.timeline["calls"]}
    simulated_s = result.metrics["makespan_s"]
    return {
        "calls": len(hits),
        "calls_with_other_hits": {
            name: (real.hits[name], hits[name]) for name in hits if real.hits[name] != hits[name]
        },
        "hit_tokens": sum(hits.values()),
        "real_makespan_s": real_s,
        "processor_s_per_s": sum(step.seconds for step in real.steps[before:]) / wall_s,
        "simulated_makespan_s": simulated_s,
        "makespan_error": simulated_s / real_s - 1,
    }


def main(argv: Sequence[str]) -> int:
    """Run both, print what differs; 0 where they agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULT, help="write the comparison there")
    parser.add_argument("--steps", type=Path, help="write the measured steps there, for `tokencake sim calibrate`")
    arguments = parser.parse_args(argv)
    quiet_vllm()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        real = RealEngine(Path(folder))
        real.run(small_workload(0))  # first steps are slow: memory is touched for the first time
        real.steps.clear()
        real.run(small_workload(1))
        steps = list(real.steps)
        profile = fit(steps, PROFILE)
        if arguments.steps is not None:
            lines = (json.dumps({**asdict(step.load), "seconds": step.seconds}) for step in steps)
            arguments.steps.write_text("\n".join(lines) + "\n", encoding="utf-8")
        runs = [compare(real, profile, seed) for seed in SEEDS]
    errors = [run["makespan_error"] for run in runs]
    comparison = {
        "runs": runs,
        "mean_makespan_error": statistics.mean(errors),
        "largest_makespan_error": max(errors, key=abs),
        "fitted": {name: getattr(profile, name) for name in ("fixed_s", "prefill_tokens_per_s", "memory_bytes_per_s")},
        "mean_step_error": mean_error(steps, profile),
    }
    text = json.dumps(comparison, indent=1)
    print(text)
    arguments.json.write_text(text + "\n", encoding="utf-8")
    has_other_hits = any(run["calls_with_other_hits"] for run in runs)
    return int(has_other_hits or any(abs(error) > MAKESPAN_TOLERANCE for error in errors))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
