"""Names that are not declared: a refusal stays a refusal, and a scrape of the metrics goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, get_args

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from prometheus_client import REGISTRY

from tests.harness.scheduler import build_scheduler, make_request
from tests.harness.steps import StepLoop, hint
from tokencake.registry import metric_names
from tokencake.registry.metric_names import COUNTERS, GAUGES, HISTOGRAMS, LABELLED_GAUGES
from tokencake.space_scheduler.policy import REFUSALS, Refusal
from tokencake_vllm.api import metrics


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[logging.LogRecord]]:
    """What the plug-in logs, with metrics of which none was left out yet."""
    metrics.register_metrics()
    monkeypatch.setattr(metrics, "_left_out", set())
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = records.append  # type: ignore[method-assign]  # a list will do
    logger = logging.getLogger("vllm.tokencake")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, {"engine": "test", **labels}) or 0.0


def drained(**parts: Any) -> dict[str, Any]:
    return {"counts": [], "observed": {}, "gauges": {}, "labelled": {}, **parts}


@pytest.mark.parametrize(
    ("names", "table"),
    [
        (metric_names.CounterName, COUNTERS),
        (metric_names.GaugeName, GAUGES),
        (metric_names.LabelledGaugeName, LABELLED_GAUGES),
        (metric_names.HistogramName, HISTOGRAMS),
        (Refusal, REFUSALS),
    ],
)
def test_every_name_that_type_checks_is_described(names: Any, table: dict[str, Any]) -> None:
    assert set(get_args(names)) == set(table)


def test_every_number_of_a_scheduler_has_a_metric(errors: list[logging.LogRecord]) -> None:
    before = value("tokencake:undeclared_metrics_total")
    metrics._add("test", build_scheduler().tokencake_metrics())
    assert value("tokencake:undeclared_metrics_total") == before
    assert not errors


@pytest.mark.parametrize(
    "wrong",
    [
        {"counts": [[["made_up"], 1]]},
        {"counts": [[["hints"], 1]]},
        {"counts": [[["hints", "accepted", "twice"], 1]]},
        {"counts": [[["hints", "accepted"], -1]]},
        {"counts": [[["sessions", "x"], 1]]},
        {"counts": [[["tool_s"], 1]]},
        {"observed": {"made_up": [1.0]}},
        {"observed": {"sessions": [1.0]}},
        {"gauges": {"made_up": 1}},
        {"gauges": {"sessions": None}},
        {"labelled": {"made_up": {"x": 1}}},
        {"labelled": {"sessions": {"x": 1}}},
    ],
)
def test_a_metric_that_is_not_declared_is_left_out_and_all_others_are_shown(
    errors: list[logging.LogRecord], wrong: dict[str, Any]
) -> None:
    right = {
        "counts": [[["hints", "absent"], 2]],
        "observed": {"queue_s": [0.5]},
        "gauges": {"live_calls": 3},
        "labelled": {"kv_blocks": {"running": 4}},
    }
    both: dict[str, Any] = {
        part: [*wrong.get(part, []), *items] if isinstance(items, list) else {**wrong.get(part, {}), **items}
        for part, items in right.items()
    }
    names = ("tokencake:hints_total", "tokencake:queue_seconds_count", "tokencake:undeclared_metrics_total")
    labels: tuple[dict[str, str], ...] = ({"outcome": "absent"}, {}, {})
    before = [value(name, **own) for name, own in zip(names, labels, strict=True)]
    for _ in range(2):
        metrics._add("test", both)
    after = [value(name, **own) for name, own in zip(names, labels, strict=True)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [4, 2, 2]
    assert value("tokencake:live_calls") == 3
    assert value("tokencake:kv_blocks", state="running") == 4
    assert len(errors) == 1


def test_metrics_are_shown_where_the_plug_in_was_never_started() -> None:
    answered = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        answered.append(scope["path"])

    scope = {"type": "http", "path": "/metrics", "app": SimpleNamespace(state=SimpleNamespace())}
    asyncio.run(metrics.ScrapeMiddleware(app)(scope, None, None))  # type: ignore[arg-type]
    assert answered == ["/metrics"]


def waiting_beside_a_running_one() -> StepLoop:
    steps = StepLoop(build_scheduler())
    steps.add(make_request("runs", [1] * 40, hint("old"), max_tokens=20))
    steps.step()
    steps.add(make_request("waits", [2] * 40, hint("young"), max_tokens=2))
    return steps


@pytest.mark.parametrize("reason", ["made up", "", 7, False, ["unhashable"]])
def test_a_call_refused_for_a_reason_that_is_not_declared_is_passed_over(
    errors: list[logging.LogRecord], reason: Any
) -> None:
    steps = waiting_beside_a_running_one()
    steps.scheduler.admission.policy.refusal = lambda *_: reason
    assert ["waits" in steps.step().num_scheduled_tokens for _ in range(3)] == [False] * 3
    assert steps.scheduler.registry.counts["space_refusals", "undeclared"] == 3
    assert not steps.scheduler.registry.counts["errors",]
    assert len(errors) == 1
    entry, *_ = [e for e in steps.scheduler.tokencake_decisions(None, None, 10)["decisions"] if e["kind"] == "refused"]
    assert "not declared" in entry["words"]
    for _ in range(40):  # the running call ends, and a lone call is not asked for
        steps.step()
    assert not steps.scheduler.has_unfinished_requests()


def test_a_defect_in_what_is_noted_of_a_refusal_lets_no_call_in() -> None:
    steps = waiting_beside_a_running_one()
    steps.scheduler.admission.policy.refusal = lambda *_: "full"
    steps.scheduler.admission.explainer.note_skipped = None  # calling it raises
    assert "waits" not in steps.step().num_scheduled_tokens
    assert steps.scheduler.registry.counts["errors",] > 0
    steps.scheduler.admission.swap.may_start = lambda *_: False
    assert "waits" not in steps.step().num_scheduled_tokens
