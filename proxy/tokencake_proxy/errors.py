"""What does a client read when the proxy, not the engine, has to answer?

The shape is OpenAI's, so that every OpenAI client turns it into its own exception with our words in it.

```
Refusal                 carries status, code and words
  UpstreamError         the engine could not be reached, or broke off; carries `kind`, the label in the metrics
```
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from tokencake_proxy.asgi import Send, send_whole

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokencake_proxy.asgi import HeaderLine

UpstreamErrorKind: TypeAlias = Literal["unreachable", "connect_timeout", "disconnected", "bad_answer", "broken_stream"]

_FIRST_SERVER_ERROR: Final = 500


class Refusal(Exception):  # noqa: N818 - it is an answer that is raised, not a fault of ours
    """The request is answered by the proxy itself.

    Attributes:
        status: HTTP status.
        code: stable word for programs, in `error.code`.
        message: for people: what happened and the way out.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


class UpstreamError(Refusal):
    """The engine gave no answer, or not all of it."""

    def __init__(self, status: int, kind: UpstreamErrorKind, message: str) -> None:
        super().__init__(status, f"upstream_{kind}", message)
        self.kind = kind


async def send_refusal(send: Send, refusal: Refusal, extra: Iterable[HeaderLine] = ()) -> None:
    """Send `refusal` as a whole response, with `extra` header lines."""
    body = json.dumps({"error": _error_object(refusal)}).encode()
    await send_whole(send, refusal.status, b"application/json", body, extra)


def error_event(refusal: Refusal) -> bytes:
    """`refusal` as a server-sent event that OpenAI's and Anthropic's clients both raise."""
    return b"event: error\ndata: " + json.dumps({"type": "error", "error": _error_object(refusal)}).encode() + b"\n\n"


def _error_object(refusal: Refusal) -> dict[str, Any]:
    kind = "server_error" if refusal.status >= _FIRST_SERVER_ERROR else "invalid_request_error"
    return {"message": refusal.message, "type": kind, "param": None, "code": refusal.code}
