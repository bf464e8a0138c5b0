"""The command line: `python -m scripts.compat [--installed]`.

Exit status: 0 if everything is present, 1 if something is missing, 2 if there is nothing to compare with.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from scripts.compat.compare import Difference, Reading, read, removed
from scripts.compat.sources import Sources, members
from scripts.compat.types_check import differences as type_differences
from scripts.compat.uses import Uses, uses_of
from scripts.compat.wheels import DISTRIBUTIONS, Release, WheelError, cached, released, unpacked, wanted

ROOT: Final = Path(__file__).resolve().parents[2]
CACHE: Final = ROOT / ".cache" / "compat"
SOURCE_FOLDERS: Final = {
    "engine": "engine",
    "proxy": "proxy",
    "examples": "examples",
    "benchmarks": "",
    "tests": "",
    "scripts": "",
}
"""Folder of TokenCake's sources -> the folder, below the root, that contains its packages."""
PACKAGE: Final = "vllm"


class OwnSources:
    """TokenCake's sources, and the names that they use of vLLM."""

    def __init__(self, root: Path, places: dict[str, str], package: str) -> None:
        self.package, self.files, self.roots = package, {}, {}
        for folder, base in places.items():
            for file in sorted((root / folder).rglob("*.py")):
                parts = file.relative_to(root / base).with_suffix("").parts
                module = ".".join(parts).removesuffix(".__init__")
                self.files[module] = str(file.relative_to(root))
                self.roots[parts[0]] = root / base
        self.sources = Sources(self.roots)
        modules = {name: self.sources.module(name) for name in self.files}
        self.uses: Uses = uses_of([(found, self.files[name]) for name, found in modules.items() if found], package)

    def read(self, folder: Path) -> Reading:
        """Compare with the vLLM below `folder`."""
        return read(self.uses, Sources({**self.roots, self.package: folder}), self.package, self.files)

    @property
    def known(self) -> set[str]:
        """Attributes of TokenCake's own classes and of Python's types."""
        ours = {name for cls in self.uses.classes for name in members(cls)}
        return ours.union(*(dir(kind) for kind in (dict, list, set, str, bytes, tuple, int, float, deque, Path)))


def installed() -> tuple[Release, Path]:
    """The vLLM of this Python, found without importing it.

    Raises:
        WheelError: vLLM is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise WheelError("vLLM is not installed: pip install 'tokencake[vllm]', or run without --installed")
    for name in DISTRIBUTIONS:
        try:
            return Release(name, version(name)), Path(spec.origin).parents[1]
        except PackageNotFoundError:
            continue
    return Release(PACKAGE, "of unknown version"), Path(spec.origin).parents[1]


def choose(cache: Path) -> list[Release]:
    """The releases to compare: those of the package index, else those in the cache."""
    from tokencake import SUPPORTED_VLLM  # noqa: PLC0415  # the path is set first

    try:
        return wanted([one for name in DISTRIBUTIONS for one in released(name)], *SUPPORTED_VLLM)
    except WheelError as error:
        print(f"{error}; comparing with what is in {cache}", file=sys.stderr)
        if not (left := wanted(cached(cache), *SUPPORTED_VLLM)):
            raise
        return left


def report(release: Release, reading: Reading, found: list[Difference]) -> bool:
    """Print the result for one version; returns whether nothing differs."""
    print(f"{release}: {reading.imports} imported names, {len(reading.overridden)} overridden methods", end="")
    print(", all present" if not found else f", {len(found)} differences")
    for difference in found:
        print(f"  {difference}")
    return not found


def main(argv: list[str] | None = None) -> int:
    """Compare, and print the differences; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m scripts.compat", description="Compare with vLLM's sources.")
    parser.add_argument("--installed", action="store_true", help="with the installed vLLM only, offline")
    arguments = parser.parse_args(argv)
    ours = OwnSources(ROOT, SOURCE_FOLDERS, PACKAGE)
    try:
        if arguments.installed:
            release, folder = installed()
            reading = ours.read(folder)
            return 0 if report(release, reading, reading.differences) else 1
        folders = {release: unpacked(release, CACHE) for release in choose(CACHE)}
    except WheelError as error:
        print(error, file=sys.stderr)
        return 2
    readings = {release: ours.read(folder) for release, folder in folders.items()}
    is_whole, older = True, None
    for release, reading in readings.items():
        found = [*reading.differences, *([] if older is None else removed(older, reading, ours.uses, ours.known))]
        found += type_differences(ROOT, folders[release], CACHE / f"mypy-{release.folder}")
        is_whole &= report(release, reading, found)
        older = reading
    return 0 if is_whole else 1


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "engine"))
    sys.exit(main())
