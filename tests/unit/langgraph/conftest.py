"""One scripted engine for all tests of the client; no test may leave a run open."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiktoken

from tests.unit.langgraph.scripted_engine import ScriptedEngine

os.environ["LANGSMITH_TRACING"] = "false"

from tokencake_langgraph import ChatTokencake, flush, senders
from tokencake_langgraph.calls import CallTable
from tokencake_langgraph.lifecycle import LIFECYCLE


@pytest.fixture(scope="session")
def server() -> Iterator[ScriptedEngine]:
    engine = ScriptedEngine()
    yield engine
    engine.close()


@pytest.fixture
def engine(server: ScriptedEngine) -> Iterator[ScriptedEngine]:
    server.reset()
    yield server
    server.release()
    flush(2)


@pytest.fixture
def make_model(engine: ScriptedEngine) -> Callable[..., ChatTokencake]:
    def make(**settings: Any) -> ChatTokencake:
        return ChatTokencake(**{"model": "fake", "base_url": engine.base_url, "max_retries": 0, **settings})

    return make


@pytest.fixture
def model(make_model: Callable[..., ChatTokencake]) -> ChatTokencake:
    return make_model()


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting tokens fetches the vocabulary of OpenAI's models; here a token is a byte."""
    ranks = {bytes([number]): number for number in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda _: encoding)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: encoding)


@pytest.fixture(autouse=True)
def _clean_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OPENAI_API_KEY", "OPENAI_API_BASE", "OPENAI_BASE_URL", "TOKENCAKE_API_KEY", "TOKENCAKE_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    senders._senders.clear()
    monkeypatch.setattr(LIFECYCLE, "_calls", CallTable())
    yield
    assert len(LIFECYCLE._tree) == 0
