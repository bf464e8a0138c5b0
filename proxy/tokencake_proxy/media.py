"""Names of media (images, audio, video) in a request, made unique to its tenant.

vLLM caches processed media under the `uuid` that a client gives, or under the hash that it claims (`features` of its
`generate` route), and reuses the entry for any request with the same name. Without this renaming, one tenant could
receive or replace the media of another.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

from tokencake_proxy.raw_json import array_or_none, is_null, object_or_none, string_or_none, to_raw

if TYPE_CHECKING:
    from tokencake_proxy.raw_json import RawJson, RawMembers

_UUID_MEMBER: Final = re.compile(rb'"(?:u|\\u0075){2}(?:i|\\u0069)(?:d|\\u0064)"\s*:')
"""A member named `uuid`, in every spelling that JSON allows."""
_MEDIA_NAME_SIGNS: Final = (b"uuid", b"mm_hashes", b"\\u", b"\0")
"""Every JSON text that names media contains one of these, in escapes and in UTF-16 too."""
_MANY: Final = 8_192
_WITHOUT_MEDIA: Final = ("prompt", "token_ids", "tools")

_MAX_LEVELS: Final = 8
"""Messages, their parts, and the parts of a tool's result are four levels. Each level is parsed again."""

_Rename: TypeAlias = Callable[[str], str]


def scope_media_names(members: RawMembers, rename: _Rename) -> None:
    """Rename the media in the body `members`, in place: those of parts of messages or of inputs, and hashes.

    Raises:
        RecursionError: they are nested more deeply than any engine reads.
    """
    for name, member in members.items():
        if name not in _WITHOUT_MEDIA and _UUID_MEMBER.search(member):
            members[name] = _rename_in(member, rename)
    features = object_or_none(members.get("features"))
    kinds = object_or_none(features.get("mm_hashes")) if features is not None else None
    if features is not None and kinds is not None:
        for kind, member in kinds.items():
            if (hashes := array_or_none(member)) is not None:
                kinds[kind] = to_raw([_renamed(each, rename) for each in hashes])
        members["features"] = to_raw({**features, "mm_hashes": kinds})


def is_costly_json(body: bytes) -> bool:
    """Whether `body` is slow to process for its size: 1 MiB of hashes takes 0.8 s, one prompt of 1 MiB takes 1 ms."""
    # At least half of the strings are counted; quotes within strings are not.
    strings = (body.count(b'"') - body.count(b'\\"')) // 2
    return strings > _MANY or (body.count(b",") > _MANY and any(sign in body for sign in _MEDIA_NAME_SIGNS))


def _rename_in(member: RawJson, rename: _Rename, level: int = 0) -> RawJson:
    """A list of messages or parts, or one of them, with its media renamed; anything else as it is."""
    if level > _MAX_LEVELS:
        raise RecursionError
    if (items := array_or_none(member)) is not None:
        return to_raw([_rename_in(item, rename, level + 1) for item in items])
    item = object_or_none(member)
    if item is None:
        return member
    if array_or_none(item.get("content")) is not None:
        item["content"] = _rename_in(item["content"], rename, level + 1)
    if not is_null(item.get("uuid")):
        item["uuid"] = _renamed(item["uuid"], rename)
    return to_raw(item)


def _renamed(member: RawJson, rename: _Rename) -> RawJson:
    if is_null(member):
        return member
    name = string_or_none(member)
    return to_raw(rename(name if name is not None else bytes(member).decode(errors="replace")))
