"""A real run through the proxy becomes a workload, and the steps of the engine become a profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langgraph.graph import START, MessagesState, StateGraph

from tests.e2e.conftest import API_KEY, Server
from tests.e2e.test_identity import thread, tool_loop
from tokencake_sim.cli import main


@pytest.fixture(scope="module")
def past(server: Server) -> list[dict[str, Any]]:
    """What the engine knows of one application with a tool loop and of one plain call."""
    waits: list[tuple[float, float]] = []
    config = thread()
    tool_loop(server, waits).invoke({"messages": [HumanMessage("find it")]}, config)
    plain = StateGraph(MessagesState)
    plain.add_node("speaker", lambda state: {"messages": [server.chat(max_tokens=20).invoke(state["messages"])]})
    plain.add_edge(START, "speaker")
    plain.compile().invoke({"messages": [HumanMessage("speak")]}, thread())
    return [call for call in server.state()["calls"] if call["status"] == "finished"]


@pytest.mark.parametrize("through", ["engine", "proxy"])
def test_a_real_run_is_recorded_and_runs_in_virtual_time(
    server: Server, past: list[dict[str, Any]], tmp_path: Path, through: str
) -> None:
    workload, metrics = tmp_path / "run.json", tmp_path / "metrics.json"

    assert main(["record", getattr(server, through), str(workload), "--api-key", API_KEY]) == 0

    loop = [app for app in json.loads(workload.read_text())["apps"] if any(n.get("tool") for n in app["nodes"])]
    tools = [node["tool"] for app in loop for node in app["nodes"] if node.get("tool") and node["agent"] != "pause"]
    assert {tool["name"] for tool in tools} >= {"look_up"}
    assert all(0.4 < tool["duration_s"] < 5.0 for tool in tools if tool["name"] == "look_up")
    assert main(["--workload", str(workload), "--profile", "cpu-smollm2-135m", "--json", str(metrics)]) == 0
    ran = json.loads(metrics.read_text())
    assert ran["calls"] >= len(past)
    assert ran["makespan_s"] > 0


def test_the_steps_of_a_running_engine_fit_a_profile(
    server: Server, past: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert past
    capsys.readouterr()
    assert main(["calibrate", server.engine, "--api-key", API_KEY]) == 0

    profile = json.loads(capsys.readouterr().out)
    assert profile["prefill_tokens_per_s"] > 0
    assert "measured steps of a running engine" in profile["source"]
