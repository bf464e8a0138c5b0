"""Other packages read from a `ChatTokencake` what they read from a `ChatOpenAI`; each difference has a reason.

All members of the two classes are compared, as they are found; the tables name those that may differ.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from langchain_openai import ChatOpenAI
from langchain_openai.chat_models.base import BaseChatOpenAI

from tokencake_langgraph import ChatTokencake

SETTINGS: dict[str, Any] = {"model": "fake", "base_url": "http://127.0.0.1:9/v1", "api_key": "k"}

FIELDS = {
    "expected_output_tokens": "sent to the engine",
    "importance": "sent to the engine",
    "stream_usage": "vLLM reports the usage of streams; ChatOpenAI asks for it at OpenAI's own address only",
    "tokencake_enabled": "the switch",
    "tool_estimates": "sent to the engine",
    "use_responses_api": "Chat Completions only",
}

OVERRIDDEN = {
    "_agenerate": "adds the hint",
    "_agenerate_with_cache": "streams get no run manager; a cancelled call is never reported to end",
    "_astream": "adds the hint",
    "_bound_estimates": "of the tools that were bound",
    "_convert_chunk_to_generation_chunk": "keeps the reasoning and the engine's report",
    "_create_chat_result": "keeps the reasoning and the engine's report",
    "_fill_in_endpoint": "base URL and key of a server that is not OpenAI's",
    "_generate": "adds the hint",
    "_generate_with_cache": "as _agenerate_with_cache",
    "_get_generation_chunk_from_completion": "the reasoning has come already",
    "_set_up_tokencake": "refuses the Responses API, finds the sender of the events",
    "_sender": "where the events go",
    "_with_hint": "adds the hint",
    "_stream": "adds the hint",
    "_use_responses_api": "Chat Completions only, for any model name",
    "bind_tools": "remembers the estimates of the tools",
    "get_lc_namespace": "where the class is found",
    "lc_secrets": "OPENAI_API_KEY is OpenAI's",
    "to_json": "OPENAI_API_KEY is OpenAI's",
}

SIGNATURES = {
    "_astream": "ChatOpenAI's is (*args, **kwargs); ours names what it reads",
    "_stream": "ChatOpenAI's is (*args, **kwargs); ours names what it reads",
}

VALUES = {
    "_get_llm_string": "what to_json says",
    "_serialized": "what to_json says",
    "_should_stream_usage": "the field stream_usage",
    "construct": "the own fields",
    "get_lc_namespace": "where the class is found",
    "json": "the own fields",
    "lc_id": "where the class is found",
    "lc_secrets": "OPENAI_API_KEY is OpenAI's",
    "metadata": "the version of this package as well",
    "model_construct": "the own fields",
    "model_dump": "the own fields",
    "model_dump_json": "the own fields",
    "model_fields": "the own fields",
    "to_json": "the class's place, the own fields, the key's variable",
    "to_json_not_implemented": "the class's place",
}


pytestmark = pytest.mark.usefixtures("no_download")


def own_members(cls: type) -> dict[str, Any]:
    return {name: inspect.getattr_static(cls, name) for name in dir(cls)}


def differing(cls: type) -> set[str]:
    """The members of `cls` that are not `ChatOpenAI`'s."""
    theirs, ours = own_members(ChatOpenAI), own_members(cls)
    return {name for name in theirs.keys() | ours.keys() if theirs.get(name) is not ours.get(name)}


class Plain(ChatOpenAI):
    """What Python and Pydantic make anew for every subclass."""

    note: int = 0


def test_each_member_that_differs_from_chat_openai_has_a_reason() -> None:
    assert differing(ChatTokencake) - differing(Plain) == OVERRIDDEN.keys()


def test_each_field_that_differs_from_chat_openai_has_a_reason() -> None:
    theirs = {name: repr(field) for name, field in ChatOpenAI.model_fields.items()}
    ours = {name: repr(field) for name, field in ChatTokencake.model_fields.items()}
    assert {name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)} == FIELDS.keys()
    arguments = inspect.signature(ChatTokencake).parameters
    assert inspect.signature(ChatOpenAI).parameters.keys() == arguments.keys() - (FIELDS.keys() - theirs.keys())


def parameters(cls: type, name: str) -> Any:
    """The signature; of a private member without its annotations. None for what cannot be called."""
    member = getattr(cls, name, None)
    if not callable(member):
        return None
    signature = inspect.signature(member)
    if not name.startswith("_"):
        return signature
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


def test_each_signature_that_differs_from_chat_openai_has_a_reason() -> None:
    names = [name for name in dir(ChatOpenAI) if not name.startswith("__")]
    others = {name for name in names if parameters(ChatOpenAI, name) != parameters(ChatTokencake, name)}
    assert others == SIGNATURES.keys()
    for name in SIGNATURES:
        assert inspect.signature(getattr(ChatTokencake, name)).parameters.keys() <= (
            inspect.signature(getattr(BaseChatOpenAI, name)).parameters.keys()
        )


def value(cls: type[ChatOpenAI], name: str) -> str:
    """What a fresh model's attribute is, or what its method returns if it can be called without arguments."""
    model = cls(**SETTINGS)
    text = repr(_called(getattr(model, name, None)))
    for own, common in ((repr(model), "<model>"), (cls.__module__, "<module>"), (cls.__name__, "<class>")):
        text = text.replace(own, common)
    return re.sub(r"0x[0-9a-f]+|[0-9a-f]{32}", "#", text)


def _called(found: Any) -> Any:
    if not callable(found) or isinstance(found, type):
        return found
    try:
        inspect.signature(found).bind()
    except TypeError:
        return "needs arguments"
    if inspect.iscoroutinefunction(found) or inspect.isasyncgenfunction(found):
        return "asynchronous"
    try:
        return found()
    except Exception as error:  # noqa: BLE001 - both have to fail in the same way
        return error


@pytest.mark.filterwarnings("ignore")  # some are deprecated
def test_each_value_that_differs_from_chat_openai_has_a_reason() -> None:
    names = {name for name in dir(ChatOpenAI(**SETTINGS)) if not name.startswith("__")} - SIGNATURES.keys()
    others = {name for name in names if value(ChatOpenAI, name) != value(ChatTokencake, name)}
    assert others == VALUES.keys() | (FIELDS.keys() & names)
