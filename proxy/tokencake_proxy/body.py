"""A request's body, taken in whole, because a retry needs it again, and bounded, because memory is.

What a client sends is held up to `max_unproven_body_bytes` before its key is proven. All that are held count against
`max_bodies_bytes`, shared by dynamic thresholds (Choudhury and Hahne, 1998): a key may hold as much as is still free,
so that one alone gets half, two get a third each, and there is always room for one more.
"""

from __future__ import annotations

from collections import Counter
from http import HTTPStatus
from typing import TYPE_CHECKING

from tokencake_proxy.apart import Apart, Turns
from tokencake_proxy.errors import Refusal
from tokencake_proxy.headers import first_value, tokens

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tokencake_proxy.asgi import HeaderLine, Receive
    from tokencake_proxy.settings import ProxySettings


class ClientLeftError(Exception):
    """The client closed its connection before its request was complete."""


class Intake:
    """What all bodies share.

    Attributes:
        settings: the limits.
        held_bytes: of all bodies that are held now.
        apart: where large ones are worked on.
        turns: for those that are worked on in the event loop.
    """

    def __init__(self, settings: ProxySettings) -> None:
        self.settings = settings
        self.held_bytes = 0
        self.apart = Apart(settings.json_memory_bytes, settings.json_processes)
        self.turns = Turns()
        self._held_bytes_by_key: Counter[bytes | None] = Counter()

    def hold(self, key: bytes | None, count: int) -> None:
        """Count `count` bytes more for a `key`, or less where negative.

        Raises:
            Refusal: there are too many now; they count nevertheless.
        """
        self.held_bytes += count
        of_key = self._held_bytes_by_key
        of_key[key] += count
        if count > 0 and of_key[key] > self.settings.max_bodies_bytes - self.held_bytes:
            raise Refusal(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "bodies_full",
                f"The requests of this key, or all, hold too much of the {self.settings.max_bodies_bytes} bytes that "
                "this proxy has for bodies (`max_bodies_bytes`). Try again later.",
                [(b"retry-after", b"1")],
            )
        if not of_key[key]:
            del of_key[key]


class Body:
    """The body of one request.

    Args:
        intake: what it counts against, from its first byte until `release`.
        key: the `authorization` of the request.
    """

    def __init__(self, intake: Intake, key: bytes | None) -> None:
        self._intake = intake
        self._key = key
        self._size_bytes = 0

    async def read(self, lines: list[HeaderLine], receive: Receive, prove: Callable[[], Awaitable[None]]) -> bytes:
        """The body of the request with these header `lines`.

        Args:
            lines: as the client sent them.
            receive: the server's.
            prove: called before more than `max_unproven_body_bytes` are read; raises Refusal for an invalid key.

        Raises:
            Refusal: it is too long, compressed on the way, of a client without a valid key, or too much
                beside the others.
            ClientLeftError: the client left.
        """
        settings = self._intake.settings
        if tokens(lines, b"transfer-encoding") not in ([], [b"chunked"]):
            raise Refusal(
                HTTPStatus.NOT_IMPLEMENTED, "transfer_encoding", "Of the transfer encodings, only `chunked` is taken."
            )
        announced_bytes = int(first_value(lines, b"content-length") or 0)
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
                raise ClientLeftError
            pieces.append(message.get("body", b""))
            self._add(len(pieces[-1]))
            more = message.get("more_body", False)
            if not is_proven and self._size_bytes > settings.max_unproven_body_bytes:
                await prove()
                is_proven = True
        return b"".join(pieces)

    def release(self) -> None:
        """Count no longer: nothing refers to the body any more."""
        self._intake.hold(self._key, -self._size_bytes)
        self._size_bytes = 0

    def _add(self, count: int) -> None:
        if self._size_bytes + count > self._intake.settings.max_body_bytes:
            raise _too_long(self._intake.settings.max_body_bytes)
        self._size_bytes += count
        self._intake.hold(self._key, count)


def _too_long(max_bytes: int) -> Refusal:
    return Refusal(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        "body_too_long",
        f"The request's body has more than {max_bytes} bytes, the limit of this proxy (`max_body_bytes`). Send less.",
    )
