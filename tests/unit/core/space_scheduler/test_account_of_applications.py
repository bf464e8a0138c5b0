"""Calls, service, tenants and what is kept of applications."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tokencake.protocol import Graph, Hint
from tokencake.space_scheduler.applications import AppTracker, LiveRequest
from tokencake.space_scheduler.tenant_table import TenantTable

MakeCall = Callable[..., LiveRequest]


def test_calls_are_numbered_by_their_arrival(applications: AppTracker, call: MakeCall) -> None:
    assert [call("a").number, call(None).number, call("b").number] == [1, 2, 3]


def test_whatever_changes_a_call_changes_the_version(applications: AppTracker, call: MakeCall) -> None:
    one = call("a")
    versions = [applications.version]
    for change in (
        lambda: applications.start(one.request_id, 1.0),
        lambda: applications.stop(one.request_id),
        lambda: applications.start(one.request_id, 2.0),
        lambda: applications.end(one.request_id, 1, is_aborted=False, now=3.0),
    ):
        change()
        versions.append(applications.version)

    assert versions == sorted(set(versions)), "it grows each time"
    applications.start("unknown", 4.0)
    applications.stop("unknown")
    applications.end("unknown", 1, is_aborted=False, now=4.0)
    assert applications.version == versions[-1]


def test_a_call_starts_once_until_it_is_stopped(applications: AppTracker, call: MakeCall) -> None:
    one = call("a", now=1.0)
    one.first_skipped_s, one.swapped_for = 1.5, one.app
    applications.start(one.request_id, 2.0)
    assert (one.is_running, one.started_s, one.accounted_s) == (True, 2.0, 2.0)
    assert (one.first_skipped_s, one.swapped_for, one.preemptions) == (None, None, 0)

    version = applications.version
    applications.start(one.request_id, 3.0)
    assert (one.accounted_s, applications.version) == (2.0, version)
    applications.stop(one.request_id)
    assert (one.is_running, one.preemptions) == (False, 1)
    applications.start(one.request_id, 5.0)
    assert (one.started_s, one.accounted_s) == (2.0, 5.0), "what it has waited for is its first slot"


def test_service_is_share_times_time_since_it_was_charged_last(applications: AppTracker, call: MakeCall) -> None:
    one, waiting = call("a::x"), call("a::y")
    applications.start(one.request_id, 10.0)
    applications.account_service(one.request_id, 0.5, 14.0)
    applications.account_service(one.request_id, 0.25, 16.0)
    applications.account_service(waiting.request_id, 1.0, 16.0)
    applications.account_service("unknown", 1.0, 16.0)

    assert one.app.served_s == one.app.tenant.served_s == pytest.approx(0.5 * 4 + 0.25 * 2)
    assert (one.accounted_s, waiting.app.served_s) == (16.0, 0.0)


def test_the_live_calls_of_a_tenant_are_counted(applications: AppTracker, call: MakeCall) -> None:
    one, two = call("a::x"), call("a::y")
    assert one.app.tenant.live_calls == 2
    assert applications.tenants.active() == [one.app.tenant]
    applications.end(one.request_id, 1, is_aborted=True, now=1.0)
    assert one.app.tenant.live_calls == 1
    applications.end(two.request_id, 1, is_aborted=True, now=1.0)
    assert applications.tenants.active() == []


def test_an_aborted_call_and_one_that_never_started_teach_nothing(applications: AppTracker, call: MakeCall) -> None:
    for is_started, is_aborted in ((True, True), (False, False)):
        one = call("a", agent="writer")
        if is_started:
            applications.start(one.request_id, 0.0)
        applications.end(one.request_id, 9, is_aborted=is_aborted, now=50.0)
    tenant = one.app.tenant

    assert (tenant.graph_stats.call_s, tenant.token_s) == (5.0, 0.02)
    one = call("a", agent="writer")
    applications.start(one.request_id, 0.0)
    applications.end(one.request_id, 10, is_aborted=False, now=1.0)
    assert tenant.graph_stats.call_s == pytest.approx(5.0 - 0.2 * 4.0)
    assert tenant.token_s == pytest.approx(0.02 + 0.1 * (0.1 - 0.02))


def test_the_seconds_of_a_token_move_a_tenth_of_the_way_to_each_call() -> None:
    tenant = TenantTable({}.get).get("t")
    tenant.learn_call(4.0, 100)
    assert tenant.token_s == pytest.approx(0.02 + 0.1 * 0.02)
    tenant.learn_call(1.0, 0)
    assert tenant.token_s == pytest.approx(0.022 + 0.1 * (1.0 - 0.022)), "an answer of no token has one"


def test_a_tenant_that_returns_stands_where_the_least_served_of_the_others_stand() -> None:
    tenants = TenantTable({}.get)
    for name, served_s, live_calls in (("busy", 50.0, 1), ("busier", 80.0, 2), ("idle", 10.0, 0)):
        tenant = tenants.get(name)
        tenant.served_s, tenant.live_calls = served_s, live_calls

    assert tenants.arrive("new").served_s == 50.0
    assert tenants.arrive("idle").served_s == 50.0
    assert tenants.arrive("busier").served_s == 80.0
    tenants.get("idle").served_s = 70.0
    assert tenants.arrive("idle").served_s == 70.0, "what it has had stays"
    assert TenantTable({}.get).arrive("alone").served_s == 0.0


def test_the_longest_wait_of_a_tenant_is_known_while_it_is_remembered() -> None:
    tenants = TenantTable({}.get)
    tenants.get("t").longest_wait_s = 7.0

    assert (tenants.longest_wait_s("t"), tenants.longest_wait_s("unknown")) == (7.0, 0.0)


def test_a_tenant_is_forgotten_beyond_the_bound_and_without_a_live_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokencake.space_scheduler.tenant_table._MAX_KEPT", 2)
    tenants = TenantTable({}.get)
    first, second = tenants.get("first"), tenants.get("second")
    tenants.forget(first)
    assert tenants.get("first") is first, "two are not too many"

    third = tenants.get("third")
    second.live_calls = 1
    tenants.forget(second)
    assert tenants.get("second") is second
    tenants.forget(third)
    assert tenants.get("third") is not third


def test_an_application_is_remembered_for_an_hour_after_its_last_call(applications: AppTracker, call: MakeCall) -> None:
    first = call("a", now=0.0)
    applications.end(first.request_id, 1, is_aborted=True, now=10.0)
    assert call("b", now=3_610.0).app.id == "b"
    assert applications.known_apps == 2
    call("b", now=3_610.1)
    assert applications.known_apps == 1
    assert call("a", now=3_611.0).app.first_seen_s == 3_611.0


def test_each_call_has_a_bounded_number_of_idle_applications_forgotten(
    applications: AppTracker, call: MakeCall
) -> None:
    for number in range(10):
        one = call(f"a{number}", now=0.0)
        applications.end(one.request_id, 1, is_aborted=True, now=0.0)
    call("b", now=9_000.0)

    assert applications.known_apps == 10 - 4 + 1


def test_an_application_with_a_live_call_is_never_forgotten(applications: AppTracker, call: MakeCall) -> None:
    live = call("live", now=0.0)
    call("other", now=9_000.0)

    assert (applications.known_apps, live.app.touched_s) == (2, 9_000.0)
    assert call("live", now=9_001.0).app is live.app


def test_beyond_the_bound_the_oldest_application_of_the_tenant_with_most_goes(
    applications: AppTracker, call: MakeCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokencake.space_scheduler.applications._MAX_KEPT", 3)
    for name in ("a::1", "b::1", "b::2", "b::3"):
        one = call(name, now=1.0)
        applications.end(one.request_id, 1, is_aborted=True, now=1.0)
    assert applications.known_apps == 4, "one is live while it comes"

    call("b::4", now=2.0)
    assert applications.known_apps == 4
    assert call("a::1", now=3.0).app.first_seen_s == 1.0
    assert call("b::1", now=3.0).app.first_seen_s == 3.0


@pytest.mark.parametrize(
    ("fields", "limit", "tokens"),
    [
        ({}, 10_000, 512),
        ({}, 511, 511),
        ({"expected_output_tokens": 40}, 10_000, 40),
        ({"expected_output_tokens": 40}, 39, 39),
        ({"expected_output_tokens": 9_000}, 10_000, 9_000),
    ],
)
def test_an_answer_is_as_long_as_is_told_but_not_beyond_its_limit(
    call: MakeCall, fields: dict[str, int], limit: int, tokens: int
) -> None:
    assert call("a", max_tokens=limit, **fields).expected_tokens == tokens


def test_without_a_graph_the_way_is_what_the_hint_says_in_calls(applications: AppTracker, call: MakeCall) -> None:
    one, two, three = call("a", remaining=3), call("b"), call(None)

    assert (one.remaining_s, one.service_s) == (15.0, 15.0)
    assert (two.remaining_s, three.remaining_s, three.service_s) == (0.0, 0.0, 0.0)


LOOP = Graph("loop", {"a": {}, "b": {}, "c": {}}, (("a", "b"), ("b", "a"), ("b", "c")))


def test_of_the_rounds_of_a_loop_those_that_were_are_over() -> None:
    applications = AppTracker({"loop": LOOP}.get, answer_quantile=0.8)

    def run(app: str, node: str, took_s: float, now: float) -> LiveRequest:
        hint = Hint(session=app, app=app, graph="loop", node=node, agent="x")
        one = applications.add(f"{app}{node}{now}", hint, prompt_tokens=1, max_tokens=1, now=now)
        applications.start(one.request_id, now)
        applications.end(one.request_id, 1, is_aborted=False, now=now + took_s)
        return one

    for number in range(40):  # three rounds of 10 s, each with a gap of 2 s to its second half; then 4 s
        now = 1_000.0 * number
        for _ in range(3):
            run(f"app{number}", "a", 10.0, now)
            run(f"app{number}", "b", 1.0, now + 12.0)
            now += 13.0
        run(f"app{number}", "c", 4.0, now)

    path_costs = applications.tenants.get("").graph_stats.path_costs("loop")
    assert path_costs is not None
    assert path_costs.service_s["a"] == pytest.approx(3 * 11.0 + 4.0, rel=0.01)
    assert path_costs.remaining_s["a"] == pytest.approx(3 * 13.0 + 4.0, rel=0.05)
    first = run("new", "a", 10.0, 1e6)
    assert first.service_s == pytest.approx(37.0, rel=0.02)
    assert first.remaining_s == pytest.approx(43.0, rel=0.05)
    half = run("new", "b", 1.0, 1e6 + 12)
    assert half.service_s == pytest.approx(27.0, rel=0.02)
    second = run("new", "a", 10.0, 1e6 + 13)
    assert second.service_s == pytest.approx(26.0, rel=0.02)
    assert second.remaining_s == pytest.approx(30.0, rel=0.05)
    for number in range(9):
        last = run("new", "a", 10.0, 1e6 + 100 * number)
    assert last.service_s == pytest.approx(10.0, rel=0.02), "more rounds than usual: this call at least"
    assert last.remaining_s >= last.service_s


def test_a_call_of_a_sub_agent_has_the_way_of_its_caller_behind_its_own(call: MakeCall) -> None:
    chief = call("a", call="c", agent="chief", remaining=4)
    applications = chief.app
    assert applications.stalled.of_call("c") is None
    helper = call("a", call="h", agent="helper", parent_call="c", remaining=1)
    assert helper.remaining_s == 5.0, "its caller is not stalled"


def test_what_is_left_behind_the_tool_of_the_caller_counts_for_the_sub_agent() -> None:
    graphs = {
        "chief": Graph("chief", {"plan": {}, "end": {}}, (("plan", "end"),)),
        "helper": Graph("helper", {"work": {}}, ()),
    }
    applications = AppTracker(graphs.get, answer_quantile=0.8)
    hint = Hint(session="s", app="a", call="c", agent="chief", graph="chief", node="plan")
    applications.add("r1", hint, prompt_tokens=1, max_tokens=1, now=0.0)
    applications.start("r1", 0.0)
    applications.end("r1", 1, is_aborted=False, now=5.0)
    waiting = applications.calls.get("r1")
    assert waiting is None
    hint = Hint(session="h", app="a", call="h", agent="helper", graph="helper", node="work", parent_call="c")
    helper = applications.add("r2", hint, prompt_tokens=1, max_tokens=1, now=6.0)

    # The caller has one call left after its own of 5 s: 5 s.
    assert helper.service_s == pytest.approx(5.0 + 5.0)
    assert helper.remaining_s == pytest.approx(5.0 + 5.0)


def test_several_requests_of_one_call_are_one_visit_and_one_stall() -> None:
    applications = AppTracker({}.get, answer_quantile=0.8)
    hint = Hint(session="s", app="a", call="c", agent="x", join="j")
    calls = [applications.add(f"r{n}", hint, prompt_tokens=1, max_tokens=1, now=0.0) for n in range(2)]
    (app,) = {id(one.app): one.app for one in calls}.values()
    assert list(app.visits.values()) == [1]
    for number, one in enumerate(calls):
        applications.start(one.request_id, 0.0)
        applications.end(one.request_id, 1, is_aborted=False, now=1.0)
        assert (app.stalled.of_call("c") is not None) == (number == 1), "it is over with its last request"
    assert not app.answers


@pytest.mark.parametrize(
    ("fields", "gap_s", "until_s"),
    [
        ({}, 0.0, 10.0 + 60.0),
        ({}, 15.0, 10.0 + 60.0),
        ({}, 20.0, 10.0 + 80.0),
        ({"reuse": "final"}, 20.0, 10.0),
        ({"reuse": "final", "join": "j"}, 20.0, 10.0 + 80.0),
    ],
)
def test_a_branch_is_waited_for_four_of_its_usual_gaps_but_a_minute_at_least(
    fields: dict[str, str], gap_s: float, until_s: float
) -> None:
    applications = AppTracker({}.get, answer_quantile=0.8)
    hint = Hint(session="s", app="a", call="c", agent="x", graph="g", node="n", **fields)
    one = applications.add("r", hint, prompt_tokens=1, max_tokens=1, now=0.0)
    graph_stats = one.app.tenant.graph_stats
    graph_stats.learn_call(("g", "n"), 10.0, 1)
    graph_stats._memory.nodes.get(("g", "n")).gap_s = gap_s  # type: ignore[union-attr]
    applications.start("r", 0.0)
    applications.end("r", 1, is_aborted=False, now=10.0)
    branch = one.app.stalled.of_call("c")

    assert branch is not None
    assert branch.until_s == pytest.approx(until_s)
    assert branch.remaining_s == pytest.approx(gap_s), "nothing but its gap is known to come"
    assert branch.at_s == 10.0


def test_an_application_is_critical_once_a_call_of_it_was(call: MakeCall) -> None:
    one = call("a", critical=True)
    assert one.app.is_critical
    call("a", critical=False)
    assert one.app.is_critical
    assert not call("b", critical=False).app.is_critical
    assert not call("c").app.is_critical
    assert not call(None).app.is_critical
