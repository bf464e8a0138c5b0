"""The first run of a process is reported like later ones, wherever the first model is created."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.langgraph import lazy_apps
from tests.unit.langgraph.scripted_engine import ScriptedEngine

Play = Callable[[str, str], None]
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@pytest.fixture(scope="module")
def player() -> Iterator[subprocess.Popen[str]]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "TOKENCAKE_"))}
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("first_runs.py"))],
        env={**env, "LANGSMITH_TRACING": "false"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def play(player: subprocess.Popen[str], engine: ScriptedEngine) -> Play:
    def order(app: str, moment: str) -> None:
        assert player.stdin is not None
        assert player.stdout is not None
        player.stdin.write(json.dumps({"app": app, "moment": moment, "base_url": engine.base_url}) + "\n")
        player.stdin.flush()
        answer = player.stdout.readline().strip()
        assert answer == "ok", json.loads(answer)

    return order


def shape(text: Any) -> str:
    return UUID.sub("#", str(text))


def stories(engine: ScriptedEngine) -> list[Counter[tuple[str, ...]]]:
    """What each app said, with its ids left out, in the order in which the apps were first heard of."""
    app_of = {hint.call: hint.app for hint in engine.hints}
    by_app: dict[str, Counter[tuple[str, ...]]] = {hint.app: Counter() for hint in engine.hints}
    sessions: dict[str, set[str]] = {app: set() for app in by_app}
    for hint in engine.hints:
        parts = (hint.agent, hint.node, hint.session, hint.fan_index, hint.reuse, hint.expects_tools)
        parent = (hint.parent_call and app_of[hint.parent_call] == hint.app, hint.parent_tool_call is not None)
        by_app[hint.app]["call", *map(shape, (*parts, *parent))] += 1
        sessions[hint.app].add(hint.session)
    for app, names in sessions.items():
        by_app[app]["sessions", str(len(names))] += 1
    for event in engine.events:
        if event["type"] == "app_end":
            by_app[event["app"]]["app_end", event["status"]] += 1
        elif "call" in event:
            by_app[app_of[event["call"]]][event["type"], event.get("tool", ""), event.get("status", "")] += 1
    return list(by_app.values())


def without_thread(story: Counter[tuple[str, ...]]) -> Counter[tuple[str, ...]]:
    """The runs of the interrupted app have separate threads, `1` and `2`."""
    return Counter({tuple(re.sub(r"^[12]/", "#/", part) for part in key): count for key, count in story.items()})


LAZY_APPS = [
    lazy_apps.in_each_node,
    lazy_apps.in_a_node_of_the_react_template,
    lazy_apps.in_a_new_event_loop_each_time,
    lazy_apps.in_parallel_async_nodes,
    lazy_apps.in_a_node_with_a_timeout,
    lazy_apps.in_a_streamed_run,
    lazy_apps.in_a_tool,
    lazy_apps.in_a_sub_agent_of_a_tool,
    lazy_apps.in_an_agent_made_in_a_node,
    lazy_apps.in_a_subgraph,
    lazy_apps.in_a_subgraph_called_by_a_function,
    lazy_apps.after_a_subgraph,
    lazy_apps.in_tasks_of_the_functional_api,
    lazy_apps.in_branches_of_send,
    lazy_apps.in_a_router,
    lazy_apps.in_a_middleware_that_swaps_the_model,
    lazy_apps.in_a_thread_pool_with_context,
    lazy_apps.in_a_node_that_fails,
    lazy_apps.below_a_manager_made_by_the_user,
]


@pytest.mark.parametrize("moment", ["start", "inside"])
@pytest.mark.parametrize("app", [app.__name__ for app in LAZY_APPS])
def test_the_first_run_is_reported_as_the_second(play: Play, engine: ScriptedEngine, app: str, moment: str) -> None:
    play(app, moment)
    first, second = stories(engine)
    assert first == second
    assert [count for (kind, *_), count in first.items() if kind == "app_end"] == [1]


@pytest.mark.parametrize("moment", ["start", "inside"])
@pytest.mark.parametrize("app", [app.__name__ for app in (lazy_apps.in_a_batch, lazy_apps.in_two_event_loops_at_once)])
def test_first_runs_at_the_same_time_are_reported_as_the_second_ones(
    play: Play, engine: ScriptedEngine, app: str, moment: str
) -> None:
    play(app, moment)
    first, *others = stories(engine)
    assert others == [first] * 3
    assert first["app_end", "ok"] == 1


@pytest.mark.parametrize("moment", ["start", "inside"])
def test_an_interrupt_of_the_first_run_is_reported_as_one_of_the_second(
    play: Play, engine: ScriptedEngine, moment: str
) -> None:
    play("before_and_after_an_interrupt", moment)
    first, first_resumed, second, second_resumed = map(without_thread, stories(engine))
    assert (first, first_resumed) == (second, second_resumed)
    assert [event["session"][:2] for event in engine.of_type("stall_start")] == ["1/", "2/"]
    assert first_resumed["app_end", "ok"] == 1


RELOADS = [
    lazy_apps.after_the_package_is_loaded_anew,
    lazy_apps.after_each_module_is_reloaded,
    lazy_apps.after_the_handler_is_reloaded,
]


@pytest.mark.parametrize("app", [app.__name__ for app in RELOADS])
def test_modules_that_are_loaded_again_report_everything_once(play: Play, engine: ScriptedEngine, app: str) -> None:
    play(app, "start")
    first, second = stories(engine)
    assert first == second
    once = ("tool_start", "search", ""), ("tool_end", "search", "ok"), ("app_end", "ok")
    assert [first[event] for event in once] == [1, 1, 1]


def test_a_chain_without_a_graph_is_reported_in_its_first_run(play: Play, engine: ScriptedEngine) -> None:
    play("in_a_chain_without_a_graph", "start")
    first, second = stories(engine)
    assert first == second
    assert first["app_end", "ok"] == 1


@pytest.mark.parametrize("moment", ["start", "inside"])
def test_a_thread_without_context_has_the_same_identity_in_both_runs(
    play: Play, engine: ScriptedEngine, moment: str
) -> None:
    play("in_a_thread_without_context", moment)
    first, second = stories(engine)
    assert first == second
    assert {hint.agent for hint in engine.hints} == {"default"}


@pytest.mark.parametrize("moment", ["start", "inside"])
def test_after_a_late_import_in_a_chain_only_the_identity_is_missing(
    play: Play, engine: ScriptedEngine, moment: str
) -> None:
    play("in_a_chain_without_a_graph", moment)
    assert len({hint.call for hint in engine.hints}) == len(engine.requests) > 0
