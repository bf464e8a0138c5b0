from hypothesis import given
from hypothesis import strategies as st

from tokencake import protocol
from tokencake.protocol import Hint
from tokencake.registry.record_store import Limits
from tokencake.registry.registry import Registry
from tokencake.registry.state_view import state_view


def registry_with_call(call: str = "c", session: str = "s", **limits: float) -> Registry:
    """A finished call, added at 100 s, scheduled at 101 s, finished at 103 s."""
    registry = Registry(Limits(**limits))
    add(registry, call, session)
    registry.schedule_call(call, device_tokens=64, host_tokens=0, now=101.0)
    registry.finish_call(call, output_tokens=7, is_aborted=False, now=103.0)
    return registry


def add(registry: Registry, call: str, session: str, now: float = 100.0, **hint: object) -> None:
    registry.add_call(call, Hint(session=session, call=call, **hint), prompt_tokens=100, now=now)


def only_tool(registry: Registry) -> dict[str, object]:
    (call,) = state_view(registry, 0.0)["calls"]
    (tool,) = call["tools"]
    return tool


def test_the_state_tells_what_became_of_a_call() -> None:
    (call,) = state_view(registry_with_call(), epoch_offset_s=1_000.0)["calls"]
    assert (call["arrived"], call["scheduled"], call["finished"]) == (1_100.0, 1_101.0, 1_103.0)
    assert call["status"] == "finished"
    assert call["queue_s"] == 1.0
    assert call["cached_tokens"] == {"device": 64, "host": 0}
    assert (call["prompt_tokens"], call["output_tokens"]) == (100, 7)


def test_an_open_tool_call_stalls_its_session_until_it_ends() -> None:
    registry = registry_with_call()
    assert registry.apply(protocol.ToolStart("c", "t", "search"), 104.0) == "applied"
    assert state_view(registry, 0.0)["sessions"]["s"]["status"] == "stalled"
    assert registry.drain()["gauges"]["stalled_calls"] == 1
    assert registry.apply(protocol.ToolEnd("c", "t"), 106.0) == "applied"
    assert state_view(registry, 0.0)["sessions"]["s"]["status"] == "idle"
    assert registry.drain()["gauges"]["stalled_calls"] == 0
    assert only_tool(registry)["duration_s"] == 2.0


def test_time_spent_in_queues_does_not_count_as_tool_time() -> None:
    registry = registry_with_call()
    registry.apply(protocol.ToolStart("c", "t", "search", ago_s=1.0), 105.0)
    registry.apply(protocol.ToolEnd("c", "t", duration_s=2.5, ago_s=0.5), 107.0)
    tool = only_tool(registry)
    assert (tool["start"], tool["end"], tool["duration_s"]) == (104.0, 106.5, 2.5)


def test_an_end_before_its_start_is_taken_and_the_start_is_late() -> None:
    registry = registry_with_call()
    assert registry.apply(protocol.ToolEnd("c", "t", duration_s=2.0), 106.0) == "applied"
    assert registry.apply(protocol.ToolStart("c", "t", "search"), 106.1) == "late"
    tool = only_tool(registry)
    assert (tool["tool"], tool["start"], tool["end"]) == ("search", 104.0, 106.0)


def test_an_event_twice_is_as_once() -> None:
    registry = registry_with_call()
    events = [protocol.ToolStart("c", "t", "search"), protocol.ToolEnd("c", "t")]
    assert [registry.apply(event, 104.0) for event in events] == ["applied", "applied"]
    assert [registry.apply(event, 109.0) for event in events] == ["duplicate", "duplicate"]
    assert only_tool(registry)["end"] == 104.0


def test_events_of_a_call_that_is_not_known_are_unknown() -> None:
    registry = Registry()
    assert registry.apply(protocol.ToolStart("c", "t", "search"), 1.0) == "unknown"
    assert registry.apply(protocol.ToolEnd("c", "t"), 1.0) == "unknown"
    assert registry.apply(protocol.ToolProgress("c", "t"), 1.0) == "unknown"
    assert registry.apply(protocol.StallStart("s", "human"), 1.0) == "unknown"
    assert registry.apply(protocol.StallEnd("s", "human"), 1.0) == "unknown"
    assert registry.apply(protocol.SessionEnd("s"), 1.0) == "unknown"
    assert registry.apply(protocol.AppEnd("a"), 1.0) == "unknown"
    assert state_view(registry, 0.0)["totals"] == {"sessions": 0, "calls": 0, "live_calls": 0}


def test_progress_only_goes_forward() -> None:
    registry = registry_with_call()
    registry.apply(protocol.ToolStart("c", "t", "search"), 104.0)
    assert registry.apply(protocol.ToolProgress("c", "t", fraction=0.5), 104.5) == "applied"
    assert registry.apply(protocol.ToolProgress("c", "t", fraction=0.5), 104.6) == "duplicate"
    assert registry.apply(protocol.ToolProgress("c", "t", fraction=0.2), 104.7) == "late"
    assert only_tool(registry)["fraction"] == 0.5


def test_a_wait_that_is_no_tool_ends_with_the_next_call_of_its_session() -> None:
    registry = registry_with_call()
    assert registry.apply(protocol.StallStart("s", "human", estimate_s=60.0), 104.0) == "applied"
    assert registry.apply(protocol.StallStart("s", "human"), 104.5) == "duplicate"
    add(registry, "c2", "s", now=110.0)
    assert registry.apply(protocol.StallEnd("s", "human"), 111.0) == "late"
    wait = state_view(registry, 0.0)["sessions"]["s"]["waits"]["human"]
    assert (wait["start"], wait["end"], wait["estimate_s"]) == (104.0, 110.0, 60.0)


def test_a_wait_reported_after_the_call_that_ended_it_is_late() -> None:
    registry = registry_with_call()
    add(registry, "c2", "s", now=110.0)
    assert registry.apply(protocol.StallStart("s", "interrupt", ago_s=2.0), 111.0) == "late"
    assert state_view(registry, 0.0)["sessions"]["s"]["waits"] == {}


def test_a_wait_whose_end_comes_first_is_not_opened_by_its_start() -> None:
    registry = registry_with_call()
    assert registry.apply(protocol.StallEnd("s", "human"), 106.0) == "applied"
    assert registry.apply(protocol.StallStart("s", "human", ago_s=2.0), 107.0) == "late"
    assert state_view(registry, 0.0)["sessions"]["s"]["status"] == "idle"


def test_a_tool_whose_end_got_lost_stalls_its_session_only_until_the_next_call() -> None:
    registry = registry_with_call()
    registry.apply(protocol.ToolStart("c", "t", "search"), 104.0)
    add(registry, "c2", "s", now=110.0)
    registry.finish_call("c2", 1, is_aborted=False, now=111.0)
    assert state_view(registry, 0.0)["sessions"]["s"]["status"] == "idle"
    assert registry.drain()["gauges"]["stalled_calls"] == 0
    assert registry.apply(protocol.ToolEnd("c", "t", duration_s=3.0, ago_s=1.0), 112.0) == "applied"
    assert state_view(registry, 0.0)["calls"][0]["tools"][0]["duration_s"] == 3.0


def test_the_end_of_a_session_outlives_the_abort_of_its_last_call() -> None:
    registry = Registry()
    add(registry, "c", "s")
    assert registry.apply(protocol.SessionEnd("s"), 101.0) == "applied"
    registry.finish_call("c", 0, is_aborted=True, now=102.0)
    assert state_view(registry, 0.0)["sessions"]["s"]["status"] == "ended"
    add(registry, "c2", "s", now=103.0)
    registry.finish_call("c2", 0, is_aborted=False, now=104.0)
    assert state_view(registry, 0.0)["sessions"]["s"]["status"] == "idle"


def test_a_stage_is_taken_after_a_fraction_and_leaves_it() -> None:
    registry = registry_with_call()
    registry.apply(protocol.ToolStart("c", "t", "search"), 104.0)
    registry.apply(protocol.ToolProgress("c", "t", fraction=0.5), 104.5)
    assert registry.apply(protocol.ToolProgress("c", "t", stage="rank"), 104.6) == "applied"
    tool = only_tool(registry)
    assert (tool["stage"], tool["fraction"]) == ("rank", 0.5)


def test_a_call_id_of_another_session_is_not_joined() -> None:
    registry = Registry()
    registry.add_call("r1", Hint(session="theirs", call="c"), 100, 100.0)
    registry.add_call("r2", Hint(session="mine", call="c"), 100, 101.0)
    assert registry.calls["c"].hint.session == "theirs"
    assert registry.calls["r2"].hint.session == "mine"
    registry.finish_call("r1", 1, is_aborted=False, now=102.0)
    assert registry.calls["c"].status == "finished"


def test_a_call_of_which_one_attempt_came_through_is_finished() -> None:
    registry = Registry()
    for request in ("r1", "r2"):
        registry.add_call(request, Hint(session="s", call="c"), 100, 100.0)
    registry.finish_call("r2", 5, is_aborted=False, now=101.0)
    registry.finish_call("r1", 0, is_aborted=True, now=102.0)
    assert registry.calls["c"].status == "finished"


def test_a_session_keeps_a_bounded_number_of_calls() -> None:
    registry = Registry(Limits(calls_per_session=3))
    for number in range(10):
        add(registry, f"c{number}", "s", now=100.0 + number)
        registry.finish_call(f"c{number}", 1, is_aborted=False, now=100.5 + number)
    assert list(registry.calls) == ["c7", "c8", "c9"]


def test_requests_that_share_a_call_id_are_one_call() -> None:
    registry = Registry()
    for request in ("r1", "r2"):
        registry.add_call(request, Hint(session="s", call="c"), prompt_tokens=100, now=100.0)
    registry.finish_call("r1", 5, is_aborted=False, now=101.0)
    assert state_view(registry, 0.0)["calls"][0]["status"] == "waiting"
    registry.finish_call("r2", 6, is_aborted=False, now=102.0)
    (call,) = state_view(registry, 0.0)["calls"]
    assert (call["status"], call["finished"], call["output_tokens"]) == ("finished", 102.0, 11)


def test_a_repeated_call_starts_over_and_keeps_its_tools() -> None:
    registry = registry_with_call()
    registry.apply(protocol.ToolStart("c", "t", "search"), 104.0)
    add(registry, "c", "s", now=110.0)
    (call,) = state_view(registry, 0.0)["calls"]
    assert (call["status"], call["arrived"], len(call["tools"])) == ("waiting", 110.0, 1)


def test_ten_thousand_sessions_push_out_the_oldest_and_never_a_live_one() -> None:
    registry = Registry(Limits(sessions=100, calls=150))
    add(registry, "live", "live-session")
    for number in range(10_000):
        add(registry, f"c{number}", f"s{number}", now=100.0 + number / 1_000)
        registry.finish_call(f"c{number}", 1, is_aborted=False, now=100.0 + number / 1_000)
    assert len(registry.sessions) <= 101
    assert len(registry.calls) <= 151
    assert "live" in registry.calls
    assert "s9999" in registry.sessions
    assert registry.counts["forgotten", "session"] >= 9_800


def test_what_nobody_touches_for_an_hour_is_forgotten() -> None:
    registry = Registry()
    add(registry, "old", "old", app="old-app")
    registry.finish_call("old", 1, is_aborted=False, now=101.0)
    add(registry, "new", "new", now=101.0 + 3_601.0, app="new-app")
    assert list(registry.sessions) == ["new"]
    assert list(registry.calls) == ["new"]
    assert list(registry.apps) == ["new-app"]


def test_a_call_takes_a_bounded_number_of_tools() -> None:
    registry = registry_with_call(tool_calls_per_call=2)
    outcomes = [registry.apply(protocol.ToolStart("c", f"t{n}", "x"), 104.0) for n in range(3)]
    assert outcomes == ["applied", "applied", "invalid"]


def test_a_graph_that_hints_name_is_asked_for_until_somebody_describes_it() -> None:
    registry = Registry()
    add(registry, "c", "s", graph="g")
    assert registry.unknown_graphs() == ["g"]
    assert registry.apply(protocol.Graph("g", {}, ()), 101.0) == "applied"
    assert registry.apply(protocol.Graph("g", {}, ()), 102.0) == "duplicate"
    assert registry.unknown_graphs() == []


def test_the_end_of_an_app_is_kept_beside_its_sessions() -> None:
    registry = Registry()
    add(registry, "c", "s", app="a", app_started_ago_s=5.0)
    assert registry.apply(protocol.AppEnd("a"), 110.0) == "applied"
    assert registry.apply(protocol.AppEnd("a"), 111.0) == "duplicate"
    assert state_view(registry, 0.0)["apps"] == {"a": {"first_seen": 95.0, "ended": "ok"}}


def test_an_app_takes_the_sessions_with_it_that_are_named_after_it() -> None:
    registry = Registry()
    add(registry, "c1", "app-1/writer", app="app-1")
    add(registry, "c2", "thread-1/writer", app="app-1")
    for call in ("c1", "c2"):
        registry.finish_call(call, 1, is_aborted=False, now=101.0)
    registry.apply(protocol.AppEnd("app-1"), 110.0)
    sessions = state_view(registry, 0.0)["sessions"]
    assert (sessions["app-1/writer"]["status"], sessions["thread-1/writer"]["status"]) == ("ended", "idle")


def test_the_state_can_be_asked_for_one_session_or_app() -> None:
    registry = Registry()
    for number in range(4):
        add(registry, f"c{number}", f"s{number % 2}", app=f"a{number // 2}")
    assert [call["call"] for call in state_view(registry, 0.0, session="s1")["calls"]] == ["c1", "c3"]
    assert [call["call"] for call in state_view(registry, 0.0, app="a0")["calls"]] == ["c0", "c1"]
    assert [call["call"] for call in state_view(registry, 0.0, limit=1)["calls"]] == ["c3"]


def test_a_drain_hands_out_each_count_once() -> None:
    registry = registry_with_call()
    registry.apply(protocol.ToolEnd("c", "t", duration_s=2.0), 106.0)
    first, second = registry.drain(), registry.drain()
    assert [["calls", "finished"], 1] in first["counts"]
    assert [["events", "tool_end", "applied"], 1] in first["counts"]
    assert (first["observed"]["tool_s"], first["observed"]["queue_s"]) == ([2.0], [1.0])
    assert second["counts"] == []
    assert not any(second["observed"].values())


names = st.sampled_from(["a", "b", "c"])
steps = st.one_of(
    st.tuples(st.just("add"), names, names),
    st.tuples(st.just("schedule"), names),
    st.tuples(st.just("preempt"), names),
    st.tuples(st.just("finish"), names, st.booleans()),
    st.builds(protocol.ToolStart, names, names, names, ago_s=st.floats(0, 10)),
    st.builds(protocol.ToolProgress, names, names, fraction=st.floats(0, 1)),
    st.builds(protocol.ToolEnd, names, names, duration_s=st.none() | st.floats(0, 10)),
    st.builds(protocol.StallStart, names, names),
    st.builds(protocol.StallEnd, names, names),
    st.builds(protocol.SessionEnd, names),
    st.builds(protocol.AppEnd, names),
)


def check_books(registry: Registry, requests: set[str]) -> None:
    live = {request for call in registry.calls.values() for request in call.live_requests}
    assert live == requests
    assert sum(session.live_requests for session in registry.sessions.values()) == len(requests)
    for session in registry.sessions.values():
        assert all(registry.calls[call.id] is call for call in session.calls.values())
    for app in registry.apps.values():
        assert app.own_sessions <= set(registry.sessions)
    assert registry._stalled_calls == {
        call.id for call in registry.calls.values() if any(tool.is_open for tool in call.tools.values())
    }
    for call in registry.calls.values():
        assert registry.sessions[call.hint.session].calls[call.id] is call
    for tenant in (None, ""):
        newest_first = [call for _, call in registry.newest_calls(tenant) if call is not None]
        assert newest_first == list(registry.calls.values())[::-1]


@given(trace=st.lists(steps, max_size=60), pause_s=st.sampled_from([0.1, 40.0]))
def test_no_order_of_calls_and_events_breaks_the_books(trace: list[object], pause_s: float) -> None:
    registry = Registry(Limits(sessions=2, calls=3, tool_calls_per_call=2, waits_per_session=2, idle_s=100.0))
    requests: set[str] = set()
    for number, step in enumerate(trace):
        now = 100.0 + pause_s * number
        match step:
            case ("add", session, call):
                hint = Hint(session=session, call=call, app=session)
                if registry.add_call(f"{call}-{number}", hint, 10, now):  # else live calls take all the room
                    requests.add(f"{call}-{number}")
            case ("schedule", call):
                for request in sorted(requests):
                    if request.startswith(call):
                        registry.schedule_call(request, 1, 0, now)
            case ("preempt", call):
                registry.preempt_call(f"{call}-0")
            case ("finish", call, is_aborted):
                for request in [request for request in sorted(requests) if request.startswith(call)]:
                    requests.discard(request)
                    registry.finish_call(request, 1, is_aborted, now)
            case event:
                registry.apply(event, now)
        check_books(registry, requests)
    state_view(registry, 0.0)
    registry.drain()
