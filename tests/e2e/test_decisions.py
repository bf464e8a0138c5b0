"""Decisions and tenant isolation, on a real engine with two tenants behind one proxy."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import ENV, FLAGS, PATIENCE_S
from tests.harness.tenancy import SECRET, prefix_of
from tokencake.protocol.tenancy import SECRET_VARIABLE
from tokencake_cli.processes import Processes, engine_command, free_port, proxy_command

SETTINGS = {"space": {"enabled": True, "tenant_mark": "::", "decisions": 40}}


@pytest.fixture(scope="module")
def urls(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """An engine on which one call runs at a time, and a proxy that keeps its two tenants apart."""
    engine_port, proxy_port = free_port(), free_port()
    engine, proxy = f"http://127.0.0.1:{engine_port}", f"http://127.0.0.1:{proxy_port}"
    flags = [*FLAGS, "--api-key", "alice", "bob", "--max-num-seqs", "1"]
    flags[flags.index("--additional-config") + 1] = json.dumps({"tokencake": SETTINGS})
    with Processes(tmp_path_factory.mktemp("decisions-logs")) as processes:
        secret = {SECRET_VARIABLE: SECRET}
        processes.start("engine", engine_command(str(tiny_model), engine_port, flags), {**ENV, **secret})
        processes.start("proxy", [*proxy_command(engine, "127.0.0.1", proxy_port), "--tenants"], secret)
        processes.wait_until_healthy("engine", f"{engine}/health", timeout_s=8 * PATIENCE_S)
        processes.wait_until_healthy("proxy", f"{proxy}/health", timeout_s=PATIENCE_S)
        yield engine, proxy


def ask(url: str, path: str, key: str = "alice", **query: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.get(f"{url}/v1/tokencake/{path}", params=query, headers=headers, timeout=60)


def chat(
    url: str, app: str, key: str = "alice", text: str | None = None, max_tokens: int = 40, **headers: str
) -> dict[str, Any]:
    hint = {"v": 1, "session": f"{app}/s", "app": app, "call": f"{app}/c", "agent": "writer"}
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": text or f"Count, {app}."}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "vllm_xargs": {"tokencake": json.dumps(hint)},
    }
    lines = {"Authorization": f"Bearer {key}"} | {name.replace("_", "-"): value for name, value in headers.items()}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=lines, timeout=120).raise_for_status()
    return dict(answer.json())


def test_the_engine_says_why_a_call_waited(urls: tuple[str, str]) -> None:
    engine, proxy = urls
    apps = [f"app-{uuid.uuid4()}" for _ in range(3)]
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda app: chat(proxy, app), apps))
    answer = ask(proxy, "decisions").json()
    mine = [entry for entry in answer["decisions"] if entry["app"] in apps]

    assert answer["longest_wait_s"] > 0
    assert {entry["app"] for entry in mine if entry["kind"] == "started"} == set(apps)
    assert any(entry["words"].startswith(("is first in line", "waits behind app-")) for entry in mine)
    assert [entry["at"] for entry in mine] == sorted(entry["at"] for entry in mine)
    assert {entry["behind"] for entry in mine if entry["words"].startswith("waits behind")} <= set(apps)
    only = ask(proxy, "decisions", app=apps[1], limit=1).json()["decisions"]
    assert [(entry["app"], entry["call"], entry["agent"]) for entry in only] == [(apps[1], f"{apps[1]}/c", "writer")]
    assert ask(proxy, "decisions", call="unknown").json()["decisions"] == []
    assert len(ask(engine, "decisions", limit=200).json()["decisions"]) <= SETTINGS["space"]["decisions"]


@pytest.mark.parametrize("limit", ["0", "-1", "1000000", "many", "1.5", ""])
@pytest.mark.parametrize("path", ["decisions", "state"])
def test_a_bad_limit_is_refused_with_what_is_expected(urls: tuple[str, str], path: str, limit: str) -> None:
    answer = ask(urls[0], path, limit=limit)

    assert answer.status_code == 400
    assert "limit" in answer.json()["error"]["message"]


def test_the_decisions_need_a_key(urls: tuple[str, str]) -> None:
    for url in urls:
        assert httpx.get(f"{url}/v1/tokencake/decisions", timeout=60).status_code == 401


def test_the_block_accounting_is_in_the_metrics(urls: tuple[str, str]) -> None:
    chat(urls[1], "metered")
    lines = httpx.get(f"{urls[0]}/metrics", timeout=60).text.splitlines()
    blocks = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("tokencake:kv_blocks{")]

    assert sum(blocks) == 399
    assert any(line.startswith("tokencake:longest_wait_seconds{") for line in lines)
    assert any(line.startswith('tokencake:space_reserve_blocks{engine="0",part="size"} 0') for line in lines)


def test_a_tenant_sees_and_ends_only_its_own_records(urls: tuple[str, str]) -> None:
    engine, proxy = urls
    chat(proxy, "theirs", key="bob")
    chat(proxy, "mine", key="alice")
    (scoped,) = {c["app"] for c in ask(engine, "state").json()["calls"] if c["app"].endswith("::theirs")}
    assert scoped == prefix_of("bob") + "theirs"

    assert {call["app"] for call in ask(proxy, "state", "bob").json()["calls"]} == {"theirs"}
    for path, key in (("state", "calls"), ("decisions", "decisions")):
        seen = {entry["app"] for entry in ask(proxy, path, "alice", tenant=scoped).json()[key]}
        assert "mine" in seen
        assert not any("theirs" in app for app in seen)
        assert ask(proxy, path, "alice", app=scoped).json()[key] == []
        assert ask(proxy, path, "alice", app="theirs").json()[key] == []

    ends = {"v": 1, "events": [{"type": "app_end", "app": app} for app in (scoped, "theirs", "mine")]}
    answer = httpx.post(
        f"{proxy}/v1/tokencake/events", json=ends, headers={"Authorization": "Bearer alice"}, timeout=60
    )
    assert [result["outcome"] for result in answer.json()["results"]] == ["unknown", "unknown", "applied"]
    assert ask(proxy, "state", "bob").json()["apps"]["theirs"]["ended"] is None


def test_a_prompt_of_another_tenant_is_not_a_cache_hit(urls: tuple[str, str]) -> None:
    _, proxy = urls
    text = "The board will vote on Tuesday about the merger. " * 12

    def cached_tokens(key: str) -> int:
        usage = chat(proxy, f"{key}-board", key, text, max_tokens=1)["usage"]
        return int((usage["prompt_tokens_details"] or {}).get("cached_tokens", 0))

    assert cached_tokens("alice") == 0
    assert cached_tokens("alice") > 0
    assert cached_tokens("bob") == 0


def test_a_request_id_of_another_tenant_does_not_abort_its_request(urls: tuple[str, str]) -> None:
    _, proxy = urls
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(chat, proxy, "long", "alice", None, 400, X_Request_Id="same")
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{proxy}/v1/completions",
                json={"model": "tiny", "prompt": "x", "max_tokens": 3_000, "ignore_eos": True},
                headers={"Authorization": "Bearer bob", "X-Request-Id": "same"},
                timeout=0.5,
            )
        assert answer.result()["usage"]["completion_tokens"] == 400
    assert answer.result()["id"].startswith("chatcmpl-same-")


def test_hints_and_events_that_bypass_the_proxy_are_ignored(urls: tuple[str, str]) -> None:
    engine, proxy = urls
    chat(proxy, "marked")
    chat(engine, prefix_of("alice") + "unmarked")
    end = {"v": 1, "events": [{"type": "app_end", "app": prefix_of("alice") + "marked"}]}
    answer = httpx.post(
        f"{engine}/v1/tokencake/events", json=end, headers={"Authorization": "Bearer alice"}, timeout=60
    )

    assert [result["outcome"] for result in answer.json()["results"]] == ["invalid"]
    apps = ask(engine, "state").json()["apps"]
    assert apps[prefix_of("alice") + "marked"]["ended"] is None
    assert prefix_of("alice") + "unmarked" not in apps
