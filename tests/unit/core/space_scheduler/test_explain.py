"""The words of decisions, the inversions and the longest wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tokencake.policies.default_space import DefaultSpacePolicy
from tokencake.registry.registry import Registry
from tokencake.space_scheduler.applications import AppTracker, LiveRequest
from tokencake.space_scheduler.explain import DecisionExplainer
from tokencake.space_scheduler.policy import REFUSALS
from tokencake.space_scheduler.settings import SpaceSettings

MakeCall = Callable[..., LiveRequest]
EPOCH_S = 1_000.0


class Listener:
    """What is said of the calls of `applications`."""

    def __init__(self, applications: AppTracker) -> None:
        self.applications, self.registry = applications, Registry()
        self.explainer = DecisionExplainer(
            SpaceSettings(), DefaultSpacePolicy(SpaceSettings()), applications, self.registry
        )

    def step(
        self,
        now: float,
        waiting: list[LiveRequest] | None = None,
        started: list[LiveRequest] | None = None,
        ranks: dict[str, tuple[float, ...]] | None = None,
    ) -> None:
        for call in started or []:
            self.applications.start(call.request_id, now)
        names = [[call.request_id for call in calls or []] for calls in (waiting, started)]
        needs = {name: 10 + place for place, name in enumerate(names[0])}
        self.explainer.note_waiting(names[0], names[1], ranks or {}, needs, 7, now)

    def told(self, tenant: str | None = None, **asked: Any) -> list[tuple[str, str]]:
        page = self.explainer.view(
            EPOCH_S, 50.0, **{"call": None, "app": None, "limit": 100, "tenant": tenant, **asked}
        )
        return [(decision["app"], decision["words"]) for decision in page["decisions"]]

    def inversions(self, kind: str) -> int:
        return self.registry.counts["space_inversions", kind]


@pytest.fixture
def listener(applications: AppTracker) -> Listener:
    return Listener(applications)


def test_a_call_that_starts_says_how_long_it_has_waited(listener: Listener, call: MakeCall) -> None:
    one = call("a", now=1.0)
    listener.step(3.5, started=[one])

    assert listener.told() == [("a", "started after 2.50 s")]


def test_a_call_that_comes_back_has_not_waited_since_it_came(listener: Listener, call: MakeCall) -> None:
    one = call("a", now=1.0)
    listener.step(2.0, started=[one])
    listener.applications.stop(one.request_id)
    listener.step(30.0, started=[one])

    assert listener.told() == [("a", "started after 1.00 s")]
    assert listener.explainer.view(0.0, 30.0, call=None, app=None, limit=9)["longest_wait_s"] == 1.0


def test_the_first_in_line_says_what_it_needs_and_the_others_behind_whom_they_wait(
    listener: Listener, call: MakeCall
) -> None:
    calls = [call("a", now=1.0), call("b", now=2.0), call("c", now=3.0), call("d", now=4.0)]
    ranks = {
        calls[0].request_id: (0.0, 5.0, 0.0, 1.0),
        calls[1].request_id: (1.0, 2.0, 0.0, 2.0),
        calls[2].request_id: (1.0, 2.0, -9.0, 3.0),
        calls[3].request_id: (1.0, 2.0, -9.0, 4.0),
    }
    listener.step(5.0, waiting=calls, ranks=ranks)

    assert listener.told() == [
        ("a", "is at the head of the queue; needs up to 10 blocks, 7 are free"),
        ("b", "waits behind a (its tenant has had less service); needs up to 11 blocks"),
        ("c", "waits behind b (it has the longer remaining path); needs up to 12 blocks"),
        ("d", "waits behind c (it arrived first); needs up to 13 blocks"),
    ]


def test_a_call_that_is_not_ranked_yet_says_nothing_and_one_that_is_gone_is_left_out(
    listener: Listener, call: MakeCall
) -> None:
    first, second, third = call("a"), call("b", now=1.0), call("c", now=2.0)
    gone = call("gone", now=0.5)
    listener.applications.end(gone.request_id, 0, is_aborted=True, now=1.0)
    ranks = {first.request_id: (0.0, 1.0, 0.0, 1.0), third.request_id: (0.0, 2.0, 0.0, 3.0)}
    listener.step(5.0, waiting=[gone, first, second, third], ranks=ranks)
    assert [app for app, _ in listener.told()] == ["a"], "the second has no rank, so the third has none before it"

    ranks[second.request_id] = (0.0, 1.5, 0.0, 2.0)
    listener.step(6.0, waiting=[first, second, third], ranks=ranks)
    assert [words.partition(";")[0] for _, words in listener.told()[1:]] == [
        "waits behind a (its application is more senior)",
        "waits behind b (its application is more senior)",
    ]


def test_the_same_wait_is_told_once_and_another_one_again(listener: Listener, call: MakeCall) -> None:
    first, second = call("a"), call("b", now=1.0)
    ranks = {first.request_id: (0.0, 1.0, 0.0, 1.0), second.request_id: (0.0, 2.0, 0.0, 2.0)}
    for now in (5.0, 6.0):
        listener.step(now, waiting=[first, second], ranks=ranks)
    assert len(listener.told()) == 2

    listener.explainer.forget(second.request_id)
    listener.step(7.0, waiting=[first, second], ranks=ranks)
    assert [app for app, _ in listener.told()] == ["a", "b", "b"]


def test_a_bounded_number_of_waits_is_explained(listener: Listener, call: MakeCall) -> None:
    calls = [call(f"a{number}", now=float(number)) for number in range(20)]
    ranks = {one.request_id: (0.0, 0.0, 0.0, float(one.number)) for one in calls}
    listener.step(50.0, waiting=calls, ranks=ranks)

    assert [app for app, _ in listener.told()] == [f"a{number}" for number in range(16)]


def test_a_refusal_says_why_what_is_needed_and_what_is_free(listener: Listener, call: MakeCall) -> None:
    listener.explainer.note_skipped(call("a"), "delays", 30, 12, 2.0)

    assert listener.told() == [("a", f"skipped: {REFUSALS['delays']}; needs 30 blocks, 12 are free")]


def test_a_preempted_call_says_for_whom(listener: Listener, call: MakeCall) -> None:
    old, one = call("old"), call("a", now=1.0)
    for name in (one.request_id, "unknown"):
        listener.explainer.note_preempted(name, [], 2.0)
    one.preemptions, one.swapped_for = 1, old.app
    listener.explainer.note_preempted(one.request_id, [], 3.0)

    assert listener.told() == [
        ("a", "was preempted: calls ahead of it had to grow"),
        ("a", "was swapped out for old, a more senior application"),
    ]


def test_each_preemption_is_told(listener: Listener, call: MakeCall) -> None:
    one = call("a")
    for preemptions in (1, 1, 2):
        one.preemptions = preemptions
        listener.explainer.note_preempted(one.request_id, [], float(preemptions))

    assert len(listener.told()) == 2


def test_minor_calls_that_start_while_a_critical_one_waits_are_inversions(listener: Listener, call: MakeCall) -> None:
    critical, minor, other = call("a", critical=True), call("b"), call("c")
    listener.step(1.0, waiting=[critical], started=[minor, other])
    assert listener.inversions("admission") == 2

    listener.step(2.0, waiting=[call("d")], started=[call("e")])
    listener.step(3.0, waiting=[], started=[call("f")])
    listener.step(4.0, waiting=[critical], started=[])
    listener.step(5.0, waiting=[critical], started=[call("g", critical=True)])
    assert listener.inversions("admission") == 2


def test_a_critical_call_that_loses_its_memory_beside_a_minor_one_is_an_inversion(
    listener: Listener, call: MakeCall
) -> None:
    critical, other, minor = call("a", critical=True), call("b", critical=True), call("c")
    listener.explainer.note_preempted(critical.request_id, [other.request_id], 1.0)
    listener.explainer.note_preempted(minor.request_id, [minor.request_id], 1.0)
    listener.explainer.note_preempted(critical.request_id, [], 1.0)
    assert listener.inversions("preemption") == 0

    listener.explainer.note_preempted(critical.request_id, [other.request_id, minor.request_id], 1.0)
    assert listener.inversions("preemption") == 1
    listener.explainer.note_preempted(critical.request_id, ["gone"], 1.0)
    assert listener.inversions("preemption") == 2, "one without a record is not critical"


def test_the_longest_wait_is_of_those_that_wait_and_those_that_have_started(listener: Listener, call: MakeCall) -> None:
    one, two = call("t::a", now=1.0), call("u::b", now=4.0)

    def longest(now: float, tenant: str | None = None) -> float:
        view = listener.explainer.view(0.0, now, call=None, app=None, limit=9, tenant=tenant)
        return float(view["longest_wait_s"])

    assert (longest(10.0), longest(10.0, "t"), longest(10.0, "u")) == (9.0, 9.0, 6.0)
    assert listener.explainer.longest_wait_s(10.0) == 9.0
    listener.step(11.0, started=[one])
    assert (listener.explainer.longest_wait_s(12.0), longest(12.0)) == (8.0, 10.0)
    assert (longest(12.0, "t"), longest(12.0, "u")) == (10.0, 8.0)
    listener.step(12.0, started=[two])
    assert (longest(99.0), longest(99.0, "u"), longest(99.0, "nobody")) == (10.0, 8.0, 0.0)
    assert listener.explainer.longest_wait_s(99.0) == 0.0


def test_times_are_told_to_the_microsecond_of_the_epoch(listener: Listener, call: MakeCall) -> None:
    one = call("a", now=0.123_456_4)
    listener.step(1.234_567_8, started=[one])
    page = listener.explainer.view(EPOCH_S, 50.0, call=None, app=None, limit=9)

    assert page["decisions"][0]["at"] == 1_001.234_568
    assert page["order"] == [1_001.234_568]
    assert page["longest_wait_s"] == 1.111_111
    assert page["next"] is None


def test_decisions_are_told_by_call_app_and_tenant_and_in_pages(listener: Listener, call: MakeCall) -> None:
    calls = [call("t::a", now=1.0, call="t::c1", agent="writer"), call("u::b", now=2.0), call("t::c", now=3.0)]
    for now, one in enumerate(calls, start=4):
        listener.step(float(now), started=[one])
    assert [app for app, _ in listener.told(app="u::b")] == ["u::b"]
    assert [app for app, _ in listener.told(call="t::c1")] == ["t::a"]
    assert [app for app, _ in listener.told(tenant="t")] == ["t::a", "t::c"]

    page = listener.explainer.view(EPOCH_S, 50.0, call=None, app=None, limit=2)
    assert [decision["app"] for decision in page["decisions"]] == ["u::b", "t::c"]
    assert page["next"] == 1_005.0
    rest = listener.explainer.view(EPOCH_S, 50.0, call=None, app=None, limit=2, before=page["next"])
    assert [(d["app"], d["call"], d["agent"], d["kind"]) for d in rest["decisions"]] == [
        ("t::a", "t::c1", "writer", "started")
    ]
    assert rest["next"] is None


def test_decisions_of_one_moment_are_told_once_each_in_pages_of_one(listener: Listener, call: MakeCall) -> None:
    calls = [call(f"a{number}", now=1.0) for number in range(8)]
    listener.step(2.0, started=calls)
    found: list[str] = []
    before: float | None = None
    for _ in calls:
        page = listener.explainer.view(1.7e9, 50.0, call=None, app=None, limit=1, before=before)
        found += [decision["app"] for decision in page["decisions"]]
        before = page["next"]

    assert found == [f"a{number}" for number in range(7, -1, -1)]
    assert before is None


def test_a_call_of_unknown_need_waits_all_the_same(listener: Listener, call: MakeCall) -> None:
    listener.explainer.note_waiting([call("a").request_id], [], {}, {}, 7, 1.0)

    assert listener.told() == [("a", "is at the head of the queue; needs up to 0 blocks, 7 are free")]


def test_a_tenant_learns_nothing_of_anothers_application(listener: Listener, call: MakeCall) -> None:
    mine, theirs, own = call("t::a", now=1.0), call("u::b", now=0.0), call("t::c", now=0.5)
    ranks = {
        theirs.request_id: (0.0, 0.0, 0.0, 1.0),
        mine.request_id: (0.0, 1.0, 0.0, 2.0),
        own.request_id: (0.0, 2.0, 0.0, 3.0),
    }
    listener.step(5.0, waiting=[theirs, mine, own], ranks=ranks)
    mine.swapped_for = theirs.app
    listener.explainer.note_preempted(mine.request_id, [], 6.0)
    page = listener.explainer.view(0.0, 50.0, call=None, app=None, limit=9, tenant="t")

    assert [(decision["behind"], decision["words"]) for decision in page["decisions"]] == [
        (None, "waits behind an application of another tenant (its application is more senior); needs up to 11 blocks"),
        ("t::a", "waits behind ::a (its application is more senior); needs up to 12 blocks"),
        (None, "was swapped out for an application of another tenant, a more senior application"),
    ]
    everything = listener.explainer.view(0.0, 50.0, call=None, app=None, limit=9)["decisions"]
    assert [decision["behind"] for decision in everything] == [None, "u::b", "t::a", "u::b"]
