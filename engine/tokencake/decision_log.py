"""Why did my call wait? The last decisions of the Space Scheduler, in words."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision about one call."""

    at_s: float
    """On the engine's clock."""
    request_id: str
    call: str
    app: str
    agent: str | None
    kind: str
    words: str


class DecisionLog:
    """A ring of decisions; the same words about the same call in a row are kept once."""

    def __init__(self, size: int) -> None:
        self._ring: deque[Decision] = deque(maxlen=size)
        self._last: dict[str, tuple[str, str]] = {}

    def add(self, decision: Decision, topic: str) -> bool:
        """Keep `decision`, unless the last one about this call had the same kind and `topic`."""
        if self._last.get(decision.request_id) == (decision.kind, topic):
            return False
        self._last[decision.request_id] = decision.kind, topic
        self._ring.append(decision)
        return True

    def forget(self, request_id: str) -> None:
        """The call is over; what was decided stays readable."""
        self._last.pop(request_id, None)

    def view(
        self, epoch_offset_s: float, *, call: str | None, app: str | None, limit: int, tenant: str | None = None
    ) -> list[dict[str, Any]]:
        """The newest `limit` decisions, oldest first, as JSON in seconds since the epoch.

        Args:
            epoch_offset_s: added to every time.
            call: only about this call.
            app: only about calls of this application.
            limit: at most so many.
            tenant: only about applications whose ids begin so.
        """
        chosen: list[dict[str, Any]] = []
        for entry in reversed(self._ring):
            if len(chosen) >= limit:
                break
            is_own = tenant is None or entry.app.startswith(tenant)
            if is_own and call in (None, entry.call) and app in (None, entry.app):
                chosen.append(
                    {
                        "at": round(entry.at_s + epoch_offset_s, 6),
                        "call": entry.call,
                        "app": entry.app,
                        "agent": entry.agent,
                        "kind": entry.kind,
                        "words": entry.words,
                    }
                )
        chosen.reverse()
        return chosen
