"""Our scheduler beside the stock one: same decisions, and it knows who calls."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from tests.harness.scheduler import build_scheduler, make_request
from tests.harness.steps import run_all, run_step
from tokencake import protocol
from tokencake_vllm import scheduler as scheduler_module
from tokencake_vllm.plugin import call_scheduler, version_problem
from tokencake_vllm.scheduler import TokenCakeAsyncScheduler, TokenCakeScheduler


def hint(session: str, call: str | None = None, **fields: object) -> str:
    return protocol.Hint(session=session, call=call, agent="writer", **fields).to_json()


def test_the_factory_takes_the_class_that_fits() -> None:
    assert type(build_scheduler()) is TokenCakeScheduler
    assert type(build_scheduler(is_async=True)) is TokenCakeAsyncScheduler


@pytest.mark.parametrize(("wrong", "is_async"), [(TokenCakeScheduler, True), (TokenCakeAsyncScheduler, False)])
def test_a_class_that_does_not_fit_async_scheduling_is_refused(wrong: Any, is_async: bool) -> None:
    with pytest.raises(RuntimeError, match=r"--scheduler-cls tokencake_vllm\.scheduler\.create_scheduler"):
        build_scheduler(wrong, is_async=is_async)


@pytest.mark.parametrize(("stock", "is_async"), [(Scheduler, False), (AsyncScheduler, True)])
def test_every_step_is_that_of_stock_vllm(stock: Any, is_async: bool) -> None:
    """With both schedulers off: under pressure, with preemptions, prefix hits, hinted and plain requests."""
    traces = []
    for create in (stock, None):
        scheduler = build_scheduler(create, is_async=is_async, num_blocks=60, space={"enabled": False})
        for number in range(12):
            tokens = [number % 4] * 64 + [100 + number] * 60
            text = hint(f"s{number}", f"c{number}", critical=True) if number % 3 else None
            scheduler.add_request(make_request(f"r{number}", tokens, text, max_tokens=50))
        traces.append([list(tokens_of.items()) for tokens_of in run_all(scheduler)])
    assert traces[0] == traces[1]
    calls = scheduler.tokencake_state(None, None, 100)["calls"]
    assert sum(call["preemptions"] for call in calls) > 0
    assert sum(call["cached_tokens"]["device"] for call in calls) > 0


def test_an_engine_behind_the_rust_front_end_says_that_it_hears_no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(scheduler_module.logger, "warning", lambda text, *values: said.append(text % values))
    build_scheduler()
    assert said == []
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    build_scheduler()
    assert len(said) == 1
    assert "VLLM_USE_RUST_FRONTEND" in said[0]


def test_a_call_is_followed_from_arrival_to_finish() -> None:
    scheduler = build_scheduler()
    for number in range(2):
        scheduler.add_request(make_request(f"r{number}", list(range(100)), hint("s", f"c{number}")))
        run_all(scheduler)
    first, second = scheduler.tokencake_state(None, None, 10)["calls"]
    assert (first["agent"], first["status"]) == ("writer", "finished")
    assert (first["prompt_tokens"], first["output_tokens"]) == (100, 4)
    assert first["arrived"] <= first["scheduled"] <= first["finished"]
    assert (first["cached_tokens"]["device"], second["cached_tokens"]["device"]) == (0, 96)


def test_preemptions_are_counted() -> None:
    scheduler = build_scheduler(num_blocks=30)
    for number in range(4):
        scheduler.add_request(
            make_request(f"r{number}", [number] * 90, hint(f"s{number}", f"c{number}"), max_tokens=60)
        )
    run_all(scheduler)
    assert sum(call["preemptions"] for call in scheduler.tokencake_state(None, None, 10)["calls"]) > 0


def test_a_call_aborted_before_its_first_slot_is_aborted() -> None:
    scheduler = build_scheduler()
    scheduler.add_request(make_request("r", list(range(100)), hint("s", "c")))
    scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    (call,) = scheduler.tokencake_state(None, None, 10)["calls"]
    assert (call["status"], call["queue_s"]) == ("aborted", None)


def test_an_aborted_call_is_aborted() -> None:
    scheduler = build_scheduler()
    scheduler.add_request(make_request("r", list(range(100)), hint("s", "c"), max_tokens=50))
    run_step(scheduler)
    scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    (call,) = scheduler.tokencake_state(None, None, 10)["calls"]
    assert call["status"] == "aborted"
    assert scheduler.tokencake_metrics()["gauges"]["live_calls"] == 0


@pytest.mark.parametrize("text", ["{", 7, ["a"], '{"session": 1}', "x" * 2**20])
def test_a_void_hint_is_counted_and_the_request_runs(text: object) -> None:
    scheduler = build_scheduler()
    scheduler.add_request(make_request("r", list(range(100)), text))
    run_all(scheduler)
    assert scheduler.registry.counts["hints", "void"] == 1
    assert scheduler.tokencake_state(None, None, 10)["calls"] == []


def test_a_defect_of_the_plug_in_never_reaches_a_request() -> None:
    scheduler = build_scheduler()
    for method in ("add_call", "schedule_call", "preempt_call", "finish_call"):
        setattr(scheduler.registry, method, None)  # calling it raises
    request = make_request("r", list(range(100)), hint("s", "c"))
    scheduler.add_request(request)
    run_all(scheduler)
    assert request.num_output_tokens == 4
    assert scheduler.registry.counts["errors",] == 3


def test_events_count_from_the_moment_they_reached_the_server() -> None:
    import time

    scheduler = build_scheduler()
    scheduler.add_request(make_request("r", list(range(100)), hint("s", "c")))
    run_all(scheduler)
    event = protocol.to_wire(protocol.ToolStart("c", "t", "search", ago_s=1.0))
    received = time.time() - 2.0
    answer = scheduler.tokencake_events([event], received)
    assert answer == {"outcomes": ["applied"], "need": []}
    (tool,) = scheduler.tokencake_state(None, None, 10)["calls"][0]["tools"]
    assert tool["start"] == pytest.approx(received - 1.0, abs=0.2)


def test_the_state_goes_through_json() -> None:
    scheduler = build_scheduler()
    scheduler.add_request(make_request("r", list(range(100)), hint("s", "c", app="a", expects_tools={"x": None})))
    run_all(scheduler)
    state = scheduler.tokencake_state(None, None, 10)
    assert json.loads(json.dumps(state)) == state


def test_an_engine_with_another_scheduler_answers_none() -> None:
    class Core:
        scheduler = build_scheduler(Scheduler)

    assert call_scheduler(Core(), "tokencake_metrics", []) is None


def test_the_rpc_reaches_no_other_method() -> None:
    class Core:
        scheduler = build_scheduler()

    assert call_scheduler(Core(), "shutdown", []) is None
    assert "gauges" in call_scheduler(Core(), "tokencake_metrics", [])


@pytest.mark.parametrize("version", [(0, 31), (0, 32, 1), (0, 33, 9)])
def test_the_versions_it_was_written_for_are_taken(version: tuple[object, ...]) -> None:
    assert version_problem(version) is None


@pytest.mark.parametrize("version", [(0, 30, 9), (0, 34), (1, 0), (0, 0, "dev")])
def test_other_versions_are_refused_with_the_range(version: tuple[object, ...]) -> None:
    assert "0.31 to 0.33" in (version_problem(version) or "")


def test_a_vllm_out_of_range_starts_without_the_plug_in_unless_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import vllm

    from tokencake_vllm import plugin

    monkeypatch.setattr(vllm, "__version_tuple__", (0, 99))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    plugin.register()
    monkeypatch.setenv("VLLM_PLUGINS", "tokencake,tokencake_http")
    with pytest.raises(RuntimeError, match="not supported by TokenCake"):
        plugin.register()
