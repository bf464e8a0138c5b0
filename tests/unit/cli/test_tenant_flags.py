"""`tokencake serve --tenants` starts an engine and a proxy that isolate the same tenants."""

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
from tokencake_cli.processes import StartError
from tokencake_cli.tenant_flags import ServeFlags, tenant_flags

KEYS = ["--api-key", "alice", "bob"]


def flags_of(*flags: str, tmp_path: Path, shares_prefixes: bool = False, **environ: str) -> ServeFlags:
    environ.setdefault("XDG_STATE_HOME", str(tmp_path))
    return tenant_flags(flags, environ, None, shares_prefixes=shares_prefixes)


def space_of(flags: list[str]) -> SpaceSettings:
    return section(json.loads(flags[flags.index("--additional-config") + 1]), "space", SpaceSettings)


@pytest.mark.parametrize("shares_prefixes", [False, True])
def test_engine_and_proxy_isolate_tenants_with_one_secret(tmp_path: Path, shares_prefixes: bool) -> None:
    found = flags_of(*KEYS, "--dtype", "auto", tmp_path=tmp_path, shares_prefixes=shares_prefixes)

    assert found.engine_flags[:5] == [*KEYS, "--dtype", "auto"]
    space = space_of(found.engine_flags)
    assert (space.tenant_mark, space.tenants_share_prefixes) == ("::", shares_prefixes)
    assert found.proxy_flags == ["--tenants", *(["--tenants-share-prefixes"] if shares_prefixes else [])]
    assert found.environment == {SECRET_VARIABLE: (tmp_path / "tokencake" / "tenant-secret").read_text().strip()}


@pytest.mark.parametrize("is_joined", [False, True])
def test_the_users_own_settings_stay(tmp_path: Path, is_joined: bool) -> None:
    own = json.dumps({"tokencake": {"space": {"policy": "paper"}, "time": {"enabled": False}}, "other": 1})
    flags = [f"--additional-config={own}"] if is_joined else ["--additional-config", own]

    found = flags_of(*flags, *KEYS, tmp_path=tmp_path).engine_flags

    config = json.loads(found[found.index("--additional-config") + 1])
    assert (config["other"], config["tokencake"]["time"]) == (1, {"enabled": False})
    assert (space_of(found).policy, space_of(found).tenant_mark) == ("paper", "::")
    assert found.count("--additional-config") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "give them: --api-key KEY"),
        ([*KEYS, "--additional-config", "{"], "expected a JSON object"),
        ([*KEYS, "--additional-config", "[]"], "expected a JSON object"),
        ([*KEYS, "--additional-config", '{"tokencake": {"space": 7}}'], "expected a JSON object"),
        ([*KEYS, "--additional-config.tokencake.space.policy=paper"], "as one JSON object"),
        ([*KEYS, '--additional-config={"tokencake": {"space": {"tenants_share_prefixes": true}}}'], "needs False"),
    ],
)
def test_contradicting_flags_are_refused_with_the_way_out(tmp_path: Path, flags: list[str], words: str) -> None:
    with pytest.raises(StartError, match=words):
        flags_of(*flags, tmp_path=tmp_path)


@pytest.mark.parametrize("keys", [{"flags": ["--api-key=alice"]}, {"flags": ["--config", "f"]}, {"VLLM_API_KEY": "k"}])
def test_keys_may_be_given_in_each_of_vllms_ways(tmp_path: Path, keys: dict[str, Any]) -> None:
    flags = keys.pop("flags", [])
    assert flags_of(*flags, tmp_path=tmp_path, **keys).proxy_flags == ["--tenants"]


def test_serve_starts_both_processes_with_the_tenant_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
