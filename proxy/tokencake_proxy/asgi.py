"""Types of ASGI 3, the interface between the proxy and the server that runs it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, TypeAlias

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

Header: TypeAlias = tuple[bytes, bytes]
"""The name and value of a header field, undecoded, so that it is forwarded byte for byte."""


async def send_response(
    send: Send, status: int, content_type: bytes, body: bytes, extra: Iterable[Header] = ()
) -> None:
    """Send a complete response."""
    headers = [(b"content-type", content_type), (b"content-length", b"%d" % len(body)), *extra]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
