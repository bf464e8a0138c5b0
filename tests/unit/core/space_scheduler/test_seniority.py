"""Who goes before whom, and what cannot be gained by claims."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokencake.policies.default_space import DefaultSpacePolicy
from tokencake.policies.registry import ADMISSION
from tokencake.protocol import Graph, Hint
from tokencake.space_scheduler.applications import AppTracker
from tokencake.space_scheduler.growth import GrowthReservation
from tokencake.space_scheduler.policy import AdmissionState
from tokencake.space_scheduler.settings import SpaceSettings

SETTINGS = SpaceSettings()


def order(applications, *, settings=SETTINGS, needs=None, siblings=()):
    """Ids of the applications of all calls, first in line first."""
    policy = ADMISSION[settings.policy](settings)
    policy.begin(applications, AdmissionState(1_000, 500), now=1_000.0)
    calls = sorted(
        applications.calls.values(),
        key=lambda call: policy.rank(
            call, need_blocks=(needs or {}).get(call.app.id, 200), shares_prefix=call.app.id in siblings
        ),
    )
    return [call.app.id for call in calls]


def served(applications, call, device_s):
    applications.start(call.request_id, 0.0)
    applications.account_service(call.request_id, device_s, 1.0)
    applications.stop(call.request_id)


def test_the_older_application_goes_first_whatever_its_client_says_of_its_age(applications, call):
    call("first", now=1.0)
    call("second", now=2.0, app_started_ago_s=9_000.0)
    call("first", now=3.0)

    assert order(applications) == ["first", "first", "second"]


def test_inside_an_application_the_longest_way_goes_first(applications, call):
    short, long = call("app", remaining=2), call("app", remaining=9)
    policy = DefaultSpacePolicy(SETTINGS)
    policy.begin(applications, AdmissionState(1_000, 500), now=0.0)

    ranks = {c.request_id: policy.rank(c, need_blocks=10, shares_prefix=False) for c in (short, long)}

    assert ranks[long.request_id] < ranks[short.request_id]


def test_a_short_application_passes_long_ones_that_began_less_than_a_head_start_before_it(applications, call):
    served(applications, call("ancient", now=0.0), 50.0)
    served(applications, call("recent", now=200.0), 50.0)
    call("chat", now=400.0)

    assert order(applications, needs={"chat": 5}) == ["ancient", "chat", "recent"]


def test_who_claims_to_be_short_is_short_until_it_has_had_its_service(applications, call):
    liar = call("liar", now=10.0, remaining=0)
    assert order(applications, needs={"liar": 5}) == ["liar"]
    served(applications, liar, 2.0)
    served(applications, call("honest", now=0.0, remaining=30), 2.0)

    assert order(applications, needs={"liar": 5}) == ["honest", "liar"]


def test_an_application_that_never_ends_loses_its_seniority_by_its_service(applications, call):
    endless = call("endless", now=0.0)
    served(applications, endless, SETTINGS.long_s)
    served(applications, call("new", now=299.0), 5.0)

    assert order(applications) == ["new", "endless"]


def test_a_call_that_shares_its_prompt_with_running_ones_goes_first_within_bounds(applications, call):
    call("old", now=0.0)
    call("sibling", now=299.0)
    call("late", now=301.0)

    assert order(applications, siblings={"sibling", "late"}) == ["sibling", "old", "late"]


def test_importance_counts_against_the_tenants_own_mean(applications, call):
    call("a::one", now=5.0, importance=10.0)
    call("a::two", now=0.0, importance=0.0)
    call("b::one", now=1.0)

    assert order(applications) == ["a::one", "b::one", "a::two"]


def test_a_tenant_for_whom_everything_is_important_gains_nothing(applications, call):
    call("a::one", now=5.0, importance=10.0, critical=True, depth=99, remaining=999_999)
    call("a::two", now=6.0, importance=10.0, critical=True, depth=99, remaining=999_999)
    call("b::one", now=4.0, importance=0.0)

    assert order(applications) == ["b::one", "a::one", "a::two"]


def test_a_tenant_far_ahead_in_service_waits_for_the_other(applications, call):
    served(applications, call("a::old", now=0.0), SETTINGS.tenant_quantum_s)
    call("b::new", now=50.0)

    assert order(applications) == ["b::new", "a::old"]


def test_idle_time_is_no_credit(applications, call):
    busy = call("a::app", now=0.0)
    served(applications, busy, 100.0)
    back = call("b::app", now=1.0)

    assert back.app.tenant.served_s == 100.0


def test_calls_without_a_hint_keep_their_place_among_themselves(applications, call):
    calls = [call(None, now=float(number)) for number in range(5)]

    assert order(applications) == [one.app.id for one in calls]


@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 1e4)), min_size=1, max_size=20), st.floats(0, 10))
def test_who_waits_is_passed_only_by_applications_seen_before_a_fixed_moment(apps, importance):
    """The bound of docs/space-scheduler.md."""
    applications = AppTracker({}.get, answer_quantile=0.8)
    for number, (seen_s, had_s) in enumerate(apps):
        hint = Hint(session=f"s{number}", app=f"app{number}", importance=importance if number else None)
        one = applications.add(f"r{number}", hint, prompt_tokens=1, max_tokens=1, now=seen_s)
        if number:
            one.app.served_s = had_s
    policy = DefaultSpacePolicy(SETTINGS)
    policy.begin(applications, AdmissionState(1_000, 500), now=2e4)
    ranks = {
        c.app.id: policy.rank(c, need_blocks=500, shares_prefix=c.app.id != "app0") for c in applications.calls.values()
    }

    bound_s = apps[0][0] + SETTINGS.head_start_s + SETTINGS.sibling_s + 10 * SETTINGS.importance_s
    for number, (seen_s, _) in enumerate(apps):
        assert not (ranks[f"app{number}"] < ranks["app0"] and seen_s > bound_s)


def test_the_first_in_line_is_admitted_if_it_fits_now(applications, call):
    policy = DefaultSpacePolicy(SpaceSettings())
    policy.begin(applications, AdmissionState(100, 50), now=0.0)
    one = call("app", max_tokens=160)

    assert policy.refusal(one, 30, AdmissionState(100, 30)) is None
    assert policy.refusal(one, 31, AdmissionState(100, 30)) == "full"
    assert policy.refusal(one, 30, AdmissionState(100, 30, reservations=(GrowthReservation(16, 1, 0),))) == "full"


def test_who_passes_must_fit_when_grown(applications, call):
    policy = DefaultSpacePolicy(SpaceSettings())
    policy.begin(applications, AdmissionState(100, 50), now=0.0)
    one = call("app", max_tokens=160)
    state = AdmissionState(100, 30, bypassed=(31,), reservations=(GrowthReservation(160, 0, 60),))

    assert policy.refusal(one, 10, state) is None
    assert policy.refusal(one, 11, state) == "promised"


def test_who_passes_does_not_delay_the_first_in_line(applications, call):
    policy = DefaultSpacePolicy(SpaceSettings())
    policy.begin(applications, AdmissionState(100, 50), now=0.0)
    ends_soon, ends_late = call("app", max_tokens=16), call("app", max_tokens=320)
    state = AdmissionState(100, 45, bypassed=(95,), reservations=(GrowthReservation(32, 0, 52),))

    assert policy.refusal(ends_soon, 10, state) is None
    assert policy.refusal(ends_late, 10, state) == "delays"


def test_a_call_that_has_been_passed_for_too_long_is_not_passed_any_more(applications, call):
    policy = DefaultSpacePolicy(SpaceSettings())
    policy.begin(applications, AdmissionState(100, 50), now=0.0)

    assert policy.refusal(call("app"), 1, AdmissionState(100, 50, bypassed=(60,), bypass_expired=True)) == "closed"


def test_calls_that_nobody_waits_for_do_not_pass_one_that_somebody_waits_for(applications, call):
    policy = DefaultSpacePolicy(SpaceSettings())
    policy.begin(applications, AdmissionState(100, 50), now=0.0)
    state = AdmissionState(
        100, 45, bypassed=(95,), reservations=(GrowthReservation(32, 0, 52),), has_bypassed_critical=True
    )

    assert policy.refusal(call("background", max_tokens=1), 1, state) == "critical"
    assert policy.refusal(call("urgent", max_tokens=1, critical=True), 1, state) is None


def test_a_long_application_does_not_begin_past_others(applications, call):
    policy = DefaultSpacePolicy(SpaceSettings(short_s=0.1))
    policy.begin(applications, AdmissionState(100, 50), now=0.0)
    new, short, begun = call("new"), call("short", max_tokens=1), call("begun")
    begun.app.served_s = 1.0
    state = AdmissionState(100, 45, bypassed=(95,), reservations=(GrowthReservation(320, 0, 52),))

    assert policy.refusal(new, 10, state) == "begun"
    assert policy.refusal(new, 10, AdmissionState(100, 45)) is None, "the first in line may"
    assert policy.refusal(short, 1, state) is None
    assert policy.refusal(begun, 10, state) is None
    assert policy.refusal(call(None), 10, state) is None


def test_nobody_passes_where_that_is_switched_off(applications, call):
    policy = DefaultSpacePolicy(SpaceSettings(guarded=0))
    policy.begin(applications, AdmissionState(100, 50), now=0.0)

    assert policy.refusal(call("app"), 51, AdmissionState(100, 50)) is None  # vLLM finds no room and waits for it


def test_an_answer_of_which_nothing_is_known_is_not_taken_to_be_as_long_as_it_may(call):
    assert call("app", max_tokens=100_000).expected_tokens == 512


def test_answers_teach_the_length_and_outweigh_the_claim(applications):
    hint = Hint(session="s", app="a", agent="writer", expected_output_tokens=5)
    for number in range(4):
        one = applications.add(f"r{number}", hint, prompt_tokens=1, max_tokens=500, now=0.0)
        assert one.expected_tokens == 5
        applications.start(one.request_id, 0.0)
        applications.end(one.request_id, 300, is_aborted=False, now=2.0)

    assert applications.add("r", hint, prompt_tokens=1, max_tokens=500, now=0.0).expected_tokens == 300
    assert applications.add("q", hint, prompt_tokens=1, max_tokens=100, now=0.0).expected_tokens == 100


def test_the_way_to_the_end_is_weighed_with_what_nodes_have_taken():
    graph = Graph("g", {"a": {}, "b": {}, "c": {}}, (("a", "b"), ("a", "c")))
    applications = AppTracker({"g": graph}.get, answer_quantile=0.8)

    def add(name, node, now):
        hint = Hint(session="s", app="app", graph="g", node=node)
        return applications.add(name, hint, prompt_tokens=1, max_tokens=9, now=now)

    for number in range(64):
        for node, took_s in (("b", 30.0), ("c", 1.0)):
            one = add(f"{node}{number}", node, 0.0)
            applications.start(one.request_id, 0.0)
            applications.end(one.request_id, 9, is_aborted=False, now=took_s)

    assert add("x", "b", 0.0).remaining_s == pytest.approx(30.0 * 64, rel=0.5)
    assert add("y", "b", 0.0).remaining_s > 10 * add("z", "c", 0.0).remaining_s


def test_everything_is_forgotten_in_the_end(applications, call):
    for number in range(50):
        one = call(f"app{number}", now=float(number))
        applications.end(one.request_id, 1, is_aborted=True, now=float(number))
    call("late", now=1e6)
    for number in range(60):
        call("late", now=1e6 + number)

    assert applications.known_apps == 1
