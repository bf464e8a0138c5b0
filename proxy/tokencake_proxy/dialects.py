"""API dialects: the forms in which a client can ask for a generation, one entry for each.

To add a dialect, add an entry to `DIALECTS`. The route table (`routes`), the places where the proxy scopes a hint
(`tenants`), the error body (`errors`) and the error event of a broken stream (`exchange`) follow from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

ErrorFormat: TypeAlias = Callable[[int, str, str], bytes]
"""Writes an error, given its HTTP status, its code and its message."""

SSE_EVENT_ENDS: Final = (b"\n\n", b"\r\r", b"\r\n\r\n")
"""The blank line that ends a server-sent event, for each line ending that the standard allows."""

_FIRST_SERVER_ERROR: Final = 500


def openai_error_body(status: int, code: str, message: str) -> bytes:
    """An error as OpenAI's API writes it; the clients of OpenAI and Anthropic raise it with its message."""
    return json.dumps({"error": _error_object(status, code, message)}).encode()


def sse_error_event(status: int, code: str, message: str) -> bytes:
    """An error as a server-sent event that the clients of OpenAI and Anthropic raise."""
    error = {"type": "error", "error": _error_object(status, code, message)}
    return b"event: error\ndata: " + json.dumps(error).encode() + b"\n\n"


def _error_object(status: int, code: str, message: str) -> dict[str, Any]:
    kind = "server_error" if status >= _FIRST_SERVER_ERROR else "invalid_request_error"
    return {"message": message, "type": kind, "param": None, "code": code}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One API form.

    Attributes:
        name: the value of the label `route` in the metrics.
        path: its route at vLLM.
        hint_path: the members of the JSON body that lead to the extension arguments, among which the hint is; None
            where vLLM reads no such arguments.
        error_body: writes the body of an error response.
        error_event: writes the event that ends a broken stream.
        event_ends: the byte sequences that end an event of a stream.
    """

    name: str
    path: str
    hint_path: tuple[str, ...] | None = ("vllm_xargs",)
    error_body: ErrorFormat = openai_error_body
    error_event: ErrorFormat = sse_error_event
    event_ends: tuple[bytes, ...] = SSE_EVENT_ENDS


OPENAI_CHAT: Final = Dialect(name="chat_completions", path="/v1/chat/completions")
OPENAI_RESPONSES: Final = Dialect(name="responses", path="/v1/responses")

DIALECTS: Final = (
    OPENAI_CHAT,
    Dialect(name="completions", path="/v1/completions"),
    OPENAI_RESPONSES,
    Dialect(name="messages", path="/v1/messages"),  # Anthropic's
    Dialect(name="cohere_chat", path="/cohere/v2/chat", hint_path=None),
    Dialect(name="generate", path="/inference/v1/generate", hint_path=("sampling_params", "extra_args")),  # vLLM's own
)

DEFAULT_DIALECT: Final = OPENAI_CHAT
"""For the routes that generate nothing, and for errors that occur before the route is known."""

HINT_PATHS: Final = tuple(dict.fromkeys(dialect.hint_path for dialect in DIALECTS if dialect.hint_path is not None))
"""Every place of a body that may hold a hint. The proxy scopes all of them in each body, whatever its route."""

_BY_NAME: Final = {dialect.name: dialect for dialect in DIALECTS}


def dialect_of(route: str) -> Dialect:
    """The dialect whose name is `route`, else `DEFAULT_DIALECT`."""
    return _BY_NAME.get(route, DEFAULT_DIALECT)
