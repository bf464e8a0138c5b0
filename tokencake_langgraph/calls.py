"""The LLM calls of this process, and which of them issued a tool call.

The response to an LLM call lists tool calls; the tool runs that follow carry only the tool call's id. Such ids come
from the server's parser and may repeat from call to call (`functions.search:0`). So they are looked up from the
narrowest scope outwards. After a restart the checkpointed message still identifies the LLM call: its id is
`lc_run--<run id>`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, TypeAlias
from uuid import UUID

from langchain_core.messages import AIMessage
from langchain_core.runnables.config import var_child_runnable_config

from tokencake.bounded import BoundedDict
from tokencake_langgraph.sender import EventSender

MAX_CALLS: Final = 10_000
MAX_MESSAGES_SEARCHED: Final = 64
_RUN_PREFIX: Final = "lc_run--"
_UUID_CHARS: Final = 36

LookupScope: TypeAlias = tuple[str, str]
"""An application and a namespace in it, of a task or of a graph."""


@dataclass(frozen=True, slots=True)
class SentCall:
    """An LLM call that was sent with a hint, and the sender for further events about it."""

    id: str
    session: str
    sender: EventSender
    scopes: tuple[LookupScope, ...] = ()
    """The scopes in which its tool calls are looked up, the narrowest first."""
    estimates: Mapping[str, float] = field(default_factory=dict)
    """Tool -> seconds, where the user gave an estimate."""


class CallTable:
    """The calls of this process, by id, by session and by the tool calls that they issued. Not thread-safe."""

    def __init__(self, max_calls: int = MAX_CALLS) -> None:
        self._calls: BoundedDict[str, SentCall | None] = BoundedDict(max_calls)
        self._latest: BoundedDict[str, SentCall] = BoundedDict(max_calls)
        self._issuing_calls: BoundedDict[tuple[LookupScope, str], SentCall] = BoundedDict(2 * max_calls)

    def add(self, call: SentCall) -> None:
        """Remember a call that is being sent."""
        self._calls[call.id] = call
        self._latest[call.session] = call

    def add_foreign_call(self, call_id: str) -> None:
        """Remember a call of another model class, which has no hint."""
        self._calls[call_id] = None

    def get(self, call_id: str) -> SentCall | None:
        """The call with this id; None for a call of another model class.

        Raises:
            KeyError: this process made no such call; an earlier process may have made it.
        """
        return self._calls[call_id]

    def latest_of(self, session: str) -> SentCall | None:
        """The session's latest call; None if this process made none."""
        return self._latest.get(session)

    def link(self, call: SentCall, tool_calls: Iterable[str]) -> None:
        """Record that the response to `call` has these tool calls."""
        for tool_call in tool_calls:
            for scope in call.scopes:
                self._issuing_calls[scope, tool_call] = call

    def issuing_call(self, scope: LookupScope, tool_call: str) -> SentCall | None:
        """The latest call in `scope` that issued `tool_call`."""
        return self._issuing_calls.get((scope, tool_call))


def issuing_call_id(inputs: Any, tool_call: str) -> str | None:
    """The id of the LLM call that issued `tool_call`, read from the messages in a node's inputs."""
    for messages in _message_lists(inputs):
        for message in islice(reversed(messages), MAX_MESSAGES_SEARCHED):
            if isinstance(message, AIMessage) and any(call["id"] == tool_call for call in message.tool_calls):
                return _run_id(message.id)
    return None


def checkpointed_messages() -> list[Any]:
    """The messages in the state of the running graph; empty if it has none.

    `create_agent` passes only the tool call to the task that runs it; `ToolNode` reads the state in the same way.
    """
    config = var_child_runnable_config.get()
    read = ((config or {}).get("configurable") or {}).get("__pregel_read")
    try:
        messages = read("messages", False) if read is not None else None
    except Exception:  # noqa: BLE001 - each version raises another error for a state without messages
        return []
    return messages if isinstance(messages, list) else []


def _message_lists(inputs: Any) -> Iterator[list[Any]]:
    if isinstance(inputs, list):
        yield inputs
        return
    # Older agents send each tool call to its own task, together with the agent's state.
    fields = inputs if isinstance(inputs, dict) else getattr(inputs, "__dict__", {})
    for value in fields.values():
        if isinstance(value, list):
            yield value
    if (state := fields.get("state")) is not None and not isinstance(state, list):
        yield from _message_lists(state)


def _run_id(message_id: str | None) -> str | None:
    if not message_id or not message_id.startswith(_RUN_PREFIX):
        return None
    text = message_id[len(_RUN_PREFIX) :][:_UUID_CHARS]
    try:
        return str(UUID(text))
    except ValueError:
        return None
