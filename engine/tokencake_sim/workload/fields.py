"""Checked fields of a JSON object; an error names source, place and value."""

from __future__ import annotations

from typing import Any, Final

from tokencake_sim.errors import WorkloadError

MAX_TEXT: Final = 200
MAX_TOKENS: Final = 10_000_000
_REQUIRED: Final = object()


class Fields:
    """The fields of one JSON object, taken one by one; `end` refuses those that were not taken.

    Every method that takes one raises WorkloadError where it is missing or wrong.
    """

    def __init__(self, source: str, where: str, raw: Any) -> None:
        if not isinstance(raw, dict):
            raise WorkloadError(source, where, f"is {str(raw)[:40]!r}; expected an object")
        self.source, self.where = source, where
        self._left: dict[str, Any] = dict(raw)

    def wrong(self, name: str, value: object, expected: str) -> WorkloadError:
        """The refusal of `value` in the field `name`."""
        return WorkloadError(self.source, self.where, f"has {name} {str(value)[:40]!r}; expected {expected}")

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """Any value; `default` where the field is missing and may be."""
        if name not in self._left and default is _REQUIRED:
            raise WorkloadError(self.source, self.where, f"lacks {name}")
        return self._left.pop(name, default)

    def text(self, name: str, default: Any = _REQUIRED, limit: int = MAX_TEXT) -> Any:
        """A string of 1 to `limit` characters."""
        value = self.take(name, default)
        if value is default or (isinstance(value, str) and 0 < len(value) <= limit):
            return value
        raise self.wrong(name, value, f"a string of 1 to {limit} characters")

    def number(self, name: str, high: float, default: Any = _REQUIRED) -> Any:
        """A number from 0 to `high`, as float."""
        value = self.take(name, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
            raise self.wrong(name, value, f"a number from 0 to {high:g}")
        return float(value)

    def count(self, name: str, default: Any = _REQUIRED, low: int = 0) -> Any:
        """A whole number of tokens or things."""
        value = self.take(name, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_TOKENS:
            raise self.wrong(name, value, f"a whole number from {low} to {MAX_TOKENS}")
        return value

    def flag(self, name: str, default: bool | None) -> bool | None:
        """True or false."""
        value = self.take(name, default)
        if value is not default and not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def items(self, name: str, default: Any = _REQUIRED) -> list[Any]:
        """A list, its items unchecked."""
        value = self.take(name, default)
        if not isinstance(value, list):
            raise self.wrong(name, value, "a list")
        return value

    def end(self) -> None:
        """Refuse fields that were not taken."""
        if self._left:
            raise WorkloadError(self.source, self.where, f"has unknown fields: {', '.join(sorted(self._left))}")
