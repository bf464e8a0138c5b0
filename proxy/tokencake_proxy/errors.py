"""Errors that the proxy itself answers, as exceptions and as HTTP responses.

A dialect decides the shape of the body (`dialects`), so that each client raises its own exception with our message.

```
Refusal                 has status, code and message
  UpstreamError         the engine cannot be reached, or broke off its response
```
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tokencake_proxy.asgi import Send, send_response
from tokencake_proxy.dialects import DEFAULT_DIALECT, Dialect

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokencake_proxy.asgi import Header

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
"""Why the proxy refuses a request: `error.code` in the response and the label `reason` in the metrics."""

UpstreamCode: TypeAlias = Literal[
    "upstream_bad_answer",
    "upstream_broken_stream",
    "upstream_connect_timeout",
    "upstream_disconnected",
    "upstream_key_check",
    "upstream_unreachable",
]


class Refusal(Exception):  # noqa: N818 - it is a response that is raised, not a fault of the proxy
    """The proxy itself answers the request.

    Attributes:
        status: HTTP status.
        code: stable identifier for programs, in `error.code`.
        message: for people: what happened and what to do.
        headers: header fields that the status calls for.
    """

    def __init__(
        self, status: int, code: RefusalReason | UpstreamCode, message: str, headers: Iterable[Header] = ()
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = tuple(headers)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.status, self.code, self.message, self.headers)

    def body(self, dialect: Dialect = DEFAULT_DIALECT) -> bytes:
        """The whole body of the response."""
        return dialect.error_body(self.status, self.code, self.message)

    def event(self, dialect: Dialect = DEFAULT_DIALECT) -> bytes:
        """The event that ends a stream which has begun."""
        return dialect.error_event(self.status, self.code, self.message)


class UpstreamError(Refusal):
    """The engine gave no response, or an incomplete one."""

    def __init__(self, status: int, code: UpstreamCode, message: str) -> None:
        super().__init__(status, code, message)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.status, self.code, self.message)

    @property
    def kind(self) -> str:
        """The label in the metrics."""
        return self.code.removeprefix("upstream_")


async def send_refusal(send: Send, refusal: Refusal, dialect: Dialect = DEFAULT_DIALECT) -> None:
    """Send `refusal` as a complete response."""
    await send_response(send, refusal.status, b"application/json", refusal.body(dialect), refusal.headers)


def response_bytes(refusal: Refusal) -> bytes:
    """`refusal` as the bytes of a response that closes the connection."""
    body = refusal.body()
    headers = (
        *refusal.headers,
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    )
    status_line = f"HTTP/1.1 {refusal.status:d} {HTTPStatus(refusal.status).phrase}\r\n".encode()
    return status_line + b"".join(b"%s: %s\r\n" % header for header in headers) + b"\r\n" + body
