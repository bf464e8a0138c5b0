"""The rate limit on events holds for each tenant alone."""

from __future__ import annotations

import pytest

from tests.harness.tenancy import SECRET
from tests.unit.proxy.scoping import ALICE, BOB, dict_of
from tokencake import protocol
from tokencake_proxy.event_budget import EventBudget

# --- the rate limit -------------------------------------------------------------------------------


def test_only_the_tenant_that_sends_too_many_events_is_limited(engine, start_proxy, http):
    proxy = start_proxy(engine.url, tenant_secret=SECRET.encode(), tenant_events_per_s=0.001, json_inline_bytes=1_000)
    events = {"v": 1, "events": [{"type": "session_end", "session": "s"}] * 600}

    def report(headers):
        return http.post(f"{proxy.url}/v1/tokencake/events", json=events, headers=dict_of(headers))

    first, second, other = report(ALICE), report(ALICE), report(BOB)

    assert (first.status_code, second.status_code, other.status_code) == (200, 429, 200)
    assert second.json()["error"]["code"] == "too_many_events"
    assert int(second.headers["retry-after"]) >= 199_000


def test_an_event_budget_refills_and_always_allows_one_full_body():
    now = [0.0]
    budget = EventBudget(10.0, lambda: now[0])

    assert budget.take("a", protocol.MAX_EVENTS) == 0.0
    assert budget.take("a", 50) == pytest.approx(5.0)
    assert budget.take("b", 1) == 0.0
    now[0] = 5.0
    assert budget.take("a", 50) == 0.0
    now[0] = 1e6
    assert [budget.take("a", protocol.MAX_EVENTS), budget.take("a", 1)] == [0.0, pytest.approx(0.1)]


def test_the_number_of_tenants_in_memory_is_bounded():
    budget = EventBudget(10.0, lambda: 0.0)
    for number in range(10_000):
        budget.take(str(number), 1)
    assert len(budget._left) < 5_000
