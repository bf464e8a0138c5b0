"""What does a client read when the proxy, not the engine, has to answer?

The shape is OpenAI's, so that every OpenAI client turns it into its own exception with our words in it.

```
Refusal                 carries status, code and words
  UpstreamError         the engine could not be reached, or broke off
```
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from tokencake_proxy.asgi import Send, send_whole

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokencake_proxy.asgi import HeaderLine

RefusalReason: TypeAlias = Literal[
    "bad_header",
    "bad_json",
    "bad_request",
    "bodies_full",
    "body_too_costly",
    "body_too_long",
    "head_timeout",
    "head_too_long",
    "invalid_api_key",
    "method",
    "metrics_key",
    "nesting",
    "not_forwarded",
    "not_found",
    "repeated_header",
    "send_timeout",
    "shutting_down",
    "too_many_connections",
    "too_many_events",
    "transfer_encoding",
    "upload_timeout",
    "websocket",
]
"""Why the proxy refuses a request: `error.code` of the answer and `reason` in the metrics."""

UpstreamCode: TypeAlias = Literal[
    "upstream_bad_answer",
    "upstream_broken_stream",
    "upstream_connect_timeout",
    "upstream_disconnected",
    "upstream_key_check",
    "upstream_unreachable",
]

_FIRST_SERVER_ERROR: Final = 500


class Refusal(Exception):  # noqa: N818 - it is an answer that is raised, not a fault of ours
    """The request is answered by the proxy itself.

    Attributes:
        status: HTTP status.
        code: stable word for programs, in `error.code`.
        message: for people: what happened and the way out.
        lines: header lines that the status asks for.
    """

    def __init__(
        self, status: int, code: RefusalReason | UpstreamCode, message: str, lines: Iterable[HeaderLine] = ()
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.lines = tuple(lines)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.status, self.code, self.message, self.lines)

    @property
    def body(self) -> bytes:
        """The whole body of the answer, JSON in OpenAI's shape."""
        return json.dumps({"error": _error_object(self)}).encode()


class UpstreamError(Refusal):
    """The engine gave no answer, or not all of it."""

    def __init__(self, status: int, code: UpstreamCode, message: str) -> None:
        super().__init__(status, code, message)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.status, self.code, self.message)

    @property
    def kind(self) -> str:
        """The label in the metrics."""
        return self.code.removeprefix("upstream_")


async def send_refusal(send: Send, refusal: Refusal) -> None:
    """Send `refusal` as a whole response."""
    await send_whole(send, refusal.status, b"application/json", refusal.body, refusal.lines)


def whole_response(refusal: Refusal) -> bytes:
    """`refusal` as the bytes of a response after which the connection is closed."""
    body = refusal.body
    lines = (
        *refusal.lines,
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    )
    status_line = f"HTTP/1.1 {refusal.status:d} {HTTPStatus(refusal.status).phrase}\r\n".encode()
    return status_line + b"".join(b"%s: %s\r\n" % line for line in lines) + b"\r\n" + body


def error_event(refusal: Refusal) -> bytes:
    """`refusal` as a server-sent event that OpenAI's and Anthropic's clients both raise."""
    return b"event: error\ndata: " + json.dumps({"type": "error", "error": _error_object(refusal)}).encode() + b"\n\n"


def _error_object(refusal: Refusal) -> dict[str, Any]:
    kind = "server_error" if refusal.status >= _FIRST_SERVER_ERROR else "invalid_request_error"
    return {"message": refusal.message, "type": kind, "param": None, "code": refusal.code}
