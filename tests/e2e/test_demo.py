"""`tokencake demo` and `tokencake serve` as a user starts them, with a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import ENV, PATIENCE_S, wait_until
from tokencake_cli.processes import free_port

TOKENCAKE = [sys.executable, "-m", "tokencake_cli.main"]


def environment(tmp_path: Path) -> dict[str, str]:
    """Environment that puts the logs into a separate folder."""
    return {**os.environ, **ENV, "XDG_STATE_HOME": str(tmp_path)}


def processes_of(tmp_path: Path) -> list[int]:
    """Every process that descends from a command started with `environment(tmp_path)`, by its environment."""
    mark = f"XDG_STATE_HOME={tmp_path}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_the_demo_writes_the_engines_figures(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [*TOKENCAKE, "demo", "--model", str(tiny_model), "--tasks", "1", "--no-progress", "--json", str(out)]
    result = subprocess.run(
        command, env=environment(tmp_path), capture_output=True, text=True, timeout=580, check=False
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(out.read_text())
    measured = {"wall_s", "task_s", "computed_tokens", "ttft_s", "kv"}
    known = {"llm_calls", "tool_calls", "agents", "prompt_tokens", "cached_tokens", "stalls", "stock"}
    assert set(figures) == measured | known
    assert set(figures["stock"]) == measured
    assert set(figures["agents"]) == {"architect", "programmer", "reviewer"}
    assert figures["agents"]["programmer"]["calls"] == 12
    assert figures["llm_calls"] == 14
    assert figures["tool_calls"] == len(figures["stalls"]) == 9
    assert {stall["tool"] for stall in figures["stalls"]} == {"search_docs", "write_file", "run_tests"}
    assert all(0 < stall["seconds"] < figures["wall_s"] for stall in figures["stalls"])
    assert 0 < figures["cached_tokens"] < figures["prompt_tokens"]
    assert figures["computed_tokens"] == figures["prompt_tokens"] - figures["cached_tokens"]
    assert figures["kv"]["offloads"] > 0
    assert figures["kv"]["copied_mib"] > 0
    assert set(figures["stock"]["kv"].values()) == {0}, "stock vLLM moved KV blocks"
    assert figures["stock"]["computed_tokens"] > 0
    assert "programmer" in result.stdout
    assert "prompt tokens computed" in result.stdout
    assert processes_of(tmp_path) == []


def test_ctrl_c_in_the_demo_leaves_no_process_behind(tiny_model: Path, tmp_path: Path) -> None:
    command = [*TOKENCAKE, "demo", "--model", str(tiny_model), "--tasks", "3", "--no-progress", "--no-stock"]

    def listen_to_ctrl_c() -> None:  # a shell has its background jobs, these tests perhaps, ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command,
        env=environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=listen_to_ctrl_c,  # noqa: PLW1509  # sets one signal, takes no lock
    ) as demo:
        wait_until(lambda: len(processes_of(tmp_path)) >= 5, 5 * PATIENCE_S, "engine core and worker are up")
        demo.send_signal(signal.SIGINT)
        assert demo.wait(PATIENCE_S) == 130
    wait_until(lambda: processes_of(tmp_path) == [], PATIENCE_S, "every process is gone")


def test_serve_answers_and_sigterm_ends_all_its_processes(tiny_model: Path, tmp_path: Path) -> None:
    port, engine_port = free_port(), free_port()
    flags = ["--served-model-name", "tiny", "--enforce-eager", "--max-model-len", "1024", "--block-size", "32"]
    ports = ["--port", str(port), "--engine-port", str(engine_port)]
    command = [*TOKENCAKE, "serve", str(tiny_model), *ports, *flags, "--num-gpu-blocks-override", "64"]
    with subprocess.Popen(command, env=environment(tmp_path), stdout=subprocess.PIPE, text=True) as serve:
        line = ""
        while not line.startswith("ready:"):
            line = serve.stdout.readline()
            assert line, "serve ended before it was ready"
        assert f"http://127.0.0.1:{port}/v1" in line
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": 2}
        assert httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60).status_code == 200
        serve.terminate()
        assert serve.wait(PATIENCE_S) == 0
    wait_until(lambda: processes_of(tmp_path) == [], PATIENCE_S, "every process is gone")


@pytest.mark.parametrize("flag", ["--max-model-len=banana", "--scheduler-cls=my.Scheduler"])
def test_serve_shows_the_engines_log_if_it_does_not_start(tiny_model: Path, tmp_path: Path, flag: str) -> None:
    ports = ["--port", str(free_port()), "--engine-port", str(free_port())]
    result = subprocess.run(
        [*TOKENCAKE, "serve", str(tiny_model), *ports, flag],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=5 * PATIENCE_S,
        check=False,
    )
    assert result.returncode == 1
    assert "the engine ended with status 2" in result.stderr
    assert flag.split("=", maxsplit=1)[0] in result.stderr
    assert processes_of(tmp_path) == []
