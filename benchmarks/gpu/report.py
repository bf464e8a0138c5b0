"""Lines of a check, one JSON object each, and the verdict.

Two kinds of lines can fail. A fault is a wrong byte, a wrong order or a check that broke; a slow line is a figure
beyond its limit. `"ok": null` is a figure without a limit.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Final

FAULT: Final = 1
SLOW: Final = 2


class Report:
    """Collects lines, with the seconds since its begin, and hands each to `write`."""

    def __init__(self, write: Callable[[str], object] = lambda text: print(text, flush=True)) -> None:
        self.lines: list[dict[str, Any]] = []
        self._write, self._began_s = write, time.monotonic()

    def add(self, line: Mapping[str, Any]) -> None:
        """A line as it is, but for its time."""
        self.lines.append({**line, "at_s": round(time.monotonic() - self._began_s, 1)})
        self._write(json.dumps(self.lines[-1], default=str))

    def tell(self, check: str, ok: bool | None, **figures: Any) -> None:
        """A line that is right, wrong or neither."""
        self.add({"check": check, "ok": ok, **figures})

    def at_most(self, limit: float, check: str, measured: float, **figures: Any) -> None:
        """A figure with an upper limit."""
        self.tell(check, measured <= limit, measured=round(measured, 3), at_most=limit, **figures)

    def at_least(self, limit: float, check: str, measured: float, **figures: Any) -> None:
        """A figure with a lower limit."""
        self.tell(check, measured >= limit, measured=round(measured, 3), at_least=limit, **figures)

    def attempt(self, check: Callable[..., None], *arguments: Any) -> None:
        """Run a check that reports here. One that raises is a fault, and the next one runs."""
        try:
            check(self, *arguments)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is reported
            self.broke(check.__name__, error)

    def broke(self, check: str, error: BaseException) -> None:
        """Of a check that ended with `error`, which is being handled."""
        words, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
        self.tell(check, False, error=words[:500], where=trace[-1500:])

    def verdict(self) -> int:
        """The last line; returns the exit status: 0, `FAULT` or `SLOW`."""
        failed = [line for line in self.lines if line["ok"] is False]
        slow = [line["check"] for line in failed if "measured" in line]
        faults = [line["check"] for line in failed if "measured" not in line]
        self.tell("verdict", not failed, lines=len(self.lines), faults=faults, slow=slow)
        return FAULT if faults else SLOW if slow else 0
