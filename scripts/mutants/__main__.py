"""The command line of the mutation test, its sample and its runs of the tests."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any, Final

import coverage
import hypothesis
import pytest
from cosmic_ray.mutating import mutate_code

from scripts import mutants
from scripts.mutants.changes import Mutant, mutants_of

ROOT: Final = Path(__file__).resolve().parents[2]
CORE: Final = ("**/*.py",)
PLUGIN: Final = (
    *("vllm_adapter/block_accounting.py", "vllm_adapter/block_pool.py", "vllm_adapter/block_view.py"),
    *("vllm_adapter/requests.py", "space_scheduler/admission_gate.py", "space_scheduler/ranked_queue.py"),
    *("space_scheduler/swap.py", "time_scheduler/free_queue.py", "time_scheduler/policy_inputs.py"),
    *("time_scheduler/uploads.py", "time_scheduler/wakeup.py", "transfer/host_cache.py", "transfer/in_flight.py"),
    "step_clock.py",
)
"""What decides; not what moves memory or answers requests."""
PYTEST_PLUGINS: Final = ("pytest_asyncio.plugin", "pytest_timeout", "_hypothesis_pytestplugin")
VLLM: Final = ("vllm.v1.core.sched.async_scheduler", "vllm.v1.structured_output", "transformers")
BUDGET_S: Final = 30
"""Seconds of tests for one mutant, the fastest tests first."""


class Recorder:
    """A pytest plug-in: the lines that each test runs, and its time."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._measured = coverage.Coverage(data_file=None, config_file=False, include=["engine/*"])
        self._measured.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins."""
        self._measured.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test, or its set-up, has ended."""
        if report.when == "call" and report.passed:
            self.seconds[report.nodeid] = report.duration

    def tests_by_line(self) -> dict[str, dict[int, list[str]]]:
        """By file and line; "" stands for an import."""
        self._measured.stop()
        data = self._measured.get_data()
        return {os.path.relpath(name): data.contexts_by_lineno(name) for name in data.measured_files()}


class Only:
    """A pytest plug-in: run these tests, in this order."""

    def __init__(self, tests: list[str]) -> None:
        self._places = {test: place for place, test in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave the others out."""
        items[:] = sorted((i for i in items if i.nodeid in self._places), key=lambda i: self._places[i.nodeid])


def passes(paths: list[str], plugin: object, cpu_s: int, *options: str) -> bool:
    """Whether the tests pass within that CPU time, in a fork that need not import what is heavy."""
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    code = 1
    try:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
        always = ("-q", "-pno:cacheprovider", "--hypothesis-profile=mutants", "--timeout=120")
        plugins = [*map(importlib.import_module, PYTEST_PLUGINS), plugin]
        code = int(pytest.main([*always, *options, *paths], plugins=plugins))
        if isinstance(plugin, Recorder):
            Path("recorded.json").write_text(json.dumps([plugin.seconds, plugin.tests_by_line()]), encoding="utf-8")
    finally:
        os._exit(code)


def is_killed(mutant: Mutant, seconds: dict[str, float], tests_by_line: dict[str, Any]) -> bool:
    """Whether a test notices the mutant, which stands in its file now."""
    by_line = tests_by_line.get(mutant.path, {})
    tests = {test for line in mutant.lines for test in by_line.get(str(line), ())}
    if "" in tests:  # what runs at import may matter to all that use the file
        tests = {test for found in by_line.values() for test in found}
    ordered = sorted(tests & set(seconds), key=seconds.__getitem__)
    while (total_s := sum(seconds[test] for test in ordered)) > BUDGET_S:
        ordered.pop()
    paths = sorted({test.partition("::")[0] for test in ordered})
    return bool(ordered) and not passes(paths, Only(ordered), 30 + 3 * int(total_s), "-x")


def run(package: str, globs: tuple[str, ...], tests: str, sample: int, given: argparse.Namespace) -> None:
    """Print what becomes of each mutant of a random sample of the files of `package`."""
    paths = sorted(str(path) for glob in globs for path in list(Path(package).glob(glob)) or [Path(package, glob)])
    found = [mutant for path in paths if given.only in path for mutant in mutants_of(path)]
    chosen = random.Random(given.seed).sample(found, min(sample, len(found)))  # noqa: S311  # no secret
    sys.dont_write_bytecode = False
    passes([tests], Recorder(), 3_600)
    sys.dont_write_bytecode = True  # a changed file would be taken for the one before it
    seconds, tests_by_line = json.loads(Path("recorded.json").read_text(encoding="utf-8"))
    if not seconds:
        sys.exit(f"{tests} does not run: see `make test ARGS={tests}`")
    print(f"{package}: {len(chosen)} of {len(found)} mutants, {len(seconds)} tests, seed {given.seed}", flush=True)
    killed = 0
    for mutant in sorted(chosen, key=lambda mutant: (mutant.path, mutant.lines.stop)):
        file = Path(mutant.path)
        code = file.read_text(encoding="utf-8")
        changed = mutate_code(code, mutant.operator, mutant.occurrence)
        Path(cache_from_source(mutant.path)).unlink(missing_ok=True)
        file.write_text(changed, encoding="utf-8")
        is_noticed = is_killed(mutant, seconds, tests_by_line)
        file.write_text(code, encoding="utf-8")
        killed += is_noticed
        before, after = mutant.lines.stop - 1, changed.splitlines()[mutant.lines.stop - 2].strip()
        print(f"{'killed  ' if is_noticed else 'SURVIVED'} {file}:{before}: {code.splitlines()[before - 1].strip()}")
        print(f"    {after}", flush=True)
    print(f"{package}: killed {killed} of {len(chosen)}, {killed / max(1, len(chosen)):.1%}", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=mutants.__doc__)
    parser.add_argument("--core", type=int, default=200, help="mutants of the core")
    parser.add_argument("--plugin", type=int, default=100, help="mutants of the plug-in's pure parts")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="a part of the paths to take mutants from")
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("mutants", deadline=None, derandomize=True, phases=phases)
    for name in (*PYTEST_PLUGINS, *(VLLM if given.plugin else ())):  # once, for all forks
        importlib.import_module(name)
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    with tempfile.TemporaryDirectory() as copy:
        for name in (name for name in names if (ROOT / name).is_file()):
            (Path(copy) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, Path(copy) / name)
        os.chdir(copy)
        sys.path = [copy, *(path for path in sys.path if not path.startswith(str(ROOT)) or "site-packages" in path)]
        if given.core:
            run("engine/tokencake", CORE, "tests/unit/core", given.core, given)
        if given.plugin:
            run("engine/tokencake_vllm", PLUGIN, "tests/unit/vllm", given.plugin, given)


if __name__ == "__main__":
    main()
