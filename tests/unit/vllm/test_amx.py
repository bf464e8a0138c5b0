"""The AMX registers are asked for where vLLM's CPU kernels use them, and nowhere else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

import torch
import vllm.platforms

from tokencake_vllm import plugin
from tokencake_vllm.amx import request_amx


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`machine(is_cpu=..., has_amx=..., ask=...)` is what vLLM and torch then say; `asked` counts."""
    state = SimpleNamespace(asked=0)

    def make(*, is_cpu: bool = True, has_amx: bool = True, grants: bool = True, fails: bool = False) -> Any:
        def ask() -> bool:
            state.asked += 1
            if fails:
                raise OSError("no arch_prctl here")
            return grants

        monkeypatch.setattr(vllm.platforms, "current_platform", SimpleNamespace(is_cpu=lambda: is_cpu), raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
        monkeypatch.setattr(torch.cpu, "_init_amx", ask)
        return state

    return make


def test_a_cpu_with_amx_is_asked_for_its_registers(machine: Any) -> None:
    state = machine()
    request_amx()
    assert state.asked == 1


@pytest.mark.parametrize("options", [{"is_cpu": False}, {"has_amx": False}])
def test_nothing_is_asked_where_vllm_computes_elsewhere_or_without_amx(machine: Any, options: dict[str, bool]) -> None:
    state = machine(**options)
    request_amx()
    assert state.asked == 0


@pytest.mark.parametrize("options", [{"grants": False}, {"fails": True}])
def test_a_refusal_is_no_error(machine: Any, options: dict[str, bool]) -> None:
    state = machine(**options)
    request_amx()
    assert state.asked == 1


def test_a_torch_without_the_call_is_no_error(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine()
    monkeypatch.delattr(torch.cpu, "_init_amx")
    request_amx()
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    request_amx()


def test_every_vllm_process_asks_when_it_loads_its_plug_ins(machine: Any) -> None:
    """`plugin.register` is the entry point that vLLM runs in each worker before it builds its model."""
    state = machine()
    plugin.register()
    assert state.asked == 1


def test_the_installed_torch_has_both_calls() -> None:
    assert torch.cpu._is_amx_tile_supported() in (True, False)
    assert torch.cpu._init_amx() in (True, False)
