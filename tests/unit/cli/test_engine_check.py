"""What the doctor says of a running engine."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tokencake.protocol import STATE_PATH
from tokencake_cli import main as cli
from tokencake_cli.doctor import Finding
from tokencake_cli.engine_check import engine_finding

CHECK = {"problem": None, "blocks": 4, "nbytes": 4096, "seconds": 0.0125}


def asked(answer: httpx.Response, url: str = "http://engine:8000/v1/", key: str | None = None) -> Finding:
    def answering(request: httpx.Request) -> httpx.Response:
        assert request.url.path == STATE_PATH
        assert request.headers.get("authorization") == (key and f"Bearer {key}")
        return answer

    return engine_finding(url, key, httpx.MockTransport(answering))


def state(**time: Any) -> httpx.Response:
    return httpx.Response(200, json={"time": {"off": None, "host_blocks": 512, "self_check": None, **time}})


@pytest.mark.parametrize("url", ["http://engine:8000", "http://engine:8000/", "http://engine:8000/v1"])
def test_an_engine_whose_copies_were_checked_is_fine(url: str) -> None:
    found = asked(state(self_check=CHECK), url)
    assert found.state == "ok"
    assert found.found == (
        "http://engine:8000: Time Scheduler on, 512 blocks of host memory, "
        "copies checked, 4 blocks out and back in 12 ms"
    )


def test_before_its_first_step_an_engine_has_nothing_to_tell_of_its_copies() -> None:
    assert asked(state()).found.endswith("its copies are checked with the first step")


def test_why_the_time_scheduler_is_off_is_said() -> None:
    found = asked(state(off="the self-check of the copies failed: 1 of 4 blocks came back with other bytes"))
    assert found.state == "warn"
    assert "1 of 4 blocks came back with other bytes" in found.found


@pytest.mark.parametrize(("status", "advice"), [(401, "--api-key"), (403, "--api-key"), (404, "tokencake engine")])
def test_an_answer_that_is_no_state_names_the_way_out(status: int, advice: str) -> None:
    found = asked(httpx.Response(status, json={"error": {}}), key="secret")
    assert found.state == "fail"
    assert advice in found.advice
    assert "secret" not in found.found


@pytest.mark.parametrize("body", ["no JSON", "[]", "{}", '{"time": {}}', '{"time": 3}'])
def test_another_server_is_no_engine_of_ours(body: str) -> None:
    assert asked(httpx.Response(200, text=body)).state == "fail"


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "no url at all", "http://[::"])
def test_a_server_that_is_not_there_is_named(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--base-url", url, "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)
    assert finding["found"].startswith(url.removesuffix("/"))
    assert "--base-url" in finding["advice"]
