"""The examples in the docstring of `ChatTokencake` run, and the arguments that it lists exist."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import TYPE_CHECKING

import pytest

from tokencake_langgraph import ChatTokencake

if TYPE_CHECKING:
    from tests.unit.langgraph.scripted_engine import ScriptedEngine

DOCSTRING = inspect.getdoc(ChatTokencake) or ""
SECTIONS = re.split(r"^(?=\S[^\n]*:$)", DOCSTRING, flags=re.MULTILINE)


def test_the_sections_are_those_of_langchains_own_chat_models() -> None:
    names = [section.split(":\n")[0] for section in SECTIONS[1:]]

    assert [name for name in names if not name.startswith("Key init args")] == [
        "Setup",
        "Instantiate",
        "Invoke",
        "Stream",
        "Bind tools",
        "Agents",
        "Response metadata",
    ]


def test_each_argument_in_the_docstring_is_one_of_the_model() -> None:
    listed = [
        argument
        for section in SECTIONS
        if section.startswith("Key init args")
        for argument in re.findall(r"^    (\w+): \S", section, flags=re.MULTILINE)
    ]
    fields = ChatTokencake.model_fields
    known = {*fields, *(field.alias for field in fields.values())}

    assert len(listed) == 11
    assert set(listed) <= known


def test_the_examples_run(
    engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOKENCAKE_BASE_URL", engine.base_url)
    scope: dict[str, object] = {"__name__": __name__}

    for example in re.findall(r"```python\n(.*?)^ *```", DOCSTRING, flags=re.DOTALL | re.MULTILINE):
        exec(textwrap.dedent(example), scope)

    model = scope["model"]
    assert isinstance(model, ChatTokencake)
    assert model.tool_estimates == {"search": 4.0}
    hints = [request.hint for request in engine.requests]
    assert len(hints) == 4
    assert hints[-1].expects_tools == {"search": 4.0}
    assert capsys.readouterr().out
