"""Pictures, sounds and films to which a client gives a name, under a name of its tenant's own.

vLLM keeps processed media under the `uuid` that a client gives, or under the hash that it claims (`features` of its
`generate`), and takes what it has kept for any request that says the same: without this, one tenant could be given
another's, or replace it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from tokencake_proxy.json_members import elements_of, inner_of, is_null, text_of, written

if TYPE_CHECKING:
    from tokencake_proxy.json_members import Member, Members

_NAMED: Final = re.compile(rb'"(?:u|\\u0075){2}(?:i|\\u0069)(?:d|\\u0064)"\s*:')
"""The name `uuid`, however it is spelled."""
_MARKS_OF_NAMES: Final = (b"uuid", b"mm_hashes", b"\\u", b"\0")
"""One of them is in every JSON text that names media, in escapes and in UTF-16 too."""
_MANY: Final = 8_192
_WITHOUT_MEDIA: Final = ("prompt", "token_ids", "tools")

_MOST_LEVELS: Final = 8
"""Messages, their parts, and the parts of a tool's result are four; each level is read anew."""

_OwnName = Callable[[str], str]


def with_own_media(members: Members, own_name: _OwnName) -> None:
    """Rename the media in the body `members`: parts of messages or of inputs, and hashes.

    Raises:
        RecursionError: they are nested more deeply than any engine looks.
    """
    for name, member in members.items():
        if name not in _WITHOUT_MEDIA and _NAMED.search(member):
            members[name] = _renamed(member, own_name)
    features = inner_of(members.get("features"))
    kinds = inner_of(features.get("mm_hashes")) if features is not None else None
    if features is not None and kinds is not None:
        for kind, member in kinds.items():
            if (hashes := elements_of(member)) is not None:
                kinds[kind] = written([_own(each, own_name) for each in hashes])
        members["features"] = written({**features, "mm_hashes": kinds})


def is_costly(body: bytes) -> bool:
    """Whether the JSON text `body` takes long for its size: 1 MiB of hashes 0.8 s, and one prompt of 1 MiB 1 ms."""
    strings = (body.count(b'"') - body.count(b'\\"')) // 2  # never less than half of them; quotes within do not count
    return strings > _MANY or (body.count(b",") > _MANY and any(mark in body for mark in _MARKS_OF_NAMES))


def _renamed(member: Member, own_name: _OwnName, level: int = 0) -> Member:
    """A list of messages or parts, or one of them; whatever else it is stays."""
    if level > _MOST_LEVELS:
        raise RecursionError
    if (items := elements_of(member)) is not None:
        return written([_renamed(item, own_name, level + 1) for item in items])
    item = inner_of(member)
    if item is None:
        return member
    if elements_of(item.get("content")) is not None:
        item["content"] = _renamed(item["content"], own_name, level + 1)
    if not is_null(item.get("uuid")):
        item["uuid"] = _own(item["uuid"], own_name)
    return written(item)


def _own(member: Member, own_name: _OwnName) -> Member:
    if is_null(member):
        return member
    name = text_of(member)
    return written(own_name(name if name is not None else bytes(member).decode(errors="replace")))
