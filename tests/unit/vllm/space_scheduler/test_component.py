"""The Space Scheduler on the real vLLM scheduler: stock when off, order, victims, gate, liveness."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from tests.harness.scheduler import build_scheduler, make_request
from tests.harness.steps import hint, run_all, run_step
from tests.harness.tenancy import marked
from tokencake import protocol
from tokencake_vllm.space_scheduler.admission_gate import ADMISSIBLE
from tokencake_vllm.space_scheduler.ranked_queue import RankedQueue


def first_runs(trace: list[dict[str, int]]) -> list[str]:
    return list(dict.fromkeys(name for tokens in trace for name in tokens))


ON = {"enabled": True}


@pytest.mark.parametrize(("stock", "is_async"), [(Scheduler, False), (AsyncScheduler, True)])
def test_switched_off_every_step_is_that_of_stock_vllm(stock: Any, is_async: bool) -> None:
    traces = []
    for create in (stock, None):
        scheduler = build_scheduler(create, is_async=is_async, num_blocks=60, space={"enabled": False})
        for number in range(12):
            text = hint(f"app{number % 5}", critical=True, remaining=number) if number % 3 else None
            tokens = [number % 4] * 64 + [100 + number] * 60
            scheduler.add_request(make_request(f"r{number}", tokens, text, max_tokens=50))
        traces.append(run_all(scheduler))
    assert traces[0] == traces[1]


@pytest.mark.parametrize(("stock", "is_async"), [(Scheduler, False), (AsyncScheduler, True)])
def test_where_no_call_has_a_hint_every_step_is_that_of_stock_vllm(stock: Any, is_async: bool) -> None:
    """Short and long prompts, shared ones too, with preemptions: the defaults leave the order alone."""
    traces = []
    for create in (stock, None):
        scheduler = build_scheduler(create, is_async=is_async, num_blocks=60)
        for number in range(14):
            tokens = [number % 3] * 64 + [100 + number] * (10 + 37 * (number * 5 % 7))
            scheduler.add_request(make_request(f"r{number}", tokens, None, max_tokens=20 + number * 5 % 50))
        requests = list(scheduler.requests.values())
        traces.append([list(tokens_of.items()) for tokens_of in run_all(scheduler)])
    assert traces[0] == traces[1]
    assert any(request.num_preemptions for request in requests)


def test_the_older_application_and_in_it_the_longer_way_goes_first() -> None:
    scheduler = build_scheduler(space={**ON, "short_s": 0.0}, num_blocks=12)
    arrivals = [("a1", "a", 1), ("b1", "b", 9), ("a2", "a", 5), ("a3", "a", 7)]
    for number, (name, app, remaining) in enumerate(arrivals):
        scheduler.add_request(make_request(name, [number] * 120, hint(app, remaining=remaining)))

    assert first_runs(run_all(scheduler)) == ["a3", "a2", "a1", "b1"]


def test_calls_without_hints_run_in_the_order_of_their_arrival() -> None:
    scheduler = build_scheduler(space=ON, num_blocks=12)
    names = [f"r{number}" for number in range(6)]
    for number, name in enumerate(names):
        scheduler.add_request(make_request(name, [number] * 120))

    assert first_runs(run_all(scheduler)) == names


def test_the_victim_is_of_the_youngest_application_whoever_came_last() -> None:
    scheduler = build_scheduler(space={**ON, "short_s": 0.0}, num_blocks=14)
    scheduler.add_request(make_request("old1", [1] * 15, hint("old"), max_tokens=2))
    run_step(scheduler)
    for number, (name, app) in enumerate([("young", "young"), ("old2", "old")]):
        scheduler.add_request(make_request(name, [5 + number] * 90, hint(app), max_tokens=80))
    preempted = []
    while scheduler.has_unfinished_requests():
        preempted += sorted(run_step(scheduler).preempted_req_ids or ())

    assert preempted
    assert set(preempted) == {"young"}


def test_what_is_peeked_is_what_is_popped_however_ranks_change() -> None:
    queue = RankedQueue()
    requests = {name: make_request(name, [1]) for name in "abcd"}
    ranks = {"a": (3.0,), "b": (1.0,), "c": (2.0,)}
    for name in "abc":
        queue.add_request(requests[name])
    queue.sort(lambda request: ranks[request.request_id])
    ranks["c"] = (0.0,)
    queue.add_request(requests["d"])

    assert queue.peek_request() is requests["b"]
    assert queue.pop_request() is requests["b"]
    queue.prepend_requests([queue.pop_request(), requests["b"]])
    assert [request.request_id for request in queue] == ["b", "c", "a", "d"]
    queue.remove_requests([requests["c"], make_request("never here", [1])])
    queue.remove_request(requests["a"])
    assert (len(queue), bool(queue)) == (2, True)


def test_requests_of_one_call_run_each_on_its_own() -> None:
    """`n` > 1 is several requests with one hint."""
    scheduler = build_scheduler(space=ON, num_blocks=40)
    requests = [make_request(f"{n}_r", [1] * 60, hint("a", call="c"), max_tokens=20) for n in range(4)]
    for request in requests:
        scheduler.add_request(request)
    run_all(scheduler)

    assert [request.num_output_tokens for request in requests] == [20] * 4
    assert scheduler.admission.applications.calls == {}


@pytest.mark.parametrize("is_async", [False, True])
def test_an_abort_leaves_nothing_behind(is_async: bool) -> None:
    scheduler = build_scheduler(space=ON, num_blocks=20, is_async=is_async)
    for number in range(6):
        scheduler.add_request(make_request(f"r{number}", [number] * 90, hint(f"a{number}"), max_tokens=50))
    run_step(scheduler)
    scheduler.finish_requests([f"r{number}" for number in range(6)], RequestStatus.FINISHED_ABORTED)

    assert scheduler.admission.applications.calls == {}
    assert not scheduler.has_unfinished_requests()
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 19


def test_the_prefix_cache_can_be_reset_while_calls_run() -> None:
    scheduler = build_scheduler(space=ON, num_blocks=40)
    for number in range(4):
        scheduler.add_request(make_request(f"r{number}", [number] * 90, hint("a"), max_tokens=20))
    run_step(scheduler)
    assert scheduler.reset_prefix_cache(reset_running_requests=True)

    assert first_runs(run_all(scheduler)) == [f"r{number}" for number in range(4)]


def test_a_user_of_vllms_own_priorities_gets_them() -> None:
    scheduler = build_scheduler(space=ON, num_blocks=12, policy="priority")
    for number in range(3):
        request = make_request(f"r{number}", [number] * 120, hint(f"a{number}"))
        request.priority = -number
        scheduler.add_request(request)

    assert first_runs(run_all(scheduler)) == ["r2", "r1", "r0"]


def test_a_defect_of_the_space_scheduler_never_reaches_a_request() -> None:
    scheduler = build_scheduler(space=ON, num_blocks=40)
    scheduler.admission.policy.rank = None  # calling it raises
    request = make_request("r", list(range(100)), hint("a"))
    scheduler.add_request(request)
    run_all(scheduler)

    assert request.num_output_tokens == 4
    assert scheduler.registry.counts["errors",] > 0


def test_the_log_says_why_a_call_waits() -> None:
    scheduler = build_scheduler(space={**ON, "short_s": 0.0}, num_blocks=12)
    for number, app in enumerate(["old", "young", "younger"]):
        scheduler.add_request(make_request(f"r{number}", [number] * 120, hint(app, agent="writer"), max_tokens=30))
    run_step(scheduler)
    answer = scheduler.tokencake_decisions(None, None, 100)
    words = {(entry["app"], entry["kind"]): entry["words"] for entry in answer["decisions"]}

    assert words["old", "started"].startswith("started after ")
    assert words["young", "waits"] == "is at the head of the queue; needs up to 8 blocks, 3 are free"
    assert words["younger", "waits"].startswith("waits behind young (its application is more senior)")
    assert answer["longest_wait_s"] >= 0
    assert json.loads(json.dumps(answer)) == answer
    run_all(scheduler)
    assert scheduler.tokencake_decisions(None, "young", 1)["decisions"][0]["kind"] == "started"


ABSURD = st.fixed_dictionaries(
    {},
    optional={
        "critical": st.booleans(),
        "importance": st.sampled_from([0.0, 5.0, 10.0]),
        "remaining": st.sampled_from([0, 1, 1_000_000]),
        "depth": st.sampled_from([0, 1_000_000]),
        "max_depth": st.sampled_from([0, 3]),
        "app_started_ago_s": st.sampled_from([0.0, 2_000_000.0]),
        "expected_output_tokens": st.sampled_from([0, 1, 1_000_000]),
        "fan_out": st.sampled_from([0, 1_000_000]),
        "graph": st.just("nobody knows it"),
        "node": st.just("n"),
        "agent": st.sampled_from(["a", "b", "c"]),
    },
)
ARRIVAL = st.tuples(
    st.integers(0, 30),  # in which step
    st.sampled_from(["a", "b", "t1::c", "t2::d", None]),  # of which application
    ABSURD,
    st.integers(1, 200),  # tokens of the prompt
    st.integers(1, 60),  # of the answer
    st.booleans(),  # aborted some steps later
)


@pytest.mark.parametrize("policy", ["ours", "paper"])
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("guarded", [0, 1])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrivals=st.lists(ARRIVAL, min_size=1, max_size=14))
def test_every_call_ends_and_nothing_admissible_waits_while_nothing_runs(
    policy: str, is_async: bool, guarded: int, arrivals: Any
) -> None:
    space = {**ON, "policy": policy, "guarded": guarded}
    scheduler = build_scheduler(is_async=is_async, num_blocks=24, space=space)
    requests = {}
    for number, (_, app, fields, tokens, answer, _) in enumerate(arrivals):
        text = None if app is None else hint(app, call=f"c{number}", **fields)
        requests[number] = make_request(f"r{number}", [number % 3] * tokens, text, max_tokens=answer)
    for now in range(3_000):
        for number, (at, *_, is_aborted) in enumerate(arrivals):
            if at == now:
                scheduler.add_request(requests[number])
            if is_aborted and now == at + 7:
                scheduler.finish_requests(f"r{number}", RequestStatus.FINISHED_ABORTED)
        if not scheduler.has_unfinished_requests() and now > 40:
            break
        waits = any(request.status in ADMISSIBLE for request in scheduler.waiting)
        tokens = run_step(scheduler).total_num_scheduled_tokens
        assert tokens or not waits or scheduler.running
    assert not scheduler.has_unfinished_requests()
    assert all(r.num_output_tokens == r.max_tokens for n, r in requests.items() if not arrivals[n][-1])
    assert scheduler.registry.counts["errors",] == 0
    assert scheduler.admission.applications.calls == {}


def test_a_tenant_that_lies_gains_nothing_over_one_that_tells_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both want the same work, all of it at once; the liar claims age, weight, and that all is critical and short."""
    now = [1_000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    scheduler = build_scheduler(space={**ON, "tenant_quantum_s": 0.2, "tenant_mark": "::"}, num_blocks=24)
    requests = {}
    for number in range(20):
        liar, honest = f"liar{number}", f"honest{number}"
        lies = {"critical": True, "importance": 10.0, "remaining": 0, "app_started_ago_s": 1e6, "depth": 99}
        evil = marked(protocol.Hint(session=f"s{number}", app=f"evil{number}", **lies), "evil")
        requests[liar] = make_request(liar, [number] * 100, evil, max_tokens=20)
        truth = {"critical": False, "remaining": 3}
        good = marked(protocol.Hint(session=f"s{number}", app=f"good{number}", **truth), "good")
        requests[honest] = make_request(honest, [50 + number] * 100, good, max_tokens=20)
        scheduler.add_request(requests[liar])
        scheduler.add_request(requests[honest])
    ended: dict[str, int] = {}
    for count in range(2_000):
        now[0] += 0.1
        run_step(scheduler)
        ended |= {name: count for name, request in requests.items() if request.is_finished() and name not in ended}
        if len(ended) == len(requests):
            break
    means = {side: sum(ended[f"{side}{n}"] for n in range(20)) / 20 for side in ("liar", "honest")}

    assert means["liar"] == pytest.approx(means["honest"], rel=0.1)
