import json
from pathlib import Path

import pytest

import tokencake_sim
from tokencake_sim import GENERATORS, POLICIES, PROFILES
from tokencake_sim.cli import main

EXAMPLE = Path(__file__).resolve().parents[3] / "benchmarks" / "workloads" / "two-agents.json"


def test_the_package_names_what_it_offers_in_order():
    assert tokencake_sim.__all__ == sorted(
        tokencake_sim.__all__, key=lambda name: (not name.isupper(), name.islower(), name)
    )
    assert all(hasattr(tokencake_sim, name) for name in tokencake_sim.__all__)


def test_the_list_names_every_workload_profile_and_policy(capsys):
    assert main(["--list"]) == 0

    shown = capsys.readouterr().out
    assert all(name in shown for name in (*GENERATORS, *PROFILES, *POLICIES))


def test_a_foreign_file_runs_and_its_metrics_are_written(tmp_path, capsys):
    code = main(["--workload", str(EXAMPLE), "--policy", "stock+host", "--json", str(tmp_path / "out.json")])

    metrics = json.loads((tmp_path / "out.json").read_text())
    assert code == 0
    assert metrics["calls"] == 8
    assert {"mean", "p50", "p95", "max"} == set(metrics["app_latency_s"]) == set(metrics["ttft_after_tool_s"])
    assert "makespan" in capsys.readouterr().out


def test_a_saved_workload_can_be_loaded_again(tmp_path):
    path = tmp_path / "w.json"

    assert main(["--workload", "react", "--apps", "2", "--save-workload", str(path)]) == 0
    assert len(json.loads(path.read_text())["apps"]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policy", "magic"], "policy 'magic' is not known; choose one of stock,"),
        (["--workload", "nowhere.json"], "nowhere.json: the workload is neither a file nor one of code-writer"),
        (["--apps", "1", "--kv-blocks", "500"], "can never fit into the 499 there are"),
    ],
)
def test_input_that_cannot_be_run_is_refused_in_one_line(arguments, words, capsys):
    assert main(arguments) == 2

    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
