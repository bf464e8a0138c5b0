"""`tokencake serve --tenants` starts an engine and a proxy that agree on whom to keep apart."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from tokencake.protocol.tenancy import SECRET_VARIABLE
from tokencake.settings import section
from tokencake.space_scheduler.settings import SpaceSettings
from tokencake_cli import main as cli
from tokencake_cli.launch import Launch, launch_with_tenants
from tokencake_cli.processes import StartError

KEYS = ["--api-key", "alice", "bob"]


def launch(*flags: str, tmp_path: Path, shares_prefixes: bool = False, **environ: str) -> Launch:
    environ.setdefault("XDG_STATE_HOME", str(tmp_path))
    return launch_with_tenants(flags, environ, None, shares_prefixes=shares_prefixes)


def space_of(flags: list[str]) -> SpaceSettings:
    return section(json.loads(flags[flags.index("--additional-config") + 1]), "space", SpaceSettings)


@pytest.mark.parametrize("shares_prefixes", [False, True])
def test_both_sides_are_told_and_have_one_secret(tmp_path: Path, shares_prefixes: bool) -> None:
    found = launch(*KEYS, "--dtype", "auto", tmp_path=tmp_path, shares_prefixes=shares_prefixes)

    assert found.engine_flags[:5] == [*KEYS, "--dtype", "auto"]
    space = space_of(found.engine_flags)
    assert (space.tenant_mark, space.tenants_share_prefixes) == ("::", shares_prefixes)
    assert found.proxy_flags == ["--tenants", *(["--tenants-share-prefixes"] if shares_prefixes else [])]
    assert found.environment == {SECRET_VARIABLE: (tmp_path / "tokencake" / "tenant-secret").read_text().strip()}


@pytest.mark.parametrize("is_joined", [False, True])
def test_what_the_user_has_set_stays(tmp_path: Path, is_joined: bool) -> None:
    own = json.dumps({"tokencake": {"space": {"policy": "paper"}, "time": {"enabled": False}}, "other": 1})
    flags = [f"--additional-config={own}"] if is_joined else ["--additional-config", own]

    found = launch(*flags, *KEYS, tmp_path=tmp_path).engine_flags

    config = json.loads(found[found.index("--additional-config") + 1])
    assert (config["other"], config["tokencake"]["time"]) == (1, {"enabled": False})
    assert (space_of(found).policy, space_of(found).tenant_mark) == ("paper", "::")
    assert found.count("--additional-config") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "name these: --api-key KEY"),
        ([*KEYS, "--additional-config", "{"], "expected a JSON object"),
        ([*KEYS, "--additional-config", "[]"], "expected a JSON object"),
        ([*KEYS, "--additional-config", '{"tokencake": {"space": 7}}'], "expected a JSON object"),
        ([*KEYS, "--additional-config.tokencake.space.policy=paper"], "as one JSON object"),
        ([*KEYS, '--additional-config={"tokencake": {"space": {"tenants_share_prefixes": true}}}'], "wants False"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(tmp_path: Path, flags: list[str], words: str) -> None:
    with pytest.raises(StartError, match=words):
        launch(*flags, tmp_path=tmp_path)


@pytest.mark.parametrize("keys", [{"flags": ["--api-key=alice"]}, {"flags": ["--config", "f"]}, {"VLLM_API_KEY": "k"}])
def test_keys_may_be_named_in_each_of_vllms_ways(tmp_path: Path, keys: dict[str, Any]) -> None:
    flags = keys.pop("flags", [])
    assert launch(*flags, tmp_path=tmp_path, **keys).proxy_flags == ["--tenants"]


def test_serve_starts_both_with_what_keeps_tenants_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: dict[str, tuple[list[str], dict[str, str]]] = {}

    class Processes:
        def __init__(self, log_dir: Path) -> None:
            self.log_dir = log_dir

        def start(self, name: str, command: list[str], environment: dict[str, str]) -> None:
            started[name] = command, environment

        def wait_until_healthy(self, *_: object, **__: object) -> None:
            raise StartError("enough")

    monkeypatch.setattr(cli, "Processes", lambda log_dir: contextlib.nullcontext(Processes(log_dir)))
    monkeypatch.setattr(cli, "raise_on_sigterm", lambda: None)
    monkeypatch.setenv(SECRET_VARIABLE, "the secret of the tests")

    for flags in (["--tenants", *KEYS], KEYS):
        assert cli.main(["serve", "some/model", "--port", "0", "--engine-port", "0", *flags]) == 1
        (engine, of_engine), (proxy, of_proxy) = started["engine"], started["proxy"]
        is_on = "--tenants" in flags
        assert ("--tenants" in proxy, "--additional-config" in engine) == (is_on, is_on)
        assert of_engine == of_proxy == ({SECRET_VARIABLE: "the secret of the tests"} if is_on else {})
