"""`ChatTokencake`, a `ChatOpenAI` whose requests carry a hint.

An application changes its import and its constructor. The rest of `ChatOpenAI` is inherited; this module has the
differences.
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
from tokencake_langgraph.handler import without_handler
from tokencake_langgraph.lifecycle import CURRENT_CALL, LIFECYCLE
from tokencake_langgraph.request import attach_hint, tool_names
from tokencake_langgraph.response import REASONING_KEY, ReportOncePerStream, copy_vllm_chunk_fields, copy_vllm_fields
from tokencake_langgraph.sender import EventSender, EventTarget, events_url
from tokencake_langgraph.senders import sender_for
from tokencake_langgraph.settings import with_endpoint

_RunManager = CallbackManagerForLLMRun | AsyncCallbackManagerForLLMRun
_Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS)]
_Method = TypeVar("_Method", bound=Callable[..., Any])
_KEY_VARIABLE: Final = "TOKENCAKE_API_KEY"
logger = logging.getLogger(__name__)


def _with_signature_of(method: _Method) -> Callable[[Callable[..., Any]], _Method]:
    """Give an override the signature of the method that it replaces, because LangChain's packages inspect it."""
    return lambda override: cast("_Method", wraps(method)(override))


class ChatTokencake(ChatOpenAI):
    """`ChatOpenAI` for vLLM with TokenCake: its calls carry their agent's identity, and its tools report their runs.

    It takes every argument of `ChatOpenAI`, and differs from it in these points: base URL and API key have other
    defaults (see below), streams report their token usage, the Responses API is refused, and the `extra_body` or
    `extra_headers` of a call is merged with the model's.

    Setup:
        Install the package and set where the proxy is, unless it is on this machine.

        ```bash
        pip install 'tokencake[langgraph]'
        export TOKENCAKE_BASE_URL="http://my-server:8700/v1"
        export TOKENCAKE_API_KEY="my-key"
        ```

    Key init args (completion params):
        model: str
            The model that vLLM serves.
        temperature: float | None
            Sampling temperature.
        max_completion_tokens: int | None
            Max number of tokens to generate.

    Key init args (client params):
        base_url: str | None
            Default: `TOKENCAKE_BASE_URL`, else the variables of `ChatOpenAI`, else the proxy on this machine.
        api_key: str | None
            Default: `TOKENCAKE_API_KEY`. `OPENAI_API_KEY` is used only for a server that an `OPENAI_` variable names.
        timeout: float | None
            Timeout for requests, in seconds.
        max_retries: int | None
            Max number of retries.

    Key init args (TokenCake):
        tool_estimates: dict[str, float]
            Tool name -> expected duration in seconds. Optional: the engine learns durations.
        importance: float | None
            Weight of this model's calls against those of other applications, 0 to 10.
        expected_output_tokens: int | None
            Expected length of a response.
        tokencake_enabled: bool
            False makes it a plain `ChatOpenAI`: no hints and no events.

    Instantiate:
        ```python
        from tokencake_langgraph import ChatTokencake

        model = ChatTokencake(model="Qwen/Qwen3-8B", temperature=0, tool_estimates={"search": 4.0})
        ```

    Invoke:
        ```python
        model.invoke([("system", "You translate to French."), ("human", "I love programming.")]).text
        ```

        `await model.ainvoke(...)` does the same asynchronously.

    Stream:
        ```python
        for chunk in model.stream("Tell me a story."):
            print(chunk.text, end="")
        ```

    Bind tools:
        ```python
        from langchain_core.tools import tool


        @tool
        def search(query: str) -> str:
            '''Search the documentation.'''
            return "nothing found"


        model.bind_tools([search]).invoke("Search for vLLM.").tool_calls
        ```

    Agents:
        ```python
        from langchain.agents import create_agent

        agent = create_agent(model, [search])
        result = agent.invoke({"messages": [("human", "Search for vLLM.")]})
        result["messages"][-1].text
        ```

        The engine now knows that the calls belong to one agent, and how long its tool takes.

    Response metadata:
        `message.response_metadata["tokencake"]` is the engine's report on the call, if there is one. The reasoning of
        the model is in `message.additional_kwargs["reasoning_content"]`.
    """

    stream_usage: bool | None = True
    use_responses_api: bool | None = False
    tokencake_enabled: bool = True
    """False makes it a plain `ChatOpenAI`: no hints and no events."""
    tool_estimates: dict[str, _Seconds] = Field(default_factory=dict)
    """Tool name -> expected seconds. It overrides an estimate in a tool's metadata."""
    importance: float | None = Field(default=None, ge=0, le=10)
    """Weight of this model's calls against those of other applications; None for the default weight."""
    expected_output_tokens: int | None = Field(default=None, ge=0, le=1_000_000)

    # --- construction ---------------------------------------------------------------------------------

    @model_validator(mode="before")
    @classmethod
    def _fill_in_endpoint(cls, values: dict[str, Any]) -> dict[str, Any]:
        return with_endpoint(values, os.environ)

    @model_validator(mode="after")
    def _set_up_tokencake(self) -> Self:
        if self.use_responses_api:
            raise ValueError(
                "`use_responses_api` is True; ChatTokencake supports Chat Completions only. "
                "Omit the argument, or use ChatOpenAI for this model."
            )
        self._add_version("tokencake", __version__)
        if self.tokencake_enabled:
            # The sender must exist now: an event about a call of an earlier process goes to the only sender.
            _ = self._sender
        return self

    # Cached properties, because looking up a private attribute of a pydantic model is slow.

    @cached_property
    def _sender(self) -> EventSender:
        headers = tuple(sorted((self.default_headers or {}).items()))
        url = events_url(self.openai_api_base or "")
        return sender_for(EventTarget(url, self.openai_api_key, headers, self.openai_proxy))

    @cached_property
    def _bound_estimates(self) -> dict[str, float]:
        return {}

    @property
    def lc_secrets(self) -> dict[str, str]:
        """Environment variables that hold the secrets."""
        return {"openai_api_key": _KEY_VARIABLE}

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """The package from which LangChain loads the class."""
        return ["tokencake_langgraph"]

    def to_json(self) -> SerializedConstructor | SerializedNotImplemented:
        """`ChatOpenAI`'s serialisation with this class's key variable, which LangChain overrides with the parent's."""
        serialized = super().to_json()
        arguments: Any = serialized.get("kwargs", {})
        if "openai_api_key" in arguments:
            arguments["openai_api_key"] = {"lc": 1, "type": "secret", "id": [_KEY_VARIABLE]}
        return serialized

    def _use_responses_api(self, payload: dict[str, Any]) -> bool:  # noqa: ARG002 - ChatOpenAI decides by the model's name
        return False

    @_with_signature_of(ChatOpenAI.bind_tools)
    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[LanguageModelInput, AIMessage]:
        """Bind tools; the estimates in their metadata are stored for the hint."""
        tools = list(tools)  # an iterator can be read only once
        if self.tokencake_enabled:
            self._bound_estimates.update(estimates_of(tools))
        return super().bind_tools(tools, **kwargs)

    # --- the request ----------------------------------------------------------------------------------
    # `_stream` and `_astream` get no run manager, so they use the current call of the context. `generate` starts the
    # runs of several lists of messages at once, and LangChain never reports the end of a call that is cancelled in
    # flight. The two methods below are called once per list and know its run, so they handle both.

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
            return super()._generate_with_cache(messages, stop, without_handler(run_manager), **kwargs)
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
            return await super()._agenerate_with_cache(messages, stop, without_handler(run_manager), **kwargs)
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
        hinted = self._with_hint(run_manager, kwargs)
        return super()._generate(messages, stop=stop, run_manager=run_manager, **hinted)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        hinted = self._with_hint(run_manager, kwargs)
        return await super()._agenerate(messages, stop=stop, run_manager=run_manager, **hinted)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        once = ReportOncePerStream()
        hinted = self._with_hint(run_manager, kwargs)
        for chunk in super()._stream(messages, stop=stop, run_manager=run_manager, **hinted):
            yield once(chunk)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        once = ReportOncePerStream()
        hinted = self._with_hint(run_manager, kwargs)
        async for chunk in super()._astream(messages, stop=stop, run_manager=run_manager, **hinted):
            yield once(chunk)

    def _with_hint(self, run_manager: _RunManager | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """`kwargs` with the hint; unchanged if the run is not known."""
        run_id = run_manager.run_id if run_manager else CURRENT_CALL.get()
        if run_id is None or not self.tokencake_enabled:
            return kwargs
        try:
            hint = LIFECYCLE.make_hint(
                run_id,
                self._sender,
                tools=tool_names(kwargs.get("tools") or self.model_kwargs.get("tools") or ()),
                estimates={**self._bound_estimates, **self.tool_estimates},
                importance=self.importance,
                expected_output_tokens=self.expected_output_tokens,
            )
            if hint is None:
                return kwargs
            return attach_hint(
                kwargs, {"extra_body": self.extra_body, **self.model_kwargs}, self.default_headers or {}, hint
            )
        except Exception:
            logger.exception("TokenCake could not attach a hint to call %s; it is sent without one.", run_id)
            return kwargs

    # --- the response ---------------------------------------------------------------------------------

    def _create_chat_result(
        self, response: dict[str, Any] | openai.BaseModel, generation_info: dict[str, Any] | None = None
    ) -> ChatResult:
        result = super()._create_chat_result(response, generation_info)
        copy_vllm_fields(response, result)
        return result

    def _convert_chunk_to_generation_chunk(
        self, chunk: dict[str, Any], default_chunk_class: type, base_generation_info: dict[str, Any] | None
    ) -> ChatGenerationChunk | None:
        generation = super()._convert_chunk_to_generation_chunk(chunk, default_chunk_class, base_generation_info)
        if generation is not None:
            copy_vllm_chunk_fields(chunk, generation)
        return generation

    def _get_generation_chunk_from_completion(self, completion: openai.BaseModel) -> ChatGenerationChunk:
        generation = super()._get_generation_chunk_from_completion(completion)
        # The stream has already delivered the reasoning, piece by piece.
        generation.message.additional_kwargs.pop(REASONING_KEY, None)
        return generation
