"""Overhead of the plug-in for a scheduler step, with 64 running calls, 200 waiting and 500 stalled sessions.

    python benchmarks/step_cost.py

vLLM's own scheduler and ours take turns in this process, without a model: the ratio is what counts, the microseconds
are this machine's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "proxy")]

from tests.harness.scheduler import build_scheduler, make_request  # noqa: E402  # the path comes first
from tokencake import protocol  # noqa: E402

RUNNING, WAITING, STALLED = 64, 200, 500
PROMPT, BLOCKS = 400, 2_200


def prompt(number: int) -> list[int]:
    """A prompt of its own, after a prefix that all share."""
    return [1] * 64 + [(number * 31 + place) % 1_500 + 10 for place in range(PROMPT - 64)]


class Subject:
    """One scheduler in the state to be measured."""

    def __init__(self, *, is_ours: bool) -> None:
        from vllm.v1.core.sched.scheduler import Scheduler  # noqa: PLC0415  # heavy

        # Room for the running calls only; their growth fits, the waiting ones do not.
        self.scheduler = build_scheduler(
            None if is_ours else Scheduler,
            num_blocks=BLOCKS,
            host_blocks=20_000 if is_ours else None,
            max_tokens_per_step=8_192,
            max_seqs=RUNNING,
            space={"enabled": False},
        )
        self.is_ours = is_ours
        for number in range(STALLED):
            self._add(number, "build")
            self._step(100)
        for number in range(STALLED, STALLED + RUNNING + WAITING):
            self._add(number, "build", tokens=2_000)
        for _ in range(8):
            self._step(0)

    def _add(self, number: int, tool: str, tokens: int = 2) -> None:
        hint = protocol.Hint(
            session=f"s{number}", call=f"c{number}", agent="a", reuse="extends", expects_tools={tool: 600.0}
        )
        self.scheduler.add_request(make_request(f"r{number}", prompt(number), hint.to_json(), tokens))

    def _step(self, until_idle: int) -> None:
        self.step()
        for _ in range(until_idle):
            if not self.scheduler.has_requests():
                return
            self.step()

    def step(self) -> tuple[float, float]:
        """Seconds of `schedule` and of `update_from_output`."""
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput  # noqa: PLC0415  # heavy

        began = time.perf_counter()
        output = self.scheduler.schedule()
        scheduled = time.perf_counter()
        ids = list(output.num_scheduled_tokens)
        requests = [self.scheduler.requests[name] for name in ids]
        made = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={name: index for index, name in enumerate(ids)},
            sampled_token_ids=[[7] if r.num_computed_tokens >= r.num_tokens else [] for r in requests],
            kv_connector_output=_reports(output, KVConnectorOutput) if self.is_ours else None,
        )
        answered = time.perf_counter()
        self.scheduler.update_from_output(output, made)
        return scheduled - began, time.perf_counter() - answered


def _reports(output: Any, kind: Any) -> Any:
    from tokencake_vllm.transfer.step_messages import StepReports  # noqa: PLC0415  # heavy

    jobs = output.kv_connector_metadata.jobs
    loads = {job.request for job in jobs if job.request is not None}
    done = {job.id: (1, 1e-3, True) for job in jobs}
    return kind(finished_recving=loads or None, kv_connector_worker_meta=StepReports(done) if done else None)


def main() -> int:
    """Print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="steps of each, in turns of 20")
    options = parser.parse_args()
    subjects = {"stock": Subject(is_ours=False), "ours": Subject(is_ours=True)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in subjects}
    for _ in range(options.steps // 20):
        for name, subject in subjects.items():
            times[name] += [subject.step() for _ in range(20)]
    for name, subject in subjects.items():
        scheduler = subject.scheduler
        print(f"{name:6} {len(scheduler.running)} running, {len(scheduler.waiting)} waiting", end="")
        print(f", {len(scheduler.offload.stalls.prefixes.by_id)} chains" if subject.is_ours else "")
    print(f"{'':10}{'schedule':>12}{'update':>12}{'step':>12}   microseconds, median")
    medians = {}
    for name, pairs in times.items():
        columns = [
            statistics.median(pair[0] for pair in pairs),
            statistics.median(pair[1] for pair in pairs),
            statistics.median(sum(pair) for pair in pairs),
        ]
        medians[name] = columns
        print(f"{name:10}" + "".join(f"{seconds * 1e6:12.0f}" for seconds in columns))
    ratios = [ours / stock for ours, stock in zip(medians["ours"], medians["stock"], strict=True)]
    print(f"{'ratio':10}" + "".join(f"{ratio:12.2f}" for ratio in ratios))
    return 0


if __name__ == "__main__":
    sys.exit(main())
