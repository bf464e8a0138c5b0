"""The count and the log of refused requests: one line for a reason and a period, however many requests it meets."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from tokencake_proxy.errors import UpstreamError

if TYPE_CHECKING:
    from tokencake_proxy.errors import Refusal
    from tokencake_proxy.metrics import ProxyMetrics

logger: Final = logging.getLogger(__name__)

_PERIOD_S: Final = 60.0


class Refusals:
    """Takes note of each refusal. The log shows nothing of what a client sent, because keys are part of that."""

    def __init__(self, metrics: ProxyMetrics) -> None:
        self._metrics = metrics
        self._unsaid: dict[str, int] = {}
        """By code: refusals since the last line about it, for a period after that line."""

    def note(self, refusal: Refusal, client: tuple[str, int] | None) -> None:
        """Count `refusal`, and log it if it is the first of its code in this period. Needs a running event loop."""
        if isinstance(refusal, UpstreamError):
            self._metrics.upstream_errors.labels(refusal.kind).inc()
        else:
            self._metrics.refusals.labels(refusal.code).inc()
        if refusal.code in self._unsaid:
            self._unsaid[refusal.code] += 1
            return
        if isinstance(refusal, UpstreamError):
            logger.warning("%s", refusal.message)
        else:
            logger.warning("refused with %d %s: %s", refusal.status, refusal.code, client[0] if client else "a client")
        self._open_period(refusal.code)

    def flush(self) -> None:
        """Log what no line has said yet."""
        for code in list(self._unsaid):
            self._say(code)

    def _open_period(self, code: str) -> None:
        self._unsaid[code] = 0
        asyncio.get_running_loop().call_later(_PERIOD_S, self._close_period, code)

    def _close_period(self, code: str) -> None:
        if self._say(code):
            self._open_period(code)
        else:
            del self._unsaid[code]

    def _say(self, code: str) -> bool:
        count, self._unsaid[code] = self._unsaid[code], 0
        if count:
            logger.warning("%d more refused with %s within %.0f s", count, code, _PERIOD_S)
        return bool(count)
