"""Which header lines travel on, and which belong to one connection only?

Lines go through as raw bytes, in their order and with repetitions. What frames a message (RFC 9110, 7.6.1 and RFC 9112,
6) is written anew on each side: a body is read whole and sent with its own length, so two parsers can never disagree on
where it ends.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokencake_proxy.asgi import HeaderLine

_ONE_CONNECTION_ONLY: Final = frozenset(
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
# `expect` was answered when the body was read; the upstream's host and length are set by the client that sends.
_WRITTEN_ANEW: Final = frozenset({b"host", b"content-length", b"expect"})

_ONCE: Final = (b"host", b"authorization", b"content-type", b"content-length")

_CONTROL_BYTE: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


def request_lines(received: Iterable[HeaderLine]) -> list[HeaderLine]:
    """The lines of a client's request, names in lower case, that go to the engine."""
    received = list(received)
    dropped = _ONE_CONNECTION_ONLY | _WRITTEN_ANEW | _named_by_connection(received)
    return [(name, value) for name, value in received if name not in dropped]


def response_lines(received: Iterable[HeaderLine], status: int, upstream: bytes) -> list[HeaderLine]:
    """The lines of the engine's response that go to the client.

    A redirect to the `upstream` itself becomes one within the proxy: the engine was told its own host, not ours.

    Raises:
        ValueError: a line holds control characters.
    """
    lines = [(name.lower(), value) for name, value in received]
    dropped = _ONE_CONNECTION_ONLY | _named_by_connection(lines)
    if status in (204, 304) or any(name == b"transfer-encoding" for name, _ in lines):
        dropped |= {b"content-length"}
    kept: list[HeaderLine] = []
    for name, value in lines:
        if name in dropped:
            continue
        if _CONTROL_BYTE.search(value):
            raise ValueError(f"header {name.decode('latin-1')!r} holds control characters")
        is_own_address = name == b"location" and value.startswith(upstream + b"/")
        kept.append((name, value.removeprefix(upstream) if is_own_address else value))
    return kept


def first_value(lines: Iterable[HeaderLine], wanted: bytes) -> bytes | None:
    """The value of the first line named `wanted` (lower case), or None."""
    return next((value for name, value in lines if name == wanted), None)


def tokens(lines: Iterable[HeaderLine], wanted: bytes) -> list[bytes]:
    """The comma-separated tokens of all lines named `wanted`, in lower case."""
    return [
        token.strip().lower() for name, value in lines if name == wanted for token in value.split(b",") if token.strip()
    ]


def repeated_line(lines: Iterable[HeaderLine]) -> bytes | None:
    """The name of a line that may come once and came twice: which of them counts, each server decides for itself."""
    names = [name for name, _ in lines]
    return next((name for name in _ONCE if names.count(name) > 1), None)


def _named_by_connection(lines: list[HeaderLine]) -> frozenset[bytes]:
    return frozenset(tokens(lines, b"connection"))
