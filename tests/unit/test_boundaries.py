"""The arrows of the house: who may import whom."""

import ast
import sys
from collections.abc import Collection
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


ROOMS = {
    "tokencake": [
        {"protocol"},
        {"forecast"},
        {"registry"},
        {"space_scheduler", "time_scheduler"},
        {"policies"},
    ],
    "tokencake_vllm": [
        {"vllm_adapter"},
        {"transfer"},
        {"space_scheduler", "time_scheduler"},
        {"api"},
    ],
    "tokencake_sim": [
        {"workload"},
        {"clients", "device"},
        {"engine"},
        {"baseline", "measure"},
        {"capture"},
    ],
}
"""The sub-packages of a package in floors, lowest first. A room imports only from floors below its own."""


def module_of(file: Path, root: Path) -> str:
    """The dotted name of a file of a package."""
    parts = file.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def runtime_imports(tree: ast.AST, modules: Collection[str]) -> set[str]:
    """Those of `modules` that are imported at run time: imports for type checkers only do not count."""
    names: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for full in (f"{node.module}.{alias.name}" for alias in node.names):
                names.add(full if full in modules else node.module)
        waiting += ast.iter_child_nodes(node)
    return names & set(modules)


def import_graph(package: str) -> dict[str, set[str]]:
    """Which modules of the package each of them imports at run time."""
    root = PACKAGES[package]
    files = {module_of(file, root): file for file in root.rglob("*.py")}
    return {name: runtime_imports(ast.parse(file.read_text()), files) - {name} for name, file in files.items()}


def room_of(module: str) -> str | None:
    """The sub-package that a module lies in; None at the top of its package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (PACKAGES[parts[0]] / parts[1]).is_dir() else None


@pytest.mark.parametrize("package", ROOMS)
def test_every_room_has_its_floor(package: str) -> None:
    rooms = {file.parent.name for file in PACKAGES[package].glob("*/__init__.py")}
    assert rooms == set().union(*ROOMS[package])


@pytest.mark.parametrize("package", ROOMS)
def test_a_room_imports_from_floors_below_only(package: str) -> None:
    floor = {room: number for number, rooms in enumerate(ROOMS[package]) for room in rooms}
    upwards = [
        f"{module} -> {other}"
        for module, others in import_graph(package).items()
        for other in sorted(others)
        if (here := room_of(module)) is not None
        and (there := room_of(other)) not in (None, here)
        and floor[there] >= floor[here]
    ]
    assert not upwards


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    graph = import_graph(package)
    left = dict(graph)
    while free := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in free}
    assert not left, "each of these imports another of them"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_is_longer_than_a_reader_likes(package: str) -> None:
    long = {
        file.name: lines
        for file in PACKAGES[package].rglob("*.py")
        if (lines := len(file.read_text().splitlines())) > 350
    }
    assert not long
