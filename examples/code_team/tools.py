"""The programmers' tools: search the standard library's documentation, write a file, run its unit tests.

The tools do real work: they read hundreds of modules, write a file to disk and run the tests in a new Python process.
Only the start of a build machine is simulated, by a sleep. Each programmer has its own scratch folder and cannot name a
file outside it.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Annotated, Final

from langchain_core.tools import BaseTool, tool
from pydantic import Field

BUILD_MACHINE_S: Final = 8.0
_TIME_LIMIT_S: Final = 10
_MEMORY_LIMIT_BYTES: Final = 1 << 30
_FILE_LIMIT_BYTES: Final = 1 << 20
_HITS: Final = 6
_READ_CHARS: Final = 3_000
_WORD: Final = re.compile(r"[a-z]{3,}")
_DOCUMENTED: Final = re.compile(r'(?:def|class) (?P<name>\w+)[^\n]*:\n\s+r?"""(?P<doc>\s*\S[^"]{0,2000})"""')
_TESTS: Final = """
import importlib.util, pathlib, unittest

class ModuleTest(unittest.TestCase):
    def test_every_module_imports(self):
        for path in pathlib.Path(".").glob("*.py"):
            spec = importlib.util.spec_from_file_location(path.stem, path)
            spec.loader.exec_module(importlib.util.module_from_spec(spec))

unittest.main(verbosity=1)
"""


def programmer_tools(scratch: Path) -> list[BaseTool]:
    """The three tools, bound to the folder `scratch`."""

    @tool
    def search_docs(query: Annotated[str, Field(max_length=60)]) -> str:
        """Search the documentation of the Python standard library."""
        return _search(query)

    @tool
    def write_file(name: Annotated[str, Field(max_length=20)], content: Annotated[str, Field(max_length=240)]) -> str:
        """Write a Python module into the project."""
        if not re.fullmatch(r"[A-Za-z_]\w{0,40}(\.py)?", name):
            return f"error: {name!r} is not a module name"
        path = scratch / (name if name.endswith(".py") else f"{name}.py")
        with path.open("w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return f"wrote {path.name}, {len(content)} characters"

    @tool
    def run_tests() -> str:
        """Run the unit tests of the project on a build machine."""
        time.sleep(BUILD_MACHINE_S)
        return _run_tests(scratch)

    return [search_docs, write_file, run_tests]


def _search(query: str) -> str:
    """The docstrings that share the most words with `query`, shortened to a readable length."""
    words = set(_WORD.findall(query.lower()))
    found: list[tuple[int, str]] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for match in _DOCUMENTED.finditer(path.read_text(encoding="utf-8", errors="replace")):
            name, doc = f"{path.stem}.{match['name']}", match["doc"]
            if score := len(words.intersection(_WORD.findall(f"{name} {doc}".lower()))):
                found.append((score, f"{name}: {' '.join(doc.split())}"))
    best = [text for _, text in sorted(found, key=lambda hit: (-hit[0], hit[1]))[:_HITS]]
    return "\n\n".join(best)[:_READ_CHARS] or "nothing found"


def _run_tests(scratch: Path) -> str:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (_TIME_LIMIT_S, _TIME_LIMIT_S))
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT_BYTES, _MEMORY_LIMIT_BYTES))
        resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_LIMIT_BYTES, _FILE_LIMIT_BYTES))

    try:
        result = subprocess.run(  # noqa: S603  # the model's code, in its own folder, under limits
            [sys.executable, "-I", "-c", _TESTS],
            cwd=scratch,
            env={"PATH": os.defpath},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIME_LIMIT_S,
            preexec_fn=limit,  # sets limits only
        )
    except subprocess.TimeoutExpired:
        return f"the tests did not end within {_TIME_LIMIT_S} s"
    return "\n".join(result.stderr.splitlines()[-4:])[-400:]
