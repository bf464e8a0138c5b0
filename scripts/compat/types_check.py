"""mypy on TokenCake's packages with the sources of one vLLM version."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

from scripts.compat.compare import Difference
from scripts.compat.uses import SourceLine

BREAKS: Final = {
    "attr-defined",
    "call-arg",
    "call-overload",
    "misc",
    "override",
    "abstract",
    "import-not-found",
    "union-attr",
}
"""Error codes that mean a failure at run time; other findings are differences between types."""
_LINE: Final = re.compile(r"^(?P<file>[^:]+):(?P<line>\d+): error: (?P<text>.*?)\s+\[(?P<code>[\w-]+)\]$")
_CONFIG: Final = """[mypy]
strict = true
warn_unused_ignores = false
explicit_package_bases = true
mypy_path = {path}
[mypy-vllm.*]
follow_imports = silent
ignore_errors = true
"""


def differences(root: Path, sources: Path, cache: Path) -> list[Difference]:
    """Failures that mypy finds in `root/engine` with the vLLM below `sources`.

    Raises:
        RuntimeError: mypy itself failed.
    """
    cache.mkdir(parents=True, exist_ok=True)
    config = cache / "mypy.ini"
    path = ":".join(str(folder) for folder in (sources, root / "engine"))
    config.write_text(_CONFIG.format(path=path))
    command = [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir", str(cache), "engine"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    if ran.returncode not in (0, 1):
        raise RuntimeError(f"mypy failed: {(ran.stderr or ran.stdout).strip()[-500:]}")
    lines = [found for line in ran.stdout.splitlines() if (found := _LINE.match(line))]
    return [
        Difference(SourceLine(found["file"], int(found["line"])), "types", f"{found['text']} [{found['code']}]")
        for found in lines
        if found["code"] in BREAKS
    ]
