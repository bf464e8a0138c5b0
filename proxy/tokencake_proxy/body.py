"""How is a request's body taken in? Whole, because a retry needs it again, and bounded, because memory is."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

from tokencake_proxy.errors import Refusal
from tokencake_proxy.headers import first_value, tokens

if TYPE_CHECKING:
    from tokencake_proxy.asgi import HeaderLine, Receive


class ClientLeftError(Exception):
    """The client closed its connection before its request was complete."""


async def read_body(lines: list[HeaderLine], receive: Receive, max_bytes: int) -> bytes:
    """The body of the request with these header `lines`.

    Raises:
        Refusal: it is longer than `max_bytes`, or compressed on the way.
        ClientLeftError: the client left.
    """
    if tokens(lines, b"transfer-encoding") not in ([], [b"chunked"]):
        raise Refusal(
            HTTPStatus.NOT_IMPLEMENTED, "transfer_encoding", "Of the transfer encodings, only `chunked` is taken."
        )
    if int(first_value(lines, b"content-length") or 0) > max_bytes:
        raise _too_long(max_bytes)
    pieces: list[bytes] = []
    size_bytes = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        pieces.append(message.get("body", b""))
        size_bytes += len(pieces[-1])
        if size_bytes > max_bytes:
            raise _too_long(max_bytes)
        more = message.get("more_body", False)
    return b"".join(pieces)


def _too_long(max_bytes: int) -> Refusal:
    return Refusal(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        "body_too_long",
        f"The request's body has more than {max_bytes} bytes, the limit of this proxy (`max_body_bytes`). Send less.",
    )
