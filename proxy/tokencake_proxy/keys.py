"""API keys that the engine has taken of late.

The engine alone knows which keys are valid, and it guards `/v1` with them, but not `/tokenize` and its like. So the
engine proves a key. Its answer to a call under `/v1` tells without further cost. Where the proxy has to know earlier
(before it reads a large body, parses one, or forwards to a route that the engine leaves open), it asks for `/v1/models`
with that key. With an engine that demands no key, all are proven. A key that the engine has refused is not remembered:
a stranger who tries many displaces none, and a key that was added counts at once.
"""

from __future__ import annotations

import time
from hashlib import sha256
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from tokencake_proxy.errors import Refusal
from tokencake_proxy.headers import first_value

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tokencake_proxy.asgi import HeaderLine

_MAX_KEYS: Final = 4_096
_REFUSED: Final = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
_SUCCESS: Final = range(200, 300)


class ProvenKeys:
    """Which keys one engine takes.

    Args:
        takes_key: asks the engine; given no header line, or the client's `authorization`.
        ttl_s: how long the engine's word counts.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        takes_key: Callable[[list[HeaderLine]], Awaitable[bool]],
        ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._takes_key = takes_key
        self._ttl_s = ttl_s
        self._clock = clock
        self._until_s: dict[bytes, float] = {}
        """Oldest proof first."""

    def are_in(self, lines: list[HeaderLine]) -> bool:
        """Whether the key in these header lines (or that there is none) is proven."""
        return self._until_s.get(_digest(lines), 0.0) > self._clock()

    async def prove(self, lines: list[HeaderLine]) -> None:
        """Return if the key in these header lines is valid.

        Raises:
            Refusal: it is not.
            UpstreamError: the engine did not say.
        """
        if self.are_in(lines):
            return
        authorization = first_value(lines, b"authorization")
        if not await self._takes_key([] if authorization is None else [(b"authorization", authorization)]):
            raise _invalid()
        self._remember(_digest(lines))

    def learn(self, lines: list[HeaderLine], status: int) -> None:
        """Learn from the `status` with which the engine answered a call that it guards itself."""
        digest = _digest(lines)
        if status in _REFUSED:
            self._until_s.pop(digest, None)
        elif status in _SUCCESS and self._until_s.get(digest, 0.0) < self._clock() + self._ttl_s / 2:
            self._remember(digest)

    def _remember(self, digest: bytes) -> None:
        self._until_s.pop(digest, None)
        self._until_s[digest] = self._clock() + self._ttl_s
        if len(self._until_s) > _MAX_KEYS:
            del self._until_s[next(iter(self._until_s))]


def _digest(lines: list[HeaderLine]) -> bytes:
    authorization = first_value(lines, b"authorization")
    return b"" if authorization is None else sha256(authorization).digest()


def _invalid() -> Refusal:
    return Refusal(
        HTTPStatus.UNAUTHORIZED,
        "invalid_api_key",
        "The engine does not take this API key. Send one that it was started with (--api-key) as "
        "`Authorization: Bearer KEY`.",
        [(b"www-authenticate", b"Bearer")],
    )
