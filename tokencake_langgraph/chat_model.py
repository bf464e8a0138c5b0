"""How does an app call a model and let the engine know who is calling?

`ChatTokencake` is a `ChatOpenAI` for vLLM: an app moves over by its import and its constructor. Everything that
`ChatOpenAI` can do is inherited; here stands what differs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import cached_property, wraps
from typing import Annotated, Any, Final, Self, TypeVar, cast

import openai
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models.base import LanguageModelInput
from langchain_core.load.serializable import SerializedConstructor, SerializedNotImplemented
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_openai import ChatOpenAI
from pydantic import Field, model_validator

from tokencake import __version__
from tokencake.protocol.parsing import MAX_SECONDS
from tokencake_langgraph.estimates import estimates_of
from tokencake_langgraph.handler import TokencakeHandler
from tokencake_langgraph.lifecycle import CURRENT_CALL, LIFECYCLE
from tokencake_langgraph.request import stamp, tool_names
from tokencake_langgraph.response import REASONING_KEY, OncePerStream, lift_chunk, lift_result
from tokencake_langgraph.sender import EventSender, Target, events_url
from tokencake_langgraph.senders import sender_for
from tokencake_langgraph.settings import with_endpoint

_RunManager = CallbackManagerForLLMRun | AsyncCallbackManagerForLLMRun
_AnyRunManager = TypeVar("_AnyRunManager", CallbackManagerForLLMRun, AsyncCallbackManagerForLLMRun)
_Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS)]
_Method = TypeVar("_Method", bound=Callable[..., Any])
_KEY_VARIABLE: Final = "TOKENCAKE_API_KEY"
logger = logging.getLogger(__name__)


def _in_place_of(method: _Method) -> Callable[[Callable[..., Any]], _Method]:
    """Give an override the signature of the method it replaces: LangChain's packages look for parameters in it."""
    return lambda override: cast("_Method", wraps(method)(override))


class ChatTokencake(ChatOpenAI):
    """`ChatOpenAI` whose calls carry their agent's identity, and whose tools report when they run.

    Takes every argument of `ChatOpenAI`. Different are: the base URL defaults to `TOKENCAKE_BASE_URL`, else the
    `OPENAI_` variables, else the proxy on this machine; the key to `TOKENCAKE_API_KEY`, and never to `OPENAI_API_KEY`
    for a server that the `OPENAI_` variables do not name; streams report their token usage; the Responses API is
    refused; an `extra_body` or `extra_headers` of a call is merged with the model's.

    ```python
    model = ChatTokencake(model="Qwen/Qwen3-8B", tool_estimates={"search": 4.0})
    agent = create_agent(model, [search])
    ```
    """

    stream_usage: bool | None = True
    use_responses_api: bool | None = False
    tokencake_enabled: bool = True
    """False: a plain `ChatOpenAI`, no hint and no events."""
    tool_estimates: dict[str, _Seconds] = Field(default_factory=dict)
    """Tool name -> seconds it is expected to take. Wins over what a tool's own metadata says."""
    importance: float | None = Field(default=None, ge=0, le=10)
    """The weight of this model's calls against other applications', if they are to differ."""
    expected_output_tokens: int | None = Field(default=None, ge=0, le=1_000_000)

    # --- what it is -----------------------------------------------------------------------------------

    @model_validator(mode="before")
    @classmethod
    def _fill_in_endpoint(cls, values: dict[str, Any]) -> dict[str, Any]:
        return with_endpoint(values, os.environ)

    @model_validator(mode="after")
    def _join_tokencake(self) -> Self:
        if self.use_responses_api:
            raise ValueError(
                "`use_responses_api` is True; ChatTokencake speaks Chat Completions only. "
                "Leave it out, or take ChatOpenAI for this model."
            )
        self._add_version("tokencake", __version__)
        if self.tokencake_enabled:
            # Here, because an event for a call of an earlier process goes to the only sender there is.
            _ = self._sender
        return self

    # Cached properties, because looking up a private attribute of pydantic's takes longer than using it.

    @cached_property
    def _sender(self) -> EventSender:
        headers = tuple(sorted((self.default_headers or {}).items()))
        url = events_url(self.openai_api_base or "")
        return sender_for(Target(url, self.openai_api_key, headers, self.openai_proxy))

    @cached_property
    def _bound_estimates(self) -> dict[str, float]:
        return {}

    @property
    def lc_secrets(self) -> dict[str, str]:
        """Environment variables that hold the secrets."""
        return {"openai_api_key": _KEY_VARIABLE}

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """Where LangChain finds the class when it loads a model."""
        return ["tokencake_langgraph"]

    def to_json(self) -> SerializedConstructor | SerializedNotImplemented:
        """`ChatOpenAI`'s, with the variable of the key: LangChain lets a parent's name for a secret win."""
        serialized = super().to_json()
        arguments: Any = serialized.get("kwargs", {})
        if "openai_api_key" in arguments:
            arguments["openai_api_key"] = {"lc": 1, "type": "secret", "id": [_KEY_VARIABLE]}
        return serialized

    def _use_responses_api(self, payload: dict[str, Any]) -> bool:  # noqa: ARG002 - ChatOpenAI goes by the model's name
        return False

    @_in_place_of(ChatOpenAI.bind_tools)
    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[LanguageModelInput, AIMessage]:
        """Bind tools; the estimates in their metadata are remembered for the hint."""
        tools = list(tools)  # an iterator can be read once only
        if self.tokencake_enabled:
            self._bound_estimates.update(estimates_of(tools))
        return super().bind_tools(tools, **kwargs)

    # --- the request ----------------------------------------------------------------------------------
    # `_stream` and `_astream` are given no run manager: theirs is the current call of the context. `generate` starts
    # the runs of several lists of messages all at once, and a call cancelled in flight is never reported to end. Both
    # are put right in the two methods that are called once per list and know its run.

    def _generate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        if run_manager is None:
            return super()._generate_with_cache(messages, stop, run_manager, **kwargs)
        CURRENT_CALL.set(run_manager.run_id)
        try:
            return super()._generate_with_cache(messages, stop, _without_us(run_manager), **kwargs)
        except BaseException:
            LIFECYCLE.close_call(run_manager.run_id)
            raise

    async def _agenerate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        if run_manager is None:
            return await super()._agenerate_with_cache(messages, stop, run_manager, **kwargs)
        CURRENT_CALL.set(run_manager.run_id)
        try:
            return await super()._agenerate_with_cache(messages, stop, _without_us(run_manager), **kwargs)
        except BaseException:
            LIFECYCLE.close_call(run_manager.run_id)
            raise

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        stamped = self._stamped(run_manager, kwargs)
        return super()._generate(messages, stop=stop, run_manager=run_manager, **stamped)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        stamped = self._stamped(run_manager, kwargs)
        return await super()._agenerate(messages, stop=stop, run_manager=run_manager, **stamped)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        once = OncePerStream()
        stamped = self._stamped(run_manager, kwargs)
        for chunk in super()._stream(messages, stop=stop, run_manager=run_manager, **stamped):
            yield once(chunk)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        once = OncePerStream()
        stamped = self._stamped(run_manager, kwargs)
        async for chunk in super()._astream(messages, stop=stop, run_manager=run_manager, **stamped):
            yield once(chunk)

    def _stamped(self, run_manager: _RunManager | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """`kwargs` with the hint; unchanged where it is not known who calls."""
        run_id = run_manager.run_id if run_manager else CURRENT_CALL.get()
        if run_id is None or not self.tokencake_enabled:
            return kwargs
        try:
            hint = LIFECYCLE.claim_call(
                run_id,
                self._sender,
                tools=tool_names(kwargs.get("tools") or self.model_kwargs.get("tools") or ()),
                estimates={**self._bound_estimates, **self.tool_estimates},
                importance=self.importance,
                expected_output_tokens=self.expected_output_tokens,
            )
            if hint is None:
                return kwargs
            return stamp(kwargs, {"extra_body": self.extra_body, **self.model_kwargs}, self.default_headers or {}, hint)
        except Exception:
            logger.exception("TokenCake could not stamp call %s; it is made without a hint.", run_id)
            return kwargs

    # --- the response ---------------------------------------------------------------------------------

    def _create_chat_result(
        self, response: dict[str, Any] | openai.BaseModel, generation_info: dict[str, Any] | None = None
    ) -> ChatResult:
        result = super()._create_chat_result(response, generation_info)
        lift_result(response, result)
        return result

    def _convert_chunk_to_generation_chunk(
        self, chunk: dict[str, Any], default_chunk_class: type, base_generation_info: dict[str, Any] | None
    ) -> ChatGenerationChunk | None:
        generation = super()._convert_chunk_to_generation_chunk(chunk, default_chunk_class, base_generation_info)
        if generation is not None:
            lift_chunk(chunk, generation)
        return generation

    def _get_generation_chunk_from_completion(self, completion: openai.BaseModel) -> ChatGenerationChunk:
        generation = super()._get_generation_chunk_from_completion(completion)
        # The stream has brought the reasoning already, piece by piece.
        generation.message.additional_kwargs.pop(REASONING_KEY, None)
        return generation


def _without_us(run_manager: _AnyRunManager) -> _AnyRunManager:
    """The run manager for the time of the call: our handler does not care for tokens.

    LangChain checks each of its handlers against protocols, which before Python 3.12 costs more than all our callbacks.
    """
    quiet = object.__new__(type(run_manager))
    handlers = [handler for handler in run_manager.handlers if type(handler) is not TokencakeHandler]
    vars(quiet).update(vars(run_manager), handlers=handlers)
    return quiet
