"""The request body: read completely, because a retry needs it again, and limited, because memory is.

A client may send up to `max_unproven_body_bytes` before its key is proven. All bodies together count against
`max_bodies_bytes`, shared by dynamic thresholds (Choudhury and Hahne, 1998): a key may hold as much as is still free.
So a single key gets half, two keys get a third each, and there is always room for one more.
"""

from __future__ import annotations

from collections import Counter
from http import HTTPStatus
from typing import TYPE_CHECKING

from tokencake_proxy.errors import Refusal
from tokencake_proxy.headers import first_value, tokens

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tokencake_proxy.asgi import Header, Receive
    from tokencake_proxy.settings import ProxySettings


class ClientDisconnectedError(Exception):
    """The client closed its connection before its request was complete."""


class BodyBudget:
    """The memory that all request bodies share.

    Attributes:
        settings: the limits.
        held_bytes: size of all bodies in memory now.
    """

    def __init__(self, settings: ProxySettings) -> None:
        self.settings = settings
        self.held_bytes = 0
        self._held_bytes_by_key: Counter[bytes | None] = Counter()

    def hold(self, key: bytes | None, count: int) -> None:
        """Add `count` bytes to the account of `key`; a negative count releases them.

        Raises:
            Refusal: the key holds too much; the bytes are counted nevertheless.
        """
        self.held_bytes += count
        of_key = self._held_bytes_by_key
        of_key[key] += count
        if count > 0 and of_key[key] > self.settings.max_bodies_bytes - self.held_bytes:
            raise Refusal(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "bodies_full",
                f"The requests of this key, or all requests, hold too much of the {self.settings.max_bodies_bytes} "
                "bytes that this proxy has for bodies (`max_bodies_bytes`). Try again later.",
                [(b"retry-after", b"1")],
            )
        if not of_key[key]:
            del of_key[key]


class RequestBody:
    """The body of one request.

    Args:
        budget: counts the body from its first byte until `release`.
        key: the `authorization` field of the request.
    """

    def __init__(self, budget: BodyBudget, key: bytes | None) -> None:
        self._budget = budget
        self._key = key
        self._size_bytes = 0

    async def read(self, headers: list[Header], receive: Receive, prove: Callable[[], Awaitable[None]]) -> bytes:
        """Read the body of the request with these `headers`.

        Args:
            headers: as the client sent them.
            receive: the server's.
            prove: called before more than `max_unproven_body_bytes` are read; raises Refusal for an invalid key.

        Raises:
            Refusal: the body is too long, has a transfer encoding other than `chunked`, comes without a valid key, or
                exceeds the budget.
            ClientDisconnectedError: the client closed the connection.
        """
        settings = self._budget.settings
        if tokens(headers, b"transfer-encoding") not in ([], [b"chunked"]):
            raise Refusal(
                HTTPStatus.NOT_IMPLEMENTED,
                "transfer_encoding",
                "This proxy supports no transfer encoding other than `chunked`.",
            )
        announced_bytes = int(first_value(headers, b"content-length") or 0)
        if announced_bytes > settings.max_body_bytes:
            raise _too_long(settings.max_body_bytes)
        is_proven = announced_bytes > settings.max_unproven_body_bytes
        if is_proven:
            await prove()
        pieces: list[bytes] = []
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnectedError
            pieces.append(message.get("body", b""))
            self._add(len(pieces[-1]))
            more = message.get("more_body", False)
            if not is_proven and self._size_bytes > settings.max_unproven_body_bytes:
                await prove()
                is_proven = True
        return b"".join(pieces)

    def release(self) -> None:
        """Stop counting the body. Call it once nothing refers to the bytes any more."""
        self._budget.hold(self._key, -self._size_bytes)
        self._size_bytes = 0

    def _add(self, count: int) -> None:
        if self._size_bytes + count > self._budget.settings.max_body_bytes:
            raise _too_long(self._budget.settings.max_body_bytes)
        self._size_bytes += count
        self._budget.hold(self._key, count)


def _too_long(max_bytes: int) -> Refusal:
    return Refusal(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        "body_too_long",
        f"The request's body has more than {max_bytes} bytes, the limit of this proxy (`max_body_bytes`). Send less.",
    )
