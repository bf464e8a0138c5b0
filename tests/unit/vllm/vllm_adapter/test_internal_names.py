"""Internals of vLLM are used in one room, which lists them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

import tokencake_vllm
from tokencake_vllm.vllm_adapter import INTERNAL_NAMES

PLUGIN = Path(tokencake_vllm.__file__).parent
ADAPTER = PLUGIN / "vllm_adapter"


def attributes_of(file: Path) -> set[str]:
    """The names of all attributes that a module reads or sets."""
    return {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}


def test_no_other_room_uses_an_internal_name() -> None:
    others = (file for file in PLUGIN.rglob("*.py") if ADAPTER not in file.parents)
    assert {file.name: found for file in others if (found := attributes_of(file) & INTERNAL_NAMES)} == {}


def test_every_name_on_the_list_is_used() -> None:
    used = set().union(*(attributes_of(file) for file in ADAPTER.glob("*.py")))
    assert used >= INTERNAL_NAMES


def test_what_is_private_by_its_name_is_on_the_list() -> None:
    private = {
        node.attr
        for file in ADAPTER.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")
    }
    assert private <= INTERNAL_NAMES
