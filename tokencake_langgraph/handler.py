"""The callback handler that observes every run of the process.

Once this package is imported, `TokencakeHandler` is in every callback manager that LangChain creates, in every thread
and without a `config`. It runs inline, so a context variable that it sets is visible when the model is called.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar, cast
from uuid import UUID

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, BaseCallbackHandler, CallbackManagerForLLMRun
from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.outputs import LLMResult
from langchain_core.tracers.context import register_configure_hook
from typing_extensions import override

from tokencake_langgraph.enclosing import enclosing_graphs, enclosing_run
from tokencake_langgraph.estimates import estimate_in
from tokencake_langgraph.lifecycle import CURRENT_CALL, LIFECYCLE

_Callback = TypeVar("_Callback", bound=Callable[..., None])
_RunManager = TypeVar("_RunManager", CallbackManagerForLLMRun, AsyncCallbackManagerForLLMRun)

logger = logging.getLogger(__name__)


def _contains_errors(callback: _Callback) -> _Callback:
    @wraps(callback)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            callback(*args, **kwargs)
        except Exception:
            logger.exception("TokenCake could not handle a callback; the run itself is not affected.")

    return cast("_Callback", guarded)


class TokencakeHandler(BaseCallbackHandler):
    """Reports all runs to the process's `Lifecycle`. A second handler, passed in `config`, changes nothing."""

    run_inline = True
    raise_error = False

    @override
    @_contains_errors
    def on_chain_start(
        self,
        serialized: dict[str, Any] | None,
        inputs: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        _open_missing_parents(parent_run_id)
        LIFECYCLE.open_chain(run_id, parent_run_id, name, metadata or {}, inputs)

    @override
    @_contains_errors
    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        LIFECYCLE.close_chain(run_id)

    @override
    @_contains_errors
    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        LIFECYCLE.close_chain(run_id, error)

    # A retriever may call models, so the tree treats it as a chain.

    @override
    @_contains_errors
    def on_retriever_start(
        self,
        serialized: dict[str, Any] | None,
        query: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        _open_missing_parents(parent_run_id)
        LIFECYCLE.open_chain(run_id, parent_run_id, None, metadata or {}, None)

    @override
    @_contains_errors
    def on_retriever_end(self, documents: Any, *, run_id: UUID, **kwargs: Any) -> None:
        LIFECYCLE.close_chain(run_id)

    @override
    @_contains_errors
    def on_retriever_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        LIFECYCLE.close_chain(run_id, error)

    @override
    @_contains_errors
    def on_chat_model_start(
        self,
        serialized: dict[str, Any] | None,
        messages: list[list[BaseMessage]],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        CURRENT_CALL.set(run_id)
        known = metadata or {}
        if parent_run_id is None:
            parent_run_id, outer = enclosing_run()
            known = {**outer, **known}
        _open_missing_parents(parent_run_id)
        is_structured = "ls_structured_output_format" in (options or {})
        LIFECYCLE.open_call(run_id, parent_run_id, known, is_structured_output=is_structured)

    @override
    @_contains_errors
    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:
        LIFECYCLE.close_call(run_id, _tool_calls(response))

    @override
    @_contains_errors
    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        LIFECYCLE.close_call(run_id)

    @override
    @_contains_errors
    def on_tool_start(
        self,
        serialized: dict[str, Any] | None,
        input_str: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        tool_call_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        _open_missing_parents(parent_run_id)
        name = (serialized or {}).get("name") or "tool"
        known = metadata or {}
        LIFECYCLE.open_tool(run_id, parent_run_id, name, tool_call_id, known, estimate_in(known))

    @override
    @_contains_errors
    def on_tool_end(self, output: Any, *, run_id: UUID, **kwargs: Any) -> None:
        is_failure = isinstance(output, ToolMessage) and output.status == "error"
        LIFECYCLE.close_tool(run_id, is_failure=is_failure)

    @override
    @_contains_errors
    def on_tool_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        LIFECYCLE.close_tool(run_id, error)


def install() -> None:
    """Put a handler into every callback manager that LangChain creates from now on; further calls do nothing."""
    global _is_installed  # noqa: PLW0603 - LangChain's list of hooks is global too, and cannot be read
    if _is_installed:
        return
    _is_installed = True
    try:
        # As the default value it is visible in threads and contexts that already exist.
        hook: ContextVar[Any] = ContextVar("tokencake_handler", default=_HANDLER)
        register_configure_hook(hook, inheritable=True, handle_class=TokencakeHandler)
    except Exception:
        logger.exception("TokenCake could not install its callback handler; calls are made without a hint.")


def without_handler(run_manager: _RunManager) -> _RunManager:
    """The run manager without `TokencakeHandler`, for the duration of the call: the handler ignores tokens.

    LangChain checks each handler against protocols, which before Python 3.12 costs more than all callbacks here.
    """
    quiet = object.__new__(type(run_manager))
    handlers = [handler for handler in run_manager.handlers if type(handler) is not TokencakeHandler]
    vars(quiet).update(vars(run_manager), handlers=handlers)
    return quiet


def _open_missing_parents(parent_id: UUID | None) -> None:
    """Open the run `parent_id` if it was never reported, below the graph runs that enclose it."""
    if parent_id is None or LIFECYCLE.is_open(parent_id):
        return
    try:
        outer: UUID | None = None
        for graph in reversed(enclosing_graphs()):
            manager = graph.manager
            if not any(isinstance(handler, TokencakeHandler) for handler in manager.handlers):
                _open_below(outer, manager.parent_run_id)
                LIFECYCLE.open_chain(manager.run_id, manager.parent_run_id, graph.name, manager.metadata, None)
                # From now on the graph's end and its next nodes are reported.
                manager.handlers.append(_HANDLER)
                manager.inheritable_handlers.append(_HANDLER)
            outer = manager.run_id
        enclosing_id, _ = enclosing_run()
        _open_below(outer, enclosing_id)
        _open_below(enclosing_id, parent_id)
    except Exception:
        logger.debug("The runs that enclose %s are not known.", parent_id, exc_info=True)


def _open_below(outer_id: UUID | None, run_id: UUID | None) -> None:
    """Open the run `run_id`, of which only the id is known, below the open run `outer_id`."""
    if run_id is not None and outer_id is not None and LIFECYCLE.is_open(outer_id):
        LIFECYCLE.open_chain(run_id, outer_id, None, {}, None)


def _tool_calls(response: LLMResult) -> Iterator[str]:
    for generations in response.generations:
        for generation in generations:
            message = getattr(generation, "message", None)
            if isinstance(message, AIMessage):
                yield from (call["id"] for call in message.tool_calls if call["id"])


_HANDLER = TokencakeHandler()
_is_installed = False
