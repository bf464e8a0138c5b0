"""The events endpoint is missing, unreachable or slow; the application is not affected."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from langgraph.errors import GraphInterrupt

from tests.unit.langgraph.agents import HELLO, THREAD, agent, quick
from tests.unit.langgraph.scripted_engine import ScriptedEngine
from tokencake_langgraph import ChatTokencake, flush, stats
from tokencake_langgraph.handler import LIFECYCLE, TokencakeHandler

# --- the server -----------------------------------------------------------------------------------


def test_an_engine_without_the_endpoint_serves_the_app_and_gets_one_post(
    model: ChatTokencake, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.events_status = 404
    graph = agent(model, quick)
    with caplog.at_level("INFO", logger="tokencake_langgraph"):
        for _ in range(3):
            assert graph.invoke(HELLO)["messages"][-1].text == "all is well"
            flush()
    assert len(engine.event_headers) == 1
    assert [record.levelname for record in caplog.records] == ["INFO"]
    (target,) = stats()
    assert (target.sent, target.dropped, target.is_off) == (0, 9, True)


def test_an_unreachable_events_endpoint_does_not_affect_the_app(
    model: ChatTokencake, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed_port = probe.getsockname()[1]
    monkeypatch.setattr("tokencake_langgraph.chat_model.events_url", lambda _: f"http://127.0.0.1:{closed_port}/e")
    model = ChatTokencake(model="fake", base_url=engine.base_url)
    assert agent(model, quick).invoke(HELLO)["messages"][-1].text == "all is well"
    assert flush(10)
    (target,) = [target for target in stats() if str(closed_port) in target.url]
    assert (target.sent, target.dropped) == (0, 3)


async def test_an_endpoint_that_hangs_blocks_neither_the_app_nor_its_loop(
    model: ChatTokencake, engine: ScriptedEngine
) -> None:
    engine.is_events_held = True
    graph = agent(model, quick)
    longest_s = 0.0

    async def watch() -> None:
        nonlocal longest_s
        while True:
            before = time.monotonic()
            await asyncio.sleep(0)
            longest_s = max(longest_s, time.monotonic() - before)

    watcher = asyncio.create_task(watch())
    for _ in range(5):
        assert (await graph.ainvoke(HELLO))["messages"][-1].text == "all is well"
    watcher.cancel()
    assert longest_s < 1.0
    assert not flush(0.05)
    engine.release()
    assert await asyncio.to_thread(flush, 10)


def test_an_error_in_the_handler_does_not_leave_it(
    model: ChatTokencake, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(args, kwargs)

    for name in ("open_chain", "open_call", "open_tool", "make_hint"):
        monkeypatch.setattr(LIFECYCLE, name, fail)
    assert agent(model, quick).invoke(HELLO)["messages"][-1].text == "all is well"
    assert all("vllm_xargs" not in request.body for request in engine.requests)
    assert "TokenCake" in caplog.text


def test_ends_without_a_start_are_ignored() -> None:
    from uuid import uuid4

    handler = TokencakeHandler()
    handler.on_chain_end({}, run_id=uuid4())
    handler.on_chain_error(ValueError(), run_id=uuid4())
    handler.on_tool_end("x", run_id=uuid4())
    handler.on_tool_error(GraphInterrupt(), run_id=uuid4())
    handler.on_llm_error(ValueError(), run_id=uuid4())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_child_sends_its_own_events_only(model: ChatTokencake, engine: ScriptedEngine) -> None:
    graph = agent(model, quick)
    graph.invoke(HELLO, THREAD)
    child = os.fork()
    if child == 0:
        try:
            graph.invoke(HELLO, {"configurable": {"thread_id": "child"}})
            os._exit(0 if flush(10) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    flush()
    session_of = {hint.call: hint.session for hint in engine.hints}
    assert sorted(session_of[event["call"]] for event in engine.of_type("tool_end")) == ["T//a", "child//a"]


def test_many_models_share_one_sender(make_model: Callable[..., ChatTokencake]) -> None:
    models = [make_model(), make_model(), make_model(api_key="another")]
    assert len(stats()) == 2
    del models
