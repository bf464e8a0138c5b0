"""The arrows of the house: who may import whom."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = {"tokencake", "tokencake_cli", "tokencake_langgraph", "tokencake_proxy", "tokencake_sim", "tokencake_vllm"}
PACKAGES = {
    "tokencake": ROOT / "engine" / "tokencake",
    "tokencake_sim": ROOT / "engine" / "tokencake_sim",
    "tokencake_vllm": ROOT / "engine" / "tokencake_vllm",
    "tokencake_langgraph": ROOT / "tokencake_langgraph",
    "tokencake_proxy": ROOT / "proxy" / "tokencake_proxy",
    "tokencake_cli": ROOT / "proxy" / "tokencake_cli",
}
MAY_IMPORT = {
    "tokencake": set(),
    "tokencake_sim": {"tokencake", "tokencake_vllm"},
    "tokencake_vllm": {"tokencake"},
    "tokencake_langgraph": {"tokencake"},
    "tokencake_proxy": {"tokencake"},
    "tokencake_cli": {"tokencake", "tokencake_proxy"},
}


def imports_of(file: Path) -> set[str]:
    """Top-level names of every module that `file` imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def imports_of_package(package: str) -> set[str]:
    return set().union(*(imports_of(file) for file in PACKAGES[package].rglob("*.py"))) - {package}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_its_arrow_points_to(package: str) -> None:
    assert imports_of_package(package) & OURS <= MAY_IMPORT[package]


def test_the_core_needs_the_standard_library_only() -> None:
    assert imports_of_package("tokencake") <= set(sys.stdlib_module_names)


def test_the_core_has_no_clock_no_randomness_and_no_io() -> None:
    impure = {"time", "random", "secrets", "os", "io", "socket", "threading", "asyncio", "pathlib", "subprocess"}
    assert imports_of_package("tokencake").isdisjoint(impure)


@pytest.mark.parametrize("package", ["tokencake", "tokencake_langgraph", "tokencake_proxy"])
def test_only_the_plug_in_and_its_simulator_import_vllm(package: str) -> None:
    assert "vllm" not in imports_of_package(package)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_ships_its_types(package: str) -> None:
    assert (PACKAGES[package] / "py.typed").exists()
