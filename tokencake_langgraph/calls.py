"""Which LLM call asked for this tool call?

The answer to a call names the tool calls; the tool runs that follow carry only the name. Ids of tool calls come from
the server's parser and may repeat from call to call (`functions.search:0`), so that they are looked up from the
narrowest place outwards. After a restart the checkpointed message still says it: LangChain calls it `lc_run--<run id>`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, Generic, TypeAlias, TypeVar
from uuid import UUID

from langchain_core.messages import AIMessage
from langchain_core.runnables.config import var_child_runnable_config

from tokencake_langgraph.sender import EventSender

MAX_CALLS: Final = 10_000
MAX_MESSAGES_SEARCHED: Final = 64
_RUN_PREFIX: Final = "lc_run--"
_UUID_CHARS: Final = 36

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Bounded(OrderedDict[_Key, _Value], Generic[_Key, _Value]):
    """A dict that forgets what was written longest ago."""

    def __init__(self, max_entries: int) -> None:
        super().__init__()
        self._max_entries = max_entries

    def __setitem__(self, key: _Key, value: _Value) -> None:
        if key in self:
            self.move_to_end(key)
        super().__setitem__(key, value)
        if len(self) > self._max_entries:
            self.popitem(last=False)


Scope: TypeAlias = tuple[str, str]
"""An app and a namespace in it, of a task or of a graph."""


@dataclass(frozen=True, slots=True)
class Call:
    """An LLM call that an engine knows, and the way to tell that engine more about it."""

    id: str
    session: str
    sender: EventSender
    scopes: tuple[Scope, ...] = ()
    """The places where its tool calls are looked for, the narrowest first."""
    estimates: Mapping[str, float] = field(default_factory=dict)
    """Tool -> seconds, as far as the user has said."""


class CallTable:
    """The calls made by this process, by id, by session and by the tool calls they asked for. Not thread-safe."""

    def __init__(self, max_calls: int = MAX_CALLS) -> None:
        self._calls: Bounded[str, Call | None] = Bounded(max_calls)
        self._latest: Bounded[str, Call] = Bounded(max_calls)
        self._askers: Bounded[tuple[Scope, str], Call] = Bounded(2 * max_calls)

    def add(self, call: Call) -> None:
        """Remember a call that is being sent."""
        self._calls[call.id] = call
        self._latest[call.session] = call

    def add_stranger(self, call_id: str) -> None:
        """Remember a call that another vendor's model made."""
        self._calls[call_id] = None

    def get(self, call_id: str) -> Call | None:
        """The call with this id; None for a stranger's.

        Raises:
            KeyError: no such call was made here; an earlier process may have made it.
        """
        return self._calls[call_id]

    def latest_of(self, session: str) -> Call | None:
        """The session's latest call; None if it has made none here."""
        return self._latest.get(session)

    def link(self, call: Call, tool_calls: Iterable[str]) -> None:
        """`call` was answered with these tool calls."""
        for tool_call in tool_calls:
            for scope in call.scopes:
                self._askers[scope, tool_call] = call

    def asker(self, scope: Scope, tool_call: str) -> Call | None:
        """The latest call made in that scope that asked for `tool_call`."""
        return self._askers.get((scope, tool_call))


def asker_in(inputs: Any, tool_call: str) -> str | None:
    """The id of the call that asked for `tool_call`, as the messages in a node's inputs tell it."""
    for messages in _message_lists(inputs):
        for message in islice(reversed(messages), MAX_MESSAGES_SEARCHED):
            if isinstance(message, AIMessage) and any(call["id"] == tool_call for call in message.tool_calls):
                return _run_id(message.id)
    return None


def checkpointed_messages() -> list[Any]:
    """The messages in the state of the graph that runs here, empty if it has none.

    `create_agent` hands only the tool call to the task that runs it; `ToolNode` reads the rest in the same way.
    """
    config = var_child_runnable_config.get()
    read = ((config or {}).get("configurable") or {}).get("__pregel_read")
    try:
        messages = read("messages", False) if read is not None else None
    except Exception:  # noqa: BLE001 - a state without messages, each version says it differently
        return []
    return messages if isinstance(messages, list) else []


def _message_lists(inputs: Any) -> Iterator[list[Any]]:
    if isinstance(inputs, list):
        yield inputs
        return
    # Older agents send each tool call to its own task with the agent's state beside it.
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
