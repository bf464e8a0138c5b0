"""When does the launcher bring our connector?"""

from __future__ import annotations

import json

import pytest

from tokencake_vllm.serve import connector_config, connector_flags


def test_the_connector_comes_by_itself() -> None:
    assert connector_flags(["model"]) == ["--kv-transfer-config", json.dumps(connector_config())]


@pytest.mark.parametrize(
    "argv",
    [
        ["--kv-transfer-config", "{}"],
        ["--kv-transfer-config={}"],
        ["--kv_transfer_config", "{}"],
        ["--kv-transfer-config.kv_connector", "X"],
        ["--additional-config", '{"tokencake": {"time": {"enabled": false}}}'],
        ['--additional-config={"tokencake": {"time": {"enabled": false}}}'],
    ],
)
def test_not_beside_another_and_not_when_switched_off(argv: list[str]) -> None:
    assert connector_flags(["model", *argv]) == []


@pytest.mark.parametrize("config", ["{", "[]", '{"tokencake": 1}', '{"tokencake": {"space": {}}}', "{}"])
def test_what_is_malformed_is_left_for_the_engine_to_name(config: str) -> None:
    assert connector_flags(["--additional-config", config]) != []
