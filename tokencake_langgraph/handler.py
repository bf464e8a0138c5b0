"""How does the client hear of every run of the process?

`TokencakeHandler` is in every callback manager that LangChain makes, in every thread and without a `config`, from the
first `ChatTokencake` on. It runs inline: what it leaves in a context variable is there when the model is called.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar, cast
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.outputs import LLMResult
from langchain_core.runnables.config import RunnableConfig, var_child_runnable_config
from langchain_core.tracers.context import register_configure_hook
from typing_extensions import override

from tokencake_langgraph.estimates import estimate_in
from tokencake_langgraph.lifecycle import Lifecycle

LIFECYCLE = Lifecycle()
"""What all handlers of the process report to, so that a second handler counts nothing twice."""

CURRENT_CALL: ContextVar[UUID | None] = ContextVar("tokencake_current_call", default=None)
"""The latest LLM run started in this context: `_stream` and `_astream` are not told theirs."""

_Callback = TypeVar("_Callback", bound=Callable[..., None])

logger = logging.getLogger(__name__)


def _never_raises(callback: _Callback) -> _Callback:
    @wraps(callback)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            callback(*args, **kwargs)
        except Exception:
            logger.exception("TokenCake missed a callback; the run it belongs to is not affected.")

    return cast("_Callback", guarded)


class TokencakeHandler(BaseCallbackHandler):
    """Reports all runs to the process's `Lifecycle`. Passing one in `config` is allowed and changes nothing."""

    run_inline = True
    raise_error = False

    @override
    @_never_raises
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
        LIFECYCLE.open_chain(run_id, parent_run_id, name, metadata or {}, inputs)

    @override
    @_never_raises
    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        LIFECYCLE.close_chain(run_id)

    @override
    @_never_raises
    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        LIFECYCLE.close_chain(run_id, error)

    # A retriever may call models below it; for the tree it is one more chain.

    @override
    @_never_raises
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
        LIFECYCLE.open_chain(run_id, parent_run_id, None, metadata or {}, None)

    @override
    @_never_raises
    def on_retriever_end(self, documents: Any, *, run_id: UUID, **kwargs: Any) -> None:
        LIFECYCLE.close_chain(run_id)

    @override
    @_never_raises
    def on_retriever_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        LIFECYCLE.close_chain(run_id, error)

    @override
    @_never_raises
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
        is_structured = "ls_structured_output_format" in (options or {})
        LIFECYCLE.open_call(run_id, parent_run_id, known, is_structured_output=is_structured)

    @override
    @_never_raises
    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:
        LIFECYCLE.close_call(run_id, _tool_calls(response))

    @override
    @_never_raises
    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        LIFECYCLE.close_call(run_id)

    @override
    @_never_raises
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
        name = (serialized or {}).get("name") or "tool"
        known = metadata or {}
        LIFECYCLE.open_tool(run_id, parent_run_id, name, tool_call_id, known, estimate_in(known))

    @override
    @_never_raises
    def on_tool_end(self, output: Any, *, run_id: UUID, **kwargs: Any) -> None:
        is_failure = isinstance(output, ToolMessage) and output.status == "error"
        LIFECYCLE.close_tool(run_id, is_failure=is_failure)

    @override
    @_never_raises
    def on_tool_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        LIFECYCLE.close_tool(run_id, error)


def enclosing_run() -> tuple[UUID | None, Mapping[str, Any]]:
    """The run that this code belongs to, and its metadata, where no callback manager says it.

    `llm.generate()` and plain code in a node are given no config; LangChain keeps the node's in a context variable.
    """
    config: RunnableConfig | None = var_child_runnable_config.get()
    if config is None:
        return None, {}
    return getattr(config.get("callbacks"), "parent_run_id", None), config.get("metadata") or {}


def install() -> None:
    """Put a handler into every callback manager of the process; further calls do nothing."""
    global _is_installed  # noqa: PLW0603 - LangChain's list of hooks is the process's, too, and cannot be asked
    with _install_lock:
        if not _is_installed:
            # As the default it is seen in threads and contexts that exist already.
            handler: Any = TokencakeHandler()
            hook = ContextVar("tokencake_handler", default=handler)
            register_configure_hook(hook, inheritable=True, handle_class=TokencakeHandler)
            _is_installed = True


def _tool_calls(response: LLMResult) -> Iterator[str]:
    for generations in response.generations:
        for generation in generations:
            message = getattr(generation, "message", None)
            if isinstance(message, AIMessage):
                yield from (call["id"] for call in message.tool_calls if call["id"])


_is_installed = False
_install_lock = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=LIFECYCLE.forget_lock)
