"""Clients without TokenCake get the same response through the proxy as directly, byte for byte."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import uuid
from typing import Any

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI

from tests.e2e.conftest import API_KEY, PATIENCE_S, Server, wait_until
from tests.e2e.test_identity import QUESTION, thread, tool_loop

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 24, "temperature": 0}


def post(base: str, path: str, body: dict[str, Any], request_id: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {API_KEY}", "X-Request-Id": request_id}
    return httpx.post(f"{base}{path}", json=body, headers=headers, timeout=60)


def without_clock(raw: bytes) -> bytes:
    """A second may pass between two calls."""
    return re.sub(rb'"created(_at)?":\s*[\d.]+', b'"created":0', raw)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", {**CHAT, "n": 2, "logprobs": True}),
        ("/v1/completions", {"model": "tiny", "prompt": "Hello", "max_tokens": 16, "temperature": 0}),
        ("/v1/chat/completions", {**CHAT, "model": "no-such-model"}),
        ("/v1/chat/completions", {"model": "tiny"}),
        ("/tokenize", {"model": "tiny", "prompt": "Hello"}),
    ],
)
def test_a_response_through_the_proxy_is_the_direct_response(server: Server, path: str, body: dict[str, Any]) -> None:
    request_id = uuid.uuid4().hex
    post(server.engine, path, body, request_id)  # fills the prefix cache, because responses report its hits
    direct, proxied = (post(base, path, body, request_id) for base in (server.engine, server.proxy))
    assert proxied.status_code == direct.status_code
    assert proxied.headers["content-type"] == direct.headers["content-type"]
    assert without_clock(proxied.content) == without_clock(direct.content)


def test_curl_gets_the_direct_response(server: Server) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    path, request_id = "/v1/models", uuid.uuid4().hex
    command = [curl, "-sS", "-H", f"Authorization: Bearer {API_KEY}", "-H", f"X-Request-Id: {request_id}"]
    direct, proxied = (
        subprocess.run([*command, f"{base}{path}"], check=True, capture_output=True).stdout
        for base in (server.engine, server.proxy)
    )
    volatile = rb'"(created|id)":\s*("modelperm-[0-9a-f]+"|\d+)'
    assert re.sub(volatile, b"", proxied) == re.sub(volatile, b"", direct) != b""


def test_an_openai_client_streams_the_direct_response_through_the_proxy(server: Server) -> None:
    """The text, not the chunks: how many tokens vLLM puts into one chunk depends on how busy it is."""
    texts, usages = [], []
    for base in (server.engine, server.engine, server.proxy):
        with openai.OpenAI(base_url=f"{base}/v1", api_key=API_KEY, max_retries=0) as client:
            stream = client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
            chunks = list(stream)
            texts.append("".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices))
            usages.append(chunks[-1].usage)
    assert texts[1] == texts[2] != ""
    assert usages[1] == usages[2]


def test_tokens_arrive_during_the_generation(server: Server) -> None:
    session = f"session-{uuid.uuid4()}"
    hint = {"tokencake": json.dumps({"session": session})}
    body = {**CHAT, "stream": True, "max_tokens": 3_000, "ignore_eos": True, "vllm_xargs": hint}
    url = f"{server.proxy}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=server.auth, timeout=60) as reply:
        chunks = reply.iter_raw()  # a variable, because dropping the iterator would close the connection
        arrived = b""
        while arrived.count(b"data:") < 20:
            arrived += next(chunks)
        (call,) = server.state(session=session)["calls"]
        assert call["status"] == "running"


def test_a_disconnected_client_frees_the_engine(server: Server) -> None:
    session = f"session-{uuid.uuid4()}"
    hint = {"tokencake": json.dumps({"session": session})}
    body = {**CHAT, "stream": True, "max_tokens": 3_000, "ignore_eos": True, "vllm_xargs": hint}

    def status() -> str:
        return server.state(session=session)["calls"][0]["status"]

    url = f"{server.proxy}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=server.auth, timeout=60) as reply:
        chunks = reply.iter_raw()  # a variable, because dropping the iterator would close the connection
        next(chunks)
        wait_until(lambda: status() == "running", PATIENCE_S, "the call runs")
    wait_until(lambda: status() == "aborted", PATIENCE_S, "the call is gone")


def test_an_app_needs_a_new_import_and_constructor_only(server: Server) -> None:
    """The same graph, once with ChatOpenAI and once with ChatTokencake: same answers, and now the engine knows it."""
    options = {
        "model": "tiny",
        "base_url": f"{server.proxy}/v1",
        "api_key": API_KEY,
        "temperature": 0,
        "max_tokens": 100,
    }

    class Before(Server):
        def chat(self, **_: object) -> ChatOpenAI:
            return ChatOpenAI(**options)

    config_before, config_after = thread(), thread()
    before = tool_loop(Before(server.engine, server.proxy, server.processes), []).invoke(QUESTION, config_before)
    after = tool_loop(server, []).invoke(QUESTION, config_after)
    assert [message.text for message in after["messages"]] == [message.text for message in before["messages"]]
    known = {call["session"].split("/")[0] for call in server.state()["calls"]}
    assert config_after["configurable"]["thread_id"] in known
    assert config_before["configurable"]["thread_id"] not in known
