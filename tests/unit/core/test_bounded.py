"""A bounded dict drops the entry that was written longest ago."""

from __future__ import annotations

import pickle

import pytest

from tokencake.bounded import BoundedDict


def filled(max_entries: int, *keys: str) -> BoundedDict[str, int]:
    table: BoundedDict[str, int] = BoundedDict(max_entries)
    for number, key in enumerate(keys):
        table[key] = number
    return table


@pytest.mark.parametrize(
    ("keys", "kept"),
    [("ab", {"a": 0, "b": 1}), ("abc", {"b": 1, "c": 2}), ("abac", {"a": 2, "c": 3}), ("aaa", {"a": 2})],
)
def test_the_newest_entries_are_kept(keys: str, kept: dict[str, int]) -> None:
    assert filled(2, *keys) == kept


def test_reading_does_not_make_an_entry_newer() -> None:
    table = filled(2, "a", "b")
    assert table["a"] == table.get("a") == 0

    table["c"] = 2

    assert "a" not in table


def test_a_copy_from_another_process_has_the_same_bound() -> None:
    copy = pickle.loads(pickle.dumps(filled(2, "a", "b")))

    assert list(copy.items()) == [("a", 0), ("b", 1)]
    copy["c"] = 2
    assert list(copy) == ["b", "c"]
