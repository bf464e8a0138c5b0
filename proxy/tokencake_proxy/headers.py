"""Header fields: which are forwarded, and which belong to one connection only.

Fields are forwarded as raw bytes, in their order and with repetitions. The fields that frame a message (RFC 9110, 7.6.1
and RFC 9112, 6) are written anew on each side: a body is read completely and sent with its own length, so that two
parsers cannot disagree on where it ends.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokencake_proxy.asgi import Header

_HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
# `expect` was answered when the body was read; the HTTP client sets the upstream's host and the length.
_WRITTEN_ANEW: Final = frozenset({b"host", b"content-length", b"expect"})

_ONCE: Final = (b"host", b"authorization", b"content-type", b"content-length")

_CONTROL_BYTE: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


def request_headers(received: Iterable[Header]) -> list[Header]:
    """The fields of a client's request, names in lower case, that are forwarded to the engine."""
    received = list(received)
    dropped = _HOP_BY_HOP | _WRITTEN_ANEW | _named_by_connection(received)
    return [(name, value) for name, value in received if name not in dropped]


def response_headers(received: Iterable[Header], status: int, upstream: bytes) -> list[Header]:
    """The fields of the engine's response that are forwarded to the client.

    A redirect to the `upstream` itself becomes a relative one, because the engine does not know the proxy's address.

    Raises:
        ValueError: a field contains control characters.
    """
    headers = [(name.lower(), value) for name, value in received]
    dropped = _HOP_BY_HOP | _named_by_connection(headers)
    if status in (204, 304) or any(name == b"transfer-encoding" for name, _ in headers):
        dropped |= {b"content-length"}
    kept: list[Header] = []
    for name, value in headers:
        if name in dropped:
            continue
        if _CONTROL_BYTE.search(value):
            raise ValueError(f"header {name.decode('latin-1')!r} holds control characters")
        is_own_address = name == b"location" and value.startswith(upstream + b"/")
        kept.append((name, value.removeprefix(upstream) if is_own_address else value))
    return kept


def first_value(headers: Iterable[Header], wanted: bytes) -> bytes | None:
    """The value of the first field named `wanted` (lower case), or None."""
    return next((value for name, value in headers if name == wanted), None)


def tokens(headers: Iterable[Header], wanted: bytes) -> list[bytes]:
    """The comma-separated tokens of all fields named `wanted`, in lower case."""
    return [
        token.strip().lower()
        for name, value in headers
        if name == wanted
        for token in value.split(b",")
        if token.strip()
    ]


def repeated_header(headers: Iterable[Header]) -> bytes | None:
    """The name of a field that must occur once and occurs twice: servers differ in which of the two they use."""
    names = [name for name, _ in headers]
    return next((name for name in _ONCE if names.count(name) > 1), None)


def _named_by_connection(headers: list[Header]) -> frozenset[bytes]:
    return frozenset(tokens(headers, b"connection"))
