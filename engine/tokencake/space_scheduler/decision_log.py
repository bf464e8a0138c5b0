"""Log of the latest admission decisions, by call.

An entry holds ids and numbers as fields. The sentence is made when it is read, and for its reader: a tenant learns of
its own calls only, and neither an id nor a number of another tenant.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from tokencake.forecast.fair_lru import FairLRU
from tokencake.registry.timeline import TICK_S, after, page_of

Kind: TypeAlias = Literal["started", "waits", "refused", "preempted"]


@dataclass(frozen=True, slots=True)
class ExplainedDecision:
    """One decision about one call."""

    at_s: float
    """On the engine's clock."""
    request_id: str
    call: str
    app: str
    agent: str | None
    tenant: str
    """Prefix of the call's tenant; empty where tenants are not kept apart."""
    kind: Kind
    reason: str = ""
    """Why, without ids."""
    behind: tuple[str, str] | None = None
    """Application and tenant of the call ahead of it, or of the one that it was swapped out for."""
    waited_s: float | None = None
    need_blocks: int | None = None
    free_blocks: int | None = None
    """Of the whole device."""

    def sentence(self, *, shows_others: bool) -> str:
        """The decision as a sentence; `shows_others`: with what is not the call's own."""
        need = f"needs up to {self.need_blocks} blocks"
        free = f", {self.free_blocks} are free" if shows_others else ""
        match self.kind:
            case "started":
                return f"started after {self.waited_s:.2f} s"
            case "waits" if self.behind is None:
                return f"is at the head of the queue; {need}{free}"
            case "waits":
                return f"waits behind {self._other(shows_others=shows_others)} ({self.reason}); {need}"
            case "refused":
                return f"skipped: {self.reason}; needs {self.need_blocks} blocks{free}"
            case "preempted" if self.behind is None:
                return "was preempted: calls ahead of it had to grow"
            case "preempted":
                return f"was swapped out for {self._other(shows_others=shows_others)}, a more senior application"

    def shown_behind(self, *, shows_others: bool) -> str | None:
        """The application in `behind`, as far as the reader may know it."""
        if self.behind is None:
            return None
        app, tenant = self.behind
        return app if shows_others or tenant == self.tenant else None

    def _other(self, *, shows_others: bool) -> str:
        own = self.shown_behind(shows_others=shows_others)
        if own is None:
            return "an application of another tenant"
        return own.removeprefix("" if shows_others else self.tenant)


class DecisionLog:
    """The newest decisions; of each tenant as many, where there is no room for all of them.

    The same decision about the same call in a row is kept once.
    """

    def __init__(self, size: int) -> None:
        self._kept: FairLRU[float, ExplainedDecision] = FairLRU(size)
        """By a time of its own for each, which grows."""
        self._last_order_s = 0.0
        self._last: dict[str, tuple[str, str]] = {}

    def add(self, decision: ExplainedDecision, dedup_key: str) -> bool:
        """Keep `decision`, unless the last one about this call had the same kind and `dedup_key`."""
        if self._last.get(decision.request_id) == (decision.kind, dedup_key):
            return False
        self._last[decision.request_id] = decision.kind, dedup_key
        self._last_order_s = after(decision.at_s, self._last_order_s)
        self._kept.put(self._last_order_s, decision, decision.tenant)
        return True

    def forget(self, request_id: str) -> None:
        """The call is over; what was decided stays readable."""
        self._last.pop(request_id, None)

    def view(
        self,
        epoch_offset_s: float,
        *,
        call: str | None,
        app: str | None,
        limit: int,
        tenant: str | None = None,
        before: float | None = None,
    ) -> dict[str, Any]:
        """One page of decisions, the newest ones, as JSON in seconds since the epoch. See `page_of`.

        Args:
            epoch_offset_s: added to every time.
            call: only about this call.
            app: only about calls of this application.
            limit: maximum number of decisions.
            tenant: only about this tenant's calls, without what is not its own; None: everything, for the operator.
            before: the `next` of the page before this one.

        Returns:
            `decisions`, oldest first; `order`, a time for each; and `next`, None on the last page.
        """
        page = page_of(
            self._newest_first(tenant, None if before is None else before - epoch_offset_s),
            limit,
            is_wanted=lambda entry: call in (None, entry.call) and app in (None, entry.app),
        )
        newest_last = page.entries[::-1]
        return {
            "decisions": [
                {
                    "at": round(entry.at_s + epoch_offset_s, 6),
                    "call": entry.call,
                    "app": entry.app,
                    "agent": entry.agent,
                    "kind": entry.kind,
                    "behind": entry.shown_behind(shows_others=tenant is None),
                    "words": entry.sentence(shows_others=tenant is None),
                }
                for _, entry in newest_last
            ],
            "order": [round(order_s + epoch_offset_s, 6) for order_s, _ in newest_last],
            "next": None if page.next_s is None else round(page.next_s + epoch_offset_s, 6),
        }

    def _newest_first(
        self, tenant: str | None, before_s: float | None
    ) -> Iterable[tuple[float, ExplainedDecision | None]]:
        times_s = list(self._kept if tenant is None else self._kept.keys_of(tenant))
        end = len(times_s) if before_s is None else bisect_left(times_s, before_s - TICK_S / 4)
        return ((times_s[place], self._kept.get(times_s[place])) for place in range(end - 1, -1, -1))
