"""The count and the log of refused requests: one log line per reason and minute, whatever the number of requests."""

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


class RefusalLog:
    """Records each refusal. Nothing that a client sent is logged, because it may contain keys."""

    def __init__(self, metrics: ProxyMetrics) -> None:
        self._metrics = metrics
        self._suppressed: dict[str, int] = {}
        """Code -> refusals since the last log line with this code; present for one period after that line."""

    def record(self, refusal: Refusal, client: tuple[str, int] | None) -> None:
        """Count `refusal`, and log it if it is the first of its code in this period. Needs a running event loop."""
        if isinstance(refusal, UpstreamError):
            self._metrics.upstream_errors.labels(refusal.kind).inc()
        else:
            self._metrics.refusals.labels(refusal.code).inc()
        if refusal.code in self._suppressed:
            self._suppressed[refusal.code] += 1
            return
        if isinstance(refusal, UpstreamError):
            logger.warning("%s", refusal.message)
        else:
            logger.warning("refused with %d %s: %s", refusal.status, refusal.code, client[0] if client else "a client")
        self._open_period(refusal.code)

    def flush(self) -> None:
        """Log the counts that no line has reported yet."""
        for code in list(self._suppressed):
            self._log_suppressed(code)

    def _open_period(self, code: str) -> None:
        self._suppressed[code] = 0
        asyncio.get_running_loop().call_later(_PERIOD_S, self._close_period, code)

    def _close_period(self, code: str) -> None:
        if self._log_suppressed(code):
            self._open_period(code)
        else:
            del self._suppressed[code]

    def _log_suppressed(self, code: str) -> bool:
        count, self._suppressed[code] = self._suppressed[code], 0
        if count:
            logger.warning("%d more refused with %s within %.0f s", count, code, _PERIOD_S)
        return bool(count)
