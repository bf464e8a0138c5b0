"""API keys that the engine has accepted recently.

The engine alone knows which keys are valid. It checks them under `/v1`, but not on `/tokenize` and similar routes. So
the proxy learns from the engine's responses under `/v1`, at no further cost. Where it has to know earlier (before it
reads a large body, parses one, or forwards to a route that the engine leaves open), it sends `GET /v1/models` with that
key. An engine that demands no key accepts all of them. Rejected keys are not stored: a client that tries many keys
displaces none, and a newly added key is accepted at once.
"""

from __future__ import annotations

import time
from hashlib import sha256
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from tokencake.bounded import BoundedDict
from tokencake_proxy.errors import Refusal
from tokencake_proxy.headers import first_value

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tokencake_proxy.asgi import Header

_MAX_KEYS: Final = 4_096
_REFUSED: Final = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
_SUCCESS: Final = range(200, 300)


class ProvenKeys:
    """The keys that one engine accepts.

    Args:
        accepts_key: asks the engine; receives the client's `authorization` field, or an empty list.
        ttl_s: how long the engine's answer is valid.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        accepts_key: Callable[[list[Header]], Awaitable[bool]],
        ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._accepts_key = accepts_key
        self._ttl_s = ttl_s
        self._clock = clock
        self._until_s: BoundedDict[bytes, float] = BoundedDict(_MAX_KEYS)
        """Digest of a key -> the time until which it counts as accepted."""

    def is_proven(self, headers: list[Header]) -> bool:
        """Whether the engine has accepted the key in `headers`, or the absence of one, within `ttl_s`."""
        return self._until_s.get(_digest(headers), 0.0) > self._clock()

    async def prove(self, headers: list[Header]) -> None:
        """Return if the key in `headers` is valid, asking the engine if necessary.

        Raises:
            Refusal: the key is not valid.
            UpstreamError: the engine did not say.
        """
        if self.is_proven(headers):
            return
        authorization = first_value(headers, b"authorization")
        if not await self._accepts_key([] if authorization is None else [(b"authorization", authorization)]):
            raise _invalid()
        self._remember(_digest(headers))

    def learn(self, headers: list[Header], status: int) -> None:
        """Learn from the `status` with which the engine answered a request whose key it checks itself."""
        digest = _digest(headers)
        if status in _REFUSED:
            self._until_s.pop(digest, None)
        elif status in _SUCCESS and self._until_s.get(digest, 0.0) < self._clock() + self._ttl_s / 2:
            self._remember(digest)

    def _remember(self, digest: bytes) -> None:
        self._until_s[digest] = self._clock() + self._ttl_s


def _digest(headers: list[Header]) -> bytes:
    authorization = first_value(headers, b"authorization")
    return b"" if authorization is None else sha256(authorization).digest()


def _invalid() -> Refusal:
    return Refusal(
        HTTPStatus.UNAUTHORIZED,
        "invalid_api_key",
        "The engine does not accept this API key. Send a key that the engine was started with (--api-key) as "
        "`Authorization: Bearer KEY`.",
        [(b"www-authenticate", b"Bearer")],
    )
