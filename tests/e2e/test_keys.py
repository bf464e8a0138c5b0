"""With an API key on a real vLLM, the proxy forwards none of its routes without the key."""

from __future__ import annotations

import re

import httpx
import pytest

from tests.e2e.conftest import Server
from tokencake_proxy.routes import engine_route

LARGE = {"model": "tiny", "prompt": "Hello " * 20_000, "max_tokens": 1}


@pytest.mark.parametrize("key", [None, "Bearer wrong"])
def test_no_route_of_vllm_is_reachable_without_its_key(server: Server, key: str | None) -> None:
    paths: dict[str, dict[str, object]] = httpx.get(f"{server.engine}/openapi.json").json()["paths"]
    headers = {} if key is None else {"Authorization": key}
    answers = {
        (method, path): httpx.request(method, f"{server.proxy}{re.sub('{.*?}', 'x', path)}", headers=headers, json={})
        for path, methods in paths.items()
        for method in methods
        if engine_route(path) is not None
    }

    assert {"/v1/chat/completions", "/tokenize", "/version"} <= {path for _, path in answers}
    assert {route: answer.status_code for route, answer in answers.items() if answer.status_code != 401} == {}


def test_a_large_body_passes_with_the_key_only(server: Server) -> None:
    url = f"{server.proxy}/tokenize"

    assert httpx.post(url, json=LARGE, timeout=60).status_code == 401
    assert httpx.post(url, json=LARGE, headers=server.auth, timeout=60).json()["count"] > 20_000
