"""Without the plug-in, the engine or the proxy, the app continues or gets a clear error at once."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import httpx
import openai
import pytest

import tokencake_langgraph
from tests.e2e.conftest import API_KEY, ENV, FLAGS, PATIENCE_S, Server, wait_until
from tests.e2e.test_identity import QUESTION, Waits, thread, tool_loop
from tokencake_cli.processes import Processes, StartError, engine_command, free_port, is_port_free, proxy_command


def test_without_the_plug_in_the_app_still_works(stock_server: Server) -> None:
    waits: Waits = []
    result = tool_loop(stock_server, waits).invoke(QUESTION, thread())
    assert len(waits) == 2
    assert result["messages"][-1].type == "ai"
    assert tokencake_langgraph.flush(PATIENCE_S)
    answer = httpx.get(f"{stock_server.engine}/v1/tokencake/state", headers=stock_server.auth)
    assert answer.status_code == 404


def test_the_engine_dies_during_a_stream_and_does_not_return(stock_server: Server) -> None:
    """Kills the module's own server, which no later test uses."""
    model = stock_server.chat(max_tokens=3_000, extra_body={"ignore_eos": True})
    stream = model.stream("Tell me a long story.")
    next(stream)
    os.kill(stock_server.processes.pid("engine"), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        list(stream)
    assert time.monotonic() - started < PATIENCE_S
    with pytest.raises(openai.APIStatusError) as caught:
        stock_server.chat().invoke("Anybody there?")
    assert caught.value.status_code in (502, 503)
    assert stock_server.engine.removeprefix("http://") in str(caught.value)


def engine_core_of(api_server: int) -> int:
    """The process of the engine core below an API server."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            is_child = entry.name.isdigit() and f"\nPPid:\t{api_server}\n" in (entry / "status").read_text()
            if is_child and b"EngineCore" in (entry / "cmdline").read_bytes():
                return int(entry.name)
    raise AssertionError("no engine core found")


def test_the_death_of_the_engine_core_ends_the_server_and_events_are_dropped(tiny_model: Path, tmp_path: Path) -> None:
    port = free_port()
    engine = f"http://127.0.0.1:{port}"
    with Processes(tmp_path) as processes:
        processes.start("engine", engine_command(str(tiny_model), port, FLAGS), ENV)
        processes.wait_until_healthy("engine", f"{engine}/health", timeout_s=8 * PATIENCE_S)
        body = {"v": 1, "events": [{"type": "app_end", "app": "a"}]}
        assert httpx.post(f"{engine}/v1/tokencake/events", json=body).status_code == 200
        os.kill(engine_core_of(processes.pid("engine")), signal.SIGKILL)
        with contextlib.suppress(httpx.TransportError):
            assert httpx.post(f"{engine}/v1/tokencake/events", json=body, timeout=60).status_code >= 500
        with pytest.raises(StartError, match="the engine ended"):
            processes.wait_until_healthy("engine", f"{engine}/never", timeout_s=3 * PATIENCE_S)


def test_an_unreachable_engine_is_named_in_the_error(tmp_path: Path) -> None:
    engine, port = f"http://127.0.0.1:{free_port()}", free_port()
    with Processes(tmp_path) as processes:
        processes.start("proxy", proxy_command(engine, "127.0.0.1", port))
        wait_until(lambda: not is_port_free(port), PATIENCE_S, "the proxy listens")
        assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=PATIENCE_S).status_code == 503
        with (
            openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=API_KEY, max_retries=0) as client,
            pytest.raises(openai.InternalServerError, match=engine.removeprefix("http://")),
        ):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hello"}])


def test_events_for_a_stopped_proxy_are_dropped_without_delay(server: Server, tmp_path: Path) -> None:
    port = free_port()
    proxy = f"http://127.0.0.1:{port}"
    waits: Waits = []
    with Processes(tmp_path) as processes:
        processes.start("proxy", proxy_command(server.engine, "127.0.0.1", port))
        processes.wait_until_healthy("proxy", f"{proxy}/health", timeout_s=PATIENCE_S)
        graph = tool_loop(Server(server.engine, proxy, processes), waits, turns=1)
        graph.invoke(QUESTION, thread())
    started = time.monotonic()
    with pytest.raises(openai.APIConnectionError):
        graph.invoke(QUESTION, thread())
    tokencake_langgraph.flush(3.0)
    assert time.monotonic() - started < PATIENCE_S
