"""The check of the GPU copies finds what it is to find: here on made-up streams."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from benchmarks.gpu import exactness
from benchmarks.gpu.report import FAULT, SLOW, Report
from benchmarks.gpu.worlds import Paper
from tokencake_vllm.transfer import copy_lane, stream_copier
from tokencake_vllm.transfer.slot_transfers import TorchTransfers

ROOT = Path(__file__).resolve().parents[3]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, check=False, cwd=ROOT
    )


def silent() -> Report:
    return Report(lambda _: None)


def test_on_made_up_streams_the_copies_are_right_and_every_control_sees_its_fault() -> None:
    done = run(str(ROOT / "benchmarks" / "gpu_check.py"), "--paper")
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, verdict = (json.loads(line) for line in done.stdout.splitlines())
    assert (verdict["ok"], verdict["faults"], verdict["slow"]) == (True, [], [])
    controls = [line for line in lines if line["check"].startswith("control: ")]
    assert [line["wrong"] for line in controls] == [line["of"] for line in controls] == [5, 5, 5]
    (soak,) = [line for line in lines if line["check"] == "soak"]
    assert soak["jobs"] > 100
    assert sum(line["check"].startswith("layout ") for line in lines) == 9


def test_a_copier_that_leaves_a_block_out_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from_slots = TorchTransfers.from_slots

    def forgetful(self: Any, staging: Any, slots: Any, stream: Any) -> None:
        from_slots(self, staging, slots[:-1], stream)

    monkeypatch.setattr(TorchTransfers, "from_slots", forgetful)
    report = silent()
    exactness.layouts(report, Paper(random.Random(1)))
    exactness.soak(report, Paper(random.Random(1)), 100)
    assert report.verdict() == FAULT
    assert not any(line["ok"] for line in report.lines)


def test_a_piece_that_overtakes_its_staging_buffer_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_lane, "STAGING_BYTES", 1)

    class Torn(TorchTransfers):
        """Reads the staging row before the gather has filled it."""

        def to_slots(self, staging: Any, slots: Any, stream: Any) -> None:
            for row, slot in enumerate(slots):
                self._rows[slot] = staging[row].clone()

    monkeypatch.setattr(stream_copier, "slot_transfers", lambda rows, device: Torn(rows))
    report = silent()
    exactness.order(report, Paper, random.Random(1), 3)
    assert "a store reads what was computed before it" in [line["check"] for line in report.lines if not line["ok"]]


def test_a_figure_beyond_its_limit_is_slow_and_no_fault() -> None:
    report = silent()
    report.at_most(1.05, "slowdown", 1.18)
    report.at_least(0.7, "rate", 0.7)
    report.tell("figure", None)
    assert report.verdict() == SLOW
    verdict = report.lines[-1]
    assert (verdict["ok"], verdict["faults"], verdict["slow"]) == (False, [], ["slowdown"])


def test_a_check_that_raises_is_a_fault_and_the_next_one_runs() -> None:
    def broken(report: Report) -> None:
        raise ValueError("no such layout")

    report = silent()
    report.attempt(broken)
    report.attempt(lambda report: report.at_most(1.0, "slow", 2.0))
    assert report.verdict() == FAULT
    assert report.lines[-1]["faults"] == ["broken"]
    assert report.lines[0]["error"] == "ValueError: no such layout"


def test_a_folder_named_vllm_is_no_vllm(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "setup.sh").touch()
    program = f"import sys; sys.path[:0] = {[str(tmp_path), str(ROOT)]}; from benchmarks.gpu import stand_ins as s"
    done = run("-I", "-S", "-c", f"{program}; print(s.has_vllm()); s.install(); from vllm.logger import init_logger")
    assert (done.stdout, done.stderr) == ("False\n", "")


PROCESSES = """
import os, sys
from pathlib import Path
from benchmarks.gpu import processes
from benchmarks.gpu.report import Report

def works(report):
    report.tell("half way", None)
    return [1, 2]

def raises(report):
    raise ValueError("no model")

def dies(report):
    print("last words", flush=True)
    os._exit(3)

report = Report()
found = processes.run(report, {"works": works, "raises": raises, "dies": dies}, Path(sys.argv[1]))
print(found, sorted(line["check"] for line in report.lines if line["ok"] is False))
"""


def test_a_process_that_dies_is_a_fault_with_its_last_words(tmp_path: Path) -> None:
    done = run("-c", PROCESSES, str(tmp_path))
    assert done.stdout.splitlines()[-1] in (
        "{'works': [1, 2], 'raises': None} ['dies', 'raises']",
        "{'raises': None, 'works': [1, 2]} ['dies', 'raises']",
    ), done.stderr
    (death,) = [json.loads(line) for line in done.stdout.splitlines()[:-1] if '"dies"' in line]
    assert death["error"] == "exit status 3"
    assert "last words" in death["log"]
