"""The routes that show what the engine knows: pages, their bounds, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

import httpx
from fastapi import FastAPI

from tests.harness.scheduler import build_scheduler, make_request
from tests.harness.steps import StepLoop, hint
from tokencake import protocol
from tokencake.registry import state_view
from tokencake.registry.timeline import MAX_VISITED, MAX_WEIGHT
from tokencake.time_scheduler.host_tier import leading
from tokencake_vllm.api.routes import MAX_PAGE, STEPS_PATH, TokenCakeEndpoints
from tokencake_vllm.step_log import Step

PATHS = {"calls": protocol.STATE_PATH, "decisions": protocol.DECISIONS_PATH, "steps": STEPS_PATH}


class Server:
    """vLLM's API server before one or several engines, as far as our routes are concerned."""

    def __init__(self, *schedulers: Any) -> None:
        self._app = FastAPI()
        TokenCakeEndpoints().attach_router(self._app)
        self._app.state.tokencake_secret = None

        async def ask(method: str, *args: Any) -> list[Any]:
            return [getattr(scheduler, method)(*args) for scheduler in schedulers]

        self._app.state.tokencake = ask

    def get(self, path: str, **query: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
                return await client.get(path, params=query)

        return asyncio.run(ask())

    def pages(self, name: str, **query: Any) -> list[list[Any]]:
        """All pages, the newest first."""
        found: list[list[Any]] = []
        while True:
            page = self.get(PATHS[name], **query).json()
            assert "order" not in page
            found.append(page[name])
            if page["next"] is None:
                return found
            query["before"] = page["next"]


def calls(scheduler: Any, names: list[str], tools: int = 0, **fields: Any) -> None:
    for name in names:
        scheduler.registry.add_call(
            name, protocol.Hint(session=f"s-{name}", call=name, app=f"a-{name}", **fields), 10, 5.0
        )
        scheduler.registry.finish_call(name, 1, is_aborted=False, now=5.0)
        for tool in range(tools):
            scheduler.registry.apply(protocol.ToolStart(name, f"t{tool}", "t"), 6.0)


@pytest.fixture
def scheduler() -> Any:
    return build_scheduler()


def names(page: list[Any]) -> list[str]:
    return [call["call"] for call in page]


def test_pages_have_each_call_once_the_newest_last_though_all_came_at_one_moment(scheduler: Any) -> None:
    calls(scheduler, [f"c{number}" for number in range(25)])
    pages = Server(scheduler).pages("calls", limit=10)
    assert [len(page) for page in pages] == [10, 10, 5]
    assert [name for page in reversed(pages) for name in names(page)] == [f"c{number}" for number in range(25)]


def test_pages_of_several_engines_are_one_order_without_gaps() -> None:
    engines = [build_scheduler() for _ in range(3)]
    for number in range(60):
        at_s = 5.0 + number
        engine = engines[(number * 7 % 11) % 3]
        engine.registry.add_call(f"c{number}", protocol.Hint(session="shared", call=f"c{number}"), 10, at_s)
    for engine in engines[1:]:
        engine._epoch_offset_s = engines[0]._epoch_offset_s
    pages = Server(*engines).pages("calls", limit=7)
    assert all(len(page) <= 7 for page in pages)
    assert [name for page in reversed(pages) for name in names(page)] == [f"c{number}" for number in range(60)]


def test_calls_of_one_session_or_application_are_found_behind_thousands_of_others(scheduler: Any) -> None:
    calls(scheduler, ["old"])
    calls(scheduler, [f"c{number}" for number in range(4_000)])
    server = Server(scheduler)
    assert names(server.get(protocol.STATE_PATH, session="s-old").json()["calls"]) == ["old"]
    assert [name for page in server.pages("calls", app="a-old") for name in names(page)] == ["old"]
    assert server.get(protocol.STATE_PATH, session="s-none").json()["calls"] == []


@pytest.mark.parametrize(("tools", "query"), [(0, {}), (100, {}), (0, {"app": "a-none"}), (0, {"session": "s-c1"})])
def test_one_answer_costs_a_bounded_number_of_records(
    scheduler: Any, monkeypatch: pytest.MonkeyPatch, tools: int, query: dict[str, Any]
) -> None:
    calls(scheduler, [f"c{number}" for number in range(400 if tools else 9_000)], tools=tools)
    shown: list[Any] = []
    call_view, newest_calls = state_view.call_view, scheduler.registry.newest_calls
    looked_at: list[Any] = []

    def counted_view(call: Any, when: Any) -> Any:
        shown.append(call)
        return call_view(call, when)

    def counted_calls(*args: Any) -> Any:
        for entry in newest_calls(*args):
            looked_at.append(entry)
            yield entry

    monkeypatch.setattr(state_view, "call_view", counted_view)
    monkeypatch.setattr(scheduler.registry, "newest_calls", counted_calls)
    assert Server(scheduler).get(protocol.STATE_PATH, limit=10_000, **query).status_code == 200
    assert len(shown) <= MAX_PAGE
    assert sum(1 + len(call.tools) for call in shown) <= MAX_WEIGHT
    assert len(looked_at) <= MAX_VISITED + 1


def test_where_a_long_chain_lies_is_found_in_few_looks() -> None:
    looked_at: list[bytes] = []

    def is_here(key: bytes) -> bool:
        looked_at.append(key)
        return int.from_bytes(key) < 777

    keys = [number.to_bytes(4) for number in range(100_000)]
    assert leading(keys, is_here) == 777
    assert len(looked_at) < 20
    assert [leading(keys[:n], is_here) for n in (0, 1, 777, 778)] == [0, 1, 777, 777]


def test_decisions_come_in_pages() -> None:
    steps = StepLoop(build_scheduler(space={"short_s": 0.0}, num_blocks=12))
    for number in range(12):
        steps.add(make_request(f"r{number}", [number] * 100, hint(f"app{number}"), max_tokens=8))
    steps.run()
    server = Server(steps.scheduler)
    whole = [entry for page in reversed(server.pages("decisions", limit=200)) for entry in page]
    assert len(whole) > 20
    pages = server.pages("decisions", limit=7)
    assert [entry for page in reversed(pages) for entry in page] == whole
    assert all(len(page) <= 7 for page in pages)


def test_steps_come_in_pages(scheduler: Any) -> None:
    for number in range(25):
        scheduler._last_order_s = number + 1.0
        scheduler.steps._steps = type(scheduler.steps._steps)(scheduler.steps._steps, 100)
        scheduler.steps._steps.append(Step(number, 0, 0, 0.5, number + 1.0))
    pages = Server(scheduler).pages("steps", limit=10)
    assert [[step["prefill_tokens"] for step in page] for page in pages] == [
        list(range(15, 25)),
        list(range(5, 15)),
        list(range(5)),
    ]
    assert pages[0][0] == {"prefill_tokens": 15, "decode_seqs": 0, "kv_tokens_read": 0, "seconds": 0.5}


def test_measured_steps_have_times_that_grow() -> None:
    steps = StepLoop(build_scheduler(measure={"steps": 100}))
    steps.add(make_request("r", [1] * 40, None, max_tokens=8))
    steps.run()
    answer = steps.scheduler.tokencake_steps(100)
    assert len(answer["steps"]) == 8
    assert all(earlier < later for earlier, later in pairwise(answer["order"]))


@pytest.mark.parametrize("path", PATHS.values())
@pytest.mark.parametrize(
    "query",
    [{"limit": value} for value in ("0", "-1", "10001", "1e2", "x", "", "1.5", "\u0663", "1" * 5_000)]
    + [{"before": value} for value in ("x", "", "nan", "inf", "-1", "1e400", "1_0x")],
)
def test_a_bad_page_is_refused_with_its_name_and_value(scheduler: Any, path: str, query: dict[str, str]) -> None:
    answer = Server(scheduler).get(path, **query)
    ((name, value),) = query.items()
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message.startswith(f"{name} is '{value[:10]}")
    assert "expected" in message
    assert len(message) < 200


@pytest.mark.parametrize(("num_blocks", "counts"), [(200, 4), (10_000, 1)])
def test_the_blocks_of_a_large_device_are_counted_once_a_second(
    monkeypatch: pytest.MonkeyPatch, num_blocks: int, counts: int
) -> None:
    scheduler = build_scheduler(num_blocks=num_blocks)
    now = [100.0]
    monkeypatch.setattr("tokencake_vllm.scheduler.time.monotonic", lambda: now[0])
    counted: list[float] = []
    budget = scheduler.block_budget

    def counting() -> Any:
        counted.append(now[0])
        return budget()

    monkeypatch.setattr(scheduler, "block_budget", counting)
    for _ in range(2):
        assert sum(scheduler.tokencake_state(None, None, 10)["kv_blocks"].values()) == num_blocks - 1
        assert sum(scheduler.tokencake_metrics()["labelled"]["kv_blocks"].values()) == num_blocks - 1
    assert len(counted) == counts
    now[0] += 1.0
    scheduler.tokencake_metrics()
    assert counted[-1] == now[0]


def test_times_stay_the_same_from_page_to_page_until_the_clock_is_set(
    scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    jump_s = 0.0
    first = scheduler.epoch_offset_s()
    clock: Callable[[], float] = __import__("time").time
    monkeypatch.setattr("tokencake_vllm.scheduler.time.time", lambda: clock() + jump_s)
    jump_s = 0.3
    assert scheduler.epoch_offset_s() == first
    jump_s = 60.0
    assert scheduler.epoch_offset_s() == pytest.approx(first + 60.0, abs=0.5)
