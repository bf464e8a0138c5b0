"""Delay of a step while KV is copied beside it on a CPU.

    python benchmarks/copy_delay.py [--steps N]

Steps of about 20 ms that read a model's worth of weights with all cores, as decoding does; blocks of 256 KiB that are
stored without end by the copier of the Time Scheduler. Steps without copies, with paced copies and with copies at full
speed take turns, so that other load on the machine meets all three. Ratios count.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "engine")]

from tokencake_vllm.transfer.block_memory import block_views, host_rows  # noqa: E402  # the path comes first
from tokencake_vllm.transfer.checksums import Checksums  # noqa: E402
from tokencake_vllm.transfer.jobs import TransferJob  # noqa: E402
from tokencake_vllm.transfer.thread_copier import ThreadCopier  # noqa: E402

BLOCKS, BLOCK_WORDS, WIDTH, LAYERS = 200, 64 * 1_024, 1_024, 24


def step_s(weights: list[torch.Tensor], state: torch.Tensor) -> float:
    """One step, in seconds."""
    began = time.perf_counter()
    for weight in weights:
        state = torch.tanh(state @ weight)
    return time.perf_counter() - began


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of each kind")
    options = parser.parse_args()
    views = block_views({"layer": torch.zeros(BLOCKS, 1, 1, BLOCK_WORDS)}, BLOCKS)
    copier = ThreadCopier(views, host_rows(views, BLOCKS), checksums=Checksums(0, BLOCKS))
    weights = [torch.randn(WIDTH, WIDTH) / WIDTH**0.5 for _ in range(LAYERS)]
    state = torch.randn(32, WIDTH)
    ids, everything = itertools.count(1), tuple(range(BLOCKS))
    found: dict[str, list[float]] = {"no copy": [], "paced": [], "full speed": []}
    copied_s = 0.0
    for _ in range(10):
        step_s(weights, state)
    for _ in range(options.steps):
        for kind, seconds in found.items():
            copier.pace(is_computing=kind == "paced", urgent=())
            if kind != "no copy":
                copier.start(TransferJob(next(ids), "store", everything, everything))
            seconds.append(step_s(weights, state))
            copier.pace(is_computing=False, urgent=())
            while kind != "no copy" and not (done := copier.finished()):
                time.sleep(0.0005)
            if kind == "full speed":
                copied_s += sum(each.seconds for each in done)
    copier.close()
    alone = found["no copy"]
    print(f"{'':12}{'mean ms':>10}{'median ms':>11}{'ratio':>8}{'of medians':>12}")
    for kind, seconds in found.items():
        mean, median = statistics.fmean(seconds), statistics.median(seconds)
        ratios = mean / statistics.fmean(alone), median / statistics.median(alone)
        print(f"{kind:12}{mean * 1e3:10.2f}{median * 1e3:11.2f}{ratios[0]:8.3f}{ratios[1]:12.3f}")
    rate = BLOCKS * BLOCK_WORDS * 4 * options.steps / copied_s
    print(f"full speed copies {rate / 1e9:.1f} GB/s on one thread")
    return 0


if __name__ == "__main__":
    sys.exit(main())
