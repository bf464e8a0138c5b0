"""A dict with a maximum number of entries: the entry that was written longest ago is dropped first."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Generic, TypeVar

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class BoundedDict(OrderedDict[_Key, _Value], Generic[_Key, _Value]):
    """At most `max_entries` entries. Writing a key again makes it the newest; reading does not."""

    def __init__(self, max_entries: int) -> None:
        super().__init__()
        self._max_entries = max_entries

    def __setitem__(self, key: _Key, value: _Value) -> None:
        if key in self:
            self.move_to_end(key)
        super().__setitem__(key, value)
        if len(self) > self._max_entries:
            self.popitem(last=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._max_entries,), None, None, iter(self.items())
