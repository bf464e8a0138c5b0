"""What events change, to the second and to the bound, and how the state shows it."""

from __future__ import annotations

from typing import Any

import pytest

from tokencake import protocol
from tokencake.protocol import Hint
from tokencake.registry.memory_account import MAX_GRAPHS_ASKED
from tokencake.registry.record_store import Limits
from tokencake.registry.registry import Registry
from tokencake.registry.state_view import state_view


def with_call(name: str = "c", session: str = "s", now: float = 100.0, **limits: Any) -> Registry:
    registry = Registry(Limits(**limits))
    add(registry, name, session, now)
    return registry


def add(registry: Registry, name: str, session: str = "s", now: float = 100.0, **hint: Any) -> None:
    assert registry.add_call(name, Hint(session=session, call=name, **hint), 10, now)


def tool(registry: Registry, name: str = "t", call: str = "c") -> Any:
    return registry.calls[call].tools[name]


# --- tools ------------------------------------------------------------------------------------------


def test_an_event_happened_as_long_ago_as_it_says() -> None:
    registry = with_call()
    registry.apply(protocol.ToolStart("c", "t", "search", 5.0, 9.0, ago_s=2.0), 110.0)
    assert (tool(registry).started_s, tool(registry).estimate_s, tool(registry).deadline_s) == (108.0, 5.0, 9.0)
    registry.apply(protocol.ToolEnd("c", "t", status="error", ago_s=1.0), 114.0)

    assert (tool(registry).ended_s, tool(registry).duration_s, tool(registry).status) == (113.0, 5.0, "error")


def test_the_measured_duration_wins_over_the_difference_of_the_events() -> None:
    registry = with_call()
    registry.apply(protocol.ToolStart("c", "t", "search"), 110.0)
    registry.apply(protocol.ToolEnd("c", "t", duration_s=3.0, ago_s=1.0), 114.0)

    assert (tool(registry).started_s, tool(registry).ended_s, tool(registry).duration_s) == (110.0, 113.0, 3.0)


def test_the_measured_duration_places_the_start() -> None:
    registry = with_call()
    registry.apply(protocol.ToolEnd("c", "t", "search", duration_s=3.0, ago_s=1.0), 114.0)
    assert (tool(registry).started_s, tool(registry).ended_s) == (110.0, 113.0)
    assert registry.apply(protocol.ToolStart("c", "t", "search", ago_s=9.0), 114.0) == "late"
    assert tool(registry).started_s == 110.0


def test_a_tool_that_ends_before_it_began_took_no_time_and_one_of_unknown_begin_an_unknown_time() -> None:
    registry = with_call()
    registry.apply(protocol.ToolStart("c", "t", "search"), 110.0)
    registry.apply(protocol.ToolEnd("c", "t", ago_s=5.0), 110.0)
    registry.apply(protocol.ToolEnd("c", "u"), 110.0)

    assert (tool(registry).duration_s, tool(registry, "u").duration_s) == (0.0, None)


@pytest.mark.parametrize(
    ("known", "told", "outcome"),
    [
        ((None, None), ("x", None), "applied"),
        ((None, 0.5), (None, 0.5), "duplicate"),
        ((None, 0.5), (None, 0.49), "late"),
        ((None, 0.5), (None, 0.51), "applied"),
        ((None, 0.5), ("x", None), "applied"),
        (("x", None), ("x", None), "duplicate"),
        (("x", None), (None, 0.0), "applied"),
        (("x", 0.2), ("y", 0.1), "late"),
        (("x", 0.2), (None, None), "duplicate"),
    ],
)
def test_progress_goes_forward_or_is_late(
    known: tuple[str | None, float | None], told: tuple[str | None, float | None], outcome: str
) -> None:
    registry = with_call()
    registry.apply(protocol.ToolStart("c", "t", "search"), 110.0)
    tool(registry).stage, tool(registry).fraction = known

    assert registry.apply(protocol.ToolProgress("c", "t", told[0], told[1]), 111.0) == outcome
    expected = known if outcome != "applied" else tuple(new or old for new, old in zip(told, known, strict=True))
    assert (tool(registry).stage, tool(registry).fraction or None) == (expected[0], expected[1] or None)


def test_progress_of_a_tool_that_is_over_is_late_and_of_an_unknown_one_unknown() -> None:
    registry = with_call()
    assert registry.apply(protocol.ToolProgress("c", "t", fraction=0.5), 111.0) == "unknown"
    registry.apply(protocol.ToolEnd("c", "t"), 111.0)
    assert registry.apply(protocol.ToolProgress("c", "t", fraction=0.5), 112.0) == "late"


def test_a_call_takes_as_many_tools_as_its_limit_and_those_it_has_go_on() -> None:
    registry = with_call(tool_calls_per_call=2)
    assert registry.apply(protocol.ToolStart("c", "t1", "x"), 110.0) == "applied"
    assert registry.apply(protocol.ToolEnd("c", "t2"), 110.0) == "applied"
    assert registry.apply(protocol.ToolEnd("c", "t3"), 110.0) == "invalid"
    assert registry.apply(protocol.ToolEnd("c", "t1"), 110.0) == "applied"
    assert set(registry.calls["c"].tools) == {"t1", "t2"}


# --- waits ------------------------------------------------------------------------------------------


def wait(registry: Registry, kind: str = "human") -> tuple[float, float | None]:
    found = registry.sessions["s"].waits[kind]
    return found.started_s, found.ended_s


def test_a_wait_begins_and_ends_as_long_ago_as_it_says() -> None:
    registry = with_call()
    assert registry.apply(protocol.StallStart("s", "human", 60.0, ago_s=3.0), 110.0) == "applied"
    assert wait(registry) == (107.0, None)
    assert registry.apply(protocol.StallEnd("s", "human", ago_s=1.0), 120.0) == "applied"
    assert wait(registry) == (107.0, 119.0)
    assert registry.apply(protocol.StallEnd("s", "human"), 121.0) == "late"


def test_a_wait_does_not_end_before_it_began() -> None:
    registry = with_call()
    registry.apply(protocol.StallStart("s", "human"), 110.0)
    registry.apply(protocol.StallEnd("s", "human", ago_s=4.0), 110.0)

    assert wait(registry) == (110.0, 110.0)


@pytest.mark.parametrize(("ago_s", "outcome"), [(10.1, "late"), (10.0, "applied"), (9.9, "applied")])
def test_a_wait_that_began_before_the_latest_call_is_late(ago_s: float, outcome: str) -> None:
    registry = with_call(now=100.0)

    assert registry.apply(protocol.StallStart("s", "human", ago_s=ago_s), 110.0) == outcome


@pytest.mark.parametrize(("ago_s", "outcome"), [(5.1, "late"), (5.0, "applied"), (4.9, "applied")])
def test_a_wait_that_began_before_the_end_of_the_last_one_is_late(ago_s: float, outcome: str) -> None:
    registry = with_call()
    registry.apply(protocol.StallEnd("s", "human"), 105.0)
    assert wait(registry) == (105.0, 105.0)

    assert registry.apply(protocol.StallStart("s", "human", ago_s=ago_s), 110.0) == outcome


def test_a_session_keeps_as_many_waits_as_its_limit_the_newest_kinds() -> None:
    registry = with_call(waits_per_session=2)
    for kind in ("a", "b"):
        registry.apply(protocol.StallEnd("s", kind), 105.0)
    registry.apply(protocol.StallStart("s", "a"), 106.0)
    assert set(registry.sessions["s"].waits) == {"a", "b"}, "a kind that is known takes no room"
    registry.apply(protocol.StallEnd("s", "c"), 107.0)
    assert set(registry.sessions["s"].waits) == {"b", "c"}


# --- calls ------------------------------------------------------------------------------------------


def test_preemptions_tokens_and_requests_are_counted() -> None:
    registry = with_call()
    registry.preempt_call("c")
    registry.preempt_call("c")
    registry.preempt_call("unknown")
    registry.finish_call("c", 7, is_aborted=False, now=103.0)
    registry.finish_call("c", 7, is_aborted=False, now=104.0)
    call = registry.calls["c"]

    assert (call.preemptions, call.output_tokens, call.finished_s, call.status) == (2, 7, 103.0, "finished")
    assert registry.sessions["s"].live_requests == 0
    assert registry.counts["calls", "finished"] == 1


def test_only_the_first_slot_is_noted_and_critical_calls_are_observed_apart() -> None:
    registry = with_call()
    add(registry, "d", now=101.0, critical=True)
    for now in (103.0, 109.0):
        registry.schedule_call("c", 3, 4, now)
        registry.schedule_call("d", 5, 6, now)
    registry.schedule_call("unknown", 0, 0, 103.0)
    call = registry.calls["c"]

    assert (call.status, call.scheduled_s, call.cached_device_tokens, call.cached_host_tokens) == ("running", 103, 3, 4)
    assert registry.drain()["observed"] == {"queue_s": [3.0, 2.0], "critical_queue_s": [2.0]}
    assert registry.hint_of("c") == Hint(session="s", call="c")
    assert registry.hint_of("unknown") is None


def test_a_bounded_number_of_durations_is_observed_between_two_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokencake.registry.registry.MAX_OBSERVATIONS", 2)
    registry = Registry()
    for seconds in (1.0, 2.0, 3.0):
        registry.observe("tool_s", seconds)
    assert registry.drain()["observed"] == {"tool_s": [1.0, 2.0]}
    registry.observe("tool_s", 4.0)
    assert registry.drain()["observed"] == {"tool_s": [4.0]}


def test_events_are_counted_by_type_and_outcome_but_those_that_another_engine_may_know() -> None:
    registry = with_call()
    for event in (protocol.ToolEnd("c", "t"), protocol.ToolEnd("c", "t"), protocol.ToolEnd("x", "t")):
        registry.apply(event, 110.0)

    assert registry.drain()["counts"] == [
        [["events", "tool_end", "applied"], 1],
        [["events", "tool_end", "duplicate"], 1],
    ]


def test_a_tool_is_observed_when_its_end_tells_a_duration() -> None:
    registry = with_call()
    registry.apply(protocol.ToolStart("c", "t", "x"), 110.0)
    registry.apply(protocol.ToolEnd("c", "t"), 112.0)
    registry.apply(protocol.ToolEnd("c", "t"), 113.0)
    registry.apply(protocol.ToolEnd("c", "u"), 113.0)

    assert registry.drain()["observed"] == {"tool_s": [2.0]}


def test_a_call_shows_that_its_session_waits_for_nothing_but_its_own_tools() -> None:
    registry = with_call()
    registry.apply(protocol.ToolStart("c", "t", "x"), 110.0)
    registry.apply(protocol.StallStart("s", "human"), 110.0)
    registry.apply(protocol.StallEnd("s", "join"), 110.0)
    add(registry, "d", now=120.0)
    assert (tool(registry).ended_s, tool(registry).status) == (120.0, None)
    assert (wait(registry), wait(registry, "join")) == ((110.0, 120.0), (110.0, 110.0))

    registry.apply(protocol.ToolStart("d", "t", "x"), 121.0)
    registry.finish_call("d", 1, is_aborted=False, now=122.0)
    add(registry, "d", now=123.0)
    assert tool(registry, call="d").ended_s is None, "a call that is repeated keeps its tools as they are"


def test_a_session_that_ends_waits_for_nothing_and_keeps_its_first_status() -> None:
    registry = with_call()
    registry.finish_call("c", 1, is_aborted=False, now=105.0)
    registry.apply(protocol.ToolStart("c", "t", "x"), 110.0)
    assert registry.apply(protocol.SessionEnd("s", "error"), 120.0) == "applied"
    assert registry.apply(protocol.SessionEnd("s", "ok"), 121.0) == "duplicate"

    assert (registry.sessions["s"].ended, tool(registry).ended_s) == ("error", 120.0)


def test_an_event_ends_the_sessions_that_it_names_and_are_known() -> None:
    registry = Registry()
    add(registry, "c1", "app/one", app="app")
    add(registry, "c2", "app/two", app="app")
    add(registry, "c3", "thread", app="app")

    def ended(event: protocol.Event) -> list[str]:
        return [session.id for session in registry.ended_by(event)]

    assert ended(protocol.AppEnd("app")) == ["app/one", "app/two"]
    assert ended(protocol.SessionEnd("thread")) == ["thread"]
    assert ended(protocol.AppEnd("other")) == ended(protocol.SessionEnd("other")) == []
    assert ended(protocol.StallEnd("thread", "human")) == []


def test_a_session_that_moves_to_another_application_ends_with_that_one() -> None:
    registry = Registry()
    add(registry, "c1", "app/one", app="app")
    add(registry, "c2", "app/one", app="other")

    assert registry.ended_by(protocol.AppEnd("app")) == []
    assert registry.sessions["app/one"].app == "other"


def test_a_bounded_number_of_graphs_is_asked_for_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry()
    for number in range(MAX_GRAPHS_ASKED):
        add(registry, f"c{number}", f"s{number}", graph=f"g{number}")
    assert registry.unknown_graphs() == [f"g{number}" for number in range(MAX_GRAPHS_ASKED)]
    add(registry, "more", "more", graph="more")
    assert registry.unknown_graphs() == [*(f"g{number}" for number in range(1, MAX_GRAPHS_ASKED)), "more"]
    registry.apply(protocol.Graph("g5", {}, ()), 110.0)
    add(registry, "again", "again", graph="g5")
    assert "g5" not in registry.unknown_graphs()


# --- the state --------------------------------------------------------------------------------------


def test_the_state_shows_a_call_with_all_its_times_in_seconds_of_the_epoch() -> None:
    registry = Registry()
    hint = Hint(
        session="s",
        call="c",
        app="a",
        app_started_ago_s=2.0,
        agent="writer",
        graph="g",
        node="n",
        parent_call="p",
        parent_tool_call="pt",
    )
    registry.add_call("r", hint, 90, 100.0)
    registry.schedule_call("r", 48, 16, 101.5)
    registry.preempt_call("r")
    registry.finish_call("r", 7, is_aborted=False, now=103.0)
    registry.apply(protocol.ToolStart("c", "t", "search", 5.0), 104.0)
    registry.apply(protocol.ToolProgress("c", "t", "rank", 0.5), 105.0)
    registry.apply(protocol.ToolEnd("c", "t", status="error"), 106.0)
    registry.apply(protocol.StallStart("s", "human", 9.0), 107.0)
    state = state_view(registry, 1_000.0)

    assert state["calls"] == [
        {
            "call": "c",
            "session": "s",
            "app": "a",
            "agent": "writer",
            "graph": "g",
            "node": "n",
            "parent_call": "p",
            "parent_tool_call": "pt",
            "status": "finished",
            "arrived": 1_100.0,
            "scheduled": 1_101.5,
            "finished": 1_103.0,
            "queue_s": 1.5,
            "prompt_tokens": 90,
            "cached_tokens": {"device": 48, "host": 16},
            "output_tokens": 7,
            "preemptions": 1,
            "tools": [
                {
                    "tool_call": "t",
                    "tool": "search",
                    "start": 1_104.0,
                    "end": 1_106.0,
                    "duration_s": 2.0,
                    "status": "error",
                    "estimate_s": 5.0,
                    "stage": "rank",
                    "fraction": 0.5,
                }
            ],
        }
    ]
    assert state["apps"] == {"a": {"first_seen": 1_098.0, "ended": None}}
    assert state["sessions"] == {
        "s": {
            "agent": "writer",
            "app": "a",
            "status": "stalled",
            "touched": 1_106.0,
            "waits": {"human": {"start": 1_107.0, "end": None, "estimate_s": 9.0}},
        }
    }
    assert (state["v"], state["order"], state["next"]) == (1, [1_100.0], None)
    assert state["totals"] == {"sessions": 1, "calls": 1, "live_calls": 0}


def test_times_of_the_state_are_told_to_the_microsecond() -> None:
    registry = with_call(now=0.123_456_7)

    assert state_view(registry, 1_000.0)["calls"][0]["arrived"] == 1_000.123_457
    assert state_view(registry, 1_000.0)["calls"][0]["queue_s"] is None


def test_a_session_runs_is_stalled_has_ended_or_is_idle() -> None:
    registry = with_call()

    def status() -> str:
        return str(state_view(registry, 0.0)["sessions"]["s"]["status"])

    registry.apply(protocol.ToolStart("c", "t", "x"), 101.0)
    assert status() == "running"
    registry.finish_call("c", 1, is_aborted=False, now=102.0)
    assert status() == "stalled"
    registry.apply(protocol.ToolEnd("c", "t"), 103.0)
    assert status() == "idle"
    registry.apply(protocol.StallStart("s", "human"), 104.0)
    assert status() == "stalled"
    registry.apply(protocol.SessionEnd("s"), 105.0)
    assert status() == "ended"


def test_the_state_comes_in_pages_of_one_session_app_or_tenant() -> None:
    registry = Registry(has_tenants=True)
    for number in range(6):
        tenant = "t::" if number % 2 else "u::"
        hint = Hint(f"{tenant}s{number}", f"{tenant}c{number}", f"{tenant}a{number // 4}", tenant=tenant)
        registry.add_call(f"r{number}", hint, 10, 100.0 + number)
    registry.finish_call("r1", 1, is_aborted=False, now=110.0)

    def calls(**asked: Any) -> list[str]:
        return [call["call"][3:] for call in state_view(registry, 1_000.0, **asked)["calls"]]

    assert calls(tenant="t::") == ["c1", "c3", "c5"]
    assert calls(tenant="t::", session="u::s0") == []
    assert calls(tenant="u::", session="u::s0") == calls(session="u::s0") == ["c0"]
    assert calls(session="unknown") == []
    assert calls(app="t::a0") == ["c1", "c3"]
    page = state_view(registry, 1_000.0, limit=4)
    assert ([call["call"][3:] for call in page["calls"]], page["next"]) == (["c2", "c3", "c4", "c5"], 1_102.0)
    assert page["order"] == [1_102.0, 1_103.0, 1_104.0, 1_105.0]
    assert set(page["apps"]) == {"u::a0", "t::a0", "u::a1", "t::a1"}
    assert calls(limit=4, before=page["next"]) == ["c0", "c1"]
    assert calls(session="t::s1", before=1_101.0) == []
    assert calls(session="t::s1", before=1_101.1) == ["c1"]
    assert page["totals"] == {"sessions": 6, "calls": 6, "live_calls": 5}
    assert state_view(registry, 0.0, tenant="t::")["totals"] == {"sessions": 3, "calls": 3, "live_calls": 2}
    assert state_view(registry, 0.0, tenant="v::")["totals"] == {"sessions": 0, "calls": 0, "live_calls": 0}


def test_tool_calls_weigh_in_a_page_like_calls() -> None:
    registry = Registry(Limits(tool_calls_per_call=1_500))
    for number in range(3):
        add(registry, f"c{number}", f"s{number}", now=100.0 + number)
        for tool_call in range(999):
            registry.apply(protocol.ToolEnd(f"c{number}", f"t{tool_call}"), 200.0)

    assert [call["call"] for call in state_view(registry, 0.0)["calls"]] == ["c1", "c2"]
    registry.apply(protocol.ToolEnd("c1", "one more"), 200.0)
    assert [call["call"] for call in state_view(registry, 0.0)["calls"]] == ["c2"]
