"""Learned durations across restarts: one small JSON file, replaced as a whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vllm.logger import init_logger

if TYPE_CHECKING:
    from tokencake.forecast.durations import Forecast

logger = init_logger("vllm.tokencake")

SAVE_EVERY_S: Final = 60.0


class ForecastFile:
    """Keeps `forecast` in the file `path`, or nowhere. A file that cannot be read or written costs a log line."""

    def __init__(self, forecast: Forecast, path: str | None) -> None:
        self._forecast = forecast
        self._path = None if path is None else Path(path)
        self._saved_s: float | None = None
        if self._path is not None and self._path.exists():
            try:
                forecast.restore(json.loads(self._path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                logger.exception("TokenCake: the forecast in %s cannot be read; it is learned anew", path)

    def save(self, now_s: float) -> None:
        """Write it, at most once in `SAVE_EVERY_S`."""
        if self._path is None or (self._saved_s is not None and now_s - self._saved_s < SAVE_EVERY_S):
            return
        self._saved_s = now_s
        try:
            part = self._path.with_name(f"{self._path.name}.{os.getpid()}")
            part.write_text(json.dumps(self._forecast.dump()), encoding="utf-8")
            part.replace(self._path)
        except OSError:
            logger.exception("TokenCake: the forecast cannot be written to %s", self._path)
