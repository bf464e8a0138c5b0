"""A real vLLM on this machine, stock against ours: the same answers, and the first token after a tool."""

from __future__ import annotations

import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Final

ENVIRONMENT: Final = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Among them: what keeps this process from touching CUDA before it forks, and vLLM from reaching for a network."""
os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)

import torch  # noqa: E402  # after the environment is set
import vllm  # noqa: E402  # as above
import vllm.v1.engine.core  # noqa: E402  # once, before the engines are forked

from benchmarks.gpu import answers, first_token, models, processes  # noqa: E402  # as above
from benchmarks.gpu.report import Report  # noqa: E402  # as above


def check_vllm(report: Report, *, is_cpu: bool) -> None:
    """Answers, then times."""
    report.tell("vLLM", None, version=vllm.__version__, torch=torch.__version__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write = partial(_write_models, folder=folder, is_cpu=is_cpu)
        paths = processes.run(report, {"models": write}, folder).get("models")
        if paths is None:
            return
        small, large = paths
        answers.check(report, small, folder, is_cpu=is_cpu)
        first_token.check(report, large, folder, is_cpu=is_cpu)


def _write_models(report: Report, folder: Path, *, is_cpu: bool) -> tuple[Path, Path]:  # noqa: ARG001  # a work
    small = models.write_model(folder / "small", models.TINY if is_cpu else models.SMALL)
    return small, models.write_config(folder / "large", models.TINY if is_cpu else models.SEVEN_B)
