"""What does the proxy take from, and say to, the server that runs it? Plain ASGI 3, written down as types."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, TypeAlias

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

HeaderLine: TypeAlias = tuple[bytes, bytes]
"""A name and its value, undecoded: what a peer sent goes on as it came."""


async def send_whole(
    send: Send, status: int, content_type: bytes, body: bytes, extra: Iterable[HeaderLine] = ()
) -> None:
    """Send a response that is complete in `body`."""
    headers = [(b"content-type", content_type), (b"content-length", b"%d" % len(body)), *extra]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
