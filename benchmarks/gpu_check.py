"""Check of the copies between an NVIDIA GPU and host memory: right bytes, right order, rates.

    python benchmarks/gpu_check.py [--vllm] [--native FOLDER]     on a machine with torch and CUDA, from a bare checkout
    python benchmarks/gpu_check.py --paper [--vllm]               the same logic on a CPU, without the timings

Prints one JSON object for each check and a verdict. The exit status is 0, 1 for a fault (wrong bytes, a wrong order, a
check that broke), or 2 where only figures are beyond their limits. Checks called `control` have a fault built in, which
they must find.

Without `--vllm`: the copies alone, for which vLLM need not be installed. With it: a real vLLM too, stock against ours.
`--native` names a folder with `cuda_mem_ops.py` of a vLLM wheel, to compare with where vLLM is not installed.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "engine")]

from benchmarks.gpu import stand_ins  # noqa: E402  # the path comes first
from benchmarks.gpu.report import Report  # noqa: E402


def check_copies(report: Report, options: argparse.Namespace) -> None:
    """The copies alone."""
    import torch  # noqa: PLC0415  # after vLLM's processes are forked

    from benchmarks.gpu import exactness, kv_caches, worlds  # noqa: PLC0415  # they import what `stand_ins` makes
    from tokencake_vllm.transfer import copy_lane  # noqa: PLC0415  # as above

    if not (options.paper or torch.cuda.is_available()):
        raise SystemExit("there is no CUDA device; --paper checks the logic without one")
    draw = random.Random(options.seed)  # noqa: S311  # repeatable, not secret
    kind: type[worlds.Gpu | worlds.Paper] = worlds.Paper if options.paper else worlds.Gpu
    if options.paper:
        copy_lane.STAGING_BYTES = 5 * kv_caches.SMALL.row_bytes  # type: ignore[misc]  # jobs of several pieces
    report.attempt(exactness.layouts, kind(draw))
    report.attempt(exactness.order, kind, draw, 10 if options.paper else 40)
    report.attempt(exactness.soak, kind(draw), 100 if options.paper else 1_500)
    if options.paper:
        return
    from benchmarks.gpu import interference, speed  # noqa: PLC0415  # as above

    gpu = worlds.Gpu(draw)
    native, why = stand_ins.native_copies(options.native)
    report.tell("machine", None, torch=torch.__version__, device=torch.cuda.get_device_name(0), native=why)
    report.attempt(speed.rates, gpu, native)
    report.attempt(interference.slowdown, gpu, native)
    report.attempt(interference.sampled_tokens, gpu)
    report.attempt(speed.urgent_load, gpu)
    report.attempt(speed.pinning, gpu)
    report.attempt(exactness.behind_a_graph, gpu)
    report.attempt(exactness.failed_pin, gpu)  # last: what it leaves is what it is about


def main() -> int:
    """Run the checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true", help="on a CPU")
    parser.add_argument("--vllm", action="store_true", help="a real vLLM too")
    parser.add_argument("--no-copies", action="store_true", help="the real vLLM only")
    parser.add_argument("--native", type=Path, help="folder with vLLM's cuda_mem_ops.py")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.no_copies and not options.vllm:
        parser.error("--no-copies: this leaves nothing to check; add --vllm")
    report = Report()
    if not stand_ins.has_vllm():
        if options.vllm:
            parser.error("--vllm: there is no vLLM here; install one, or leave the flag out")
        stand_ins.install()
    if options.vllm:
        from benchmarks.gpu.real_vllm import check_vllm  # noqa: PLC0415  # it imports vLLM

        check_vllm(report, is_cpu=options.paper)
    if not options.no_copies:
        check_copies(report, options)
    return report.verdict()


if __name__ == "__main__":
    sys.exit(main())
