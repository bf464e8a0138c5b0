"""Sessions, agents and the run tree, derived from metadata."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokencake.protocol import Hint, parse_hint
from tokencake_langgraph.calls import issuing_call_id
from tokencake_langgraph.identity import agent_name, locate, send_index, session_id
from tokencake_langgraph.run_tree import RunTree


def metadata(namespace: str, path: tuple[Any, ...] = ("__pregel_pull", "n"), **rest: Any) -> dict[str, Any]:
    return {"langgraph_checkpoint_ns": namespace, "langgraph_path": path, **rest}


@pytest.mark.parametrize(
    ("known", "session"),
    [
        ({}, "app//graph"),
        (metadata("agent:1"), "app//graph"),
        (metadata("agent:1", thread_id="T"), "T//graph"),
        (metadata("writer:1", thread_id="T"), "T//writer"),
        (metadata("model:1", thread_id="T", lc_agent_name="boss"), "T//boss"),
        (metadata("model:1", thread_id="T", lc_agent_name=None), "T//graph"),
        (metadata("team:1|agent:2", thread_id="T"), "T/team:1/team"),
        (metadata("team:1|1|agent:2", thread_id="T"), "T/team:1|1/team"),
        (metadata("worker:1", ("__pregel_push", 2, False), thread_id="T"), "T/worker:1/worker"),
        (metadata("worker:1|model:2", thread_id="T", lc_agent_name="w"), "T/worker:1/w"),
        (metadata("flow:1|think:2", ("__pregel_push", ("__pregel_pull", "flow"), 0, True)), "app/flow:1/think"),
    ],
)
def test_a_session_is_the_threads_agent_in_its_namespace(known: dict[str, Any], session: str) -> None:
    assert locate(known, "app", "graph").session == session


def test_only_send_gives_an_index_in_a_fan_out() -> None:
    assert send_index(metadata("w:1", ("__pregel_push", 2, False))) == 2
    assert send_index(metadata("w:1", ("__pregel_push", ("__pregel_pull", "f"), 3, True))) is None
    assert send_index({"langgraph_path": ["__pregel_pull", "n"]}) is None


@given(owner=st.text(), namespace=st.text(), agent=st.text(max_size=400))
def test_any_session_is_valid_in_the_contract_and_in_a_header(owner: str, namespace: str, agent: str) -> None:
    session = session_id(owner, namespace, agent)
    assert session.isascii()
    assert session.isprintable()
    assert " " not in session
    assert parse_hint(Hint(session).to_json()).session == session


@given(name=st.text(st.characters(), min_size=1))
def test_any_agent_name_is_valid_in_the_contract(name: str) -> None:
    agent = agent_name({"lc_agent_name": name}, None)
    assert parse_hint(Hint("s", agent=agent).to_json()).agent == agent


def test_long_names_with_a_common_beginning_stay_different() -> None:
    assert session_id("T", "", "a" * 400 + "1") != session_id("T", "", "a" * 400 + "2")


@given(st.lists(st.tuples(st.sampled_from(["open", "close"]), st.integers(0, 9), st.integers(0, 9)), max_size=60))
def test_closing_every_root_closes_every_run(steps: list[tuple[str, int, int]]) -> None:
    tree = RunTree()
    roots: list[UUID] = []
    for kind, number, parent in steps:
        run_id, parent_id = UUID(int=number + 1), UUID(int=parent + 1)
        if kind == "close":
            tree.close(run_id)
        elif tree.get(parent_id) is not None and number != parent:
            tree.open(run_id, parent_id, "chain", {}, 0.0)
        elif tree.open(run_id, None, "chain", {}, 0.0) is not None:
            roots.append(run_id)
    for root in roots:
        tree.close(root)
    assert len(tree) == 0


def test_the_run_tree_drops_its_oldest_runs() -> None:
    tree = RunTree(max_runs=3)
    root = uuid4()
    tree.open(root, None, "chain", {}, 0.0)
    for _ in range(10):
        tree.open(uuid4(), root, "tool", {}, 0.0)
    assert len(tree) == 3
    assert tree.get(root) is None


@pytest.mark.parametrize("message_id", [None, "chosen by the user", "lc_run--nonsense"])
def test_a_message_without_the_id_of_its_run_has_no_issuing_call(message_id: str | None) -> None:
    from langchain_core.messages import AIMessage

    call = {"name": "search", "args": {}, "id": "1", "type": "tool_call"}
    assert issuing_call_id({"messages": [AIMessage("", id=message_id, tool_calls=[call])]}, "1") is None
