"""The order of the components around vLLM's own methods, which is a contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.harness.scheduler import build_scheduler, make_request
from tests.harness.steps import StepLoop, hint
from tokencake import protocol
from tokencake_vllm.component import SchedulerComponent
from tokencake_vllm.scheduler import TokenCakeMixin

LAYERS = ["steps", "offload", "admission", "recorder"]
HOOKS = [name for name in vars(SchedulerComponent) if name.startswith(("on_", "before_", "after_"))]


class Watched:
    """A scheduler whose hooks, and vLLM's methods between them, are written down as they are called."""

    def __init__(self, scheduler: TokenCakeMixin, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        for layer in LAYERS:
            component = getattr(scheduler, layer)
            for hook in HOOKS:
                monkeypatch.setattr(component, hook, self._noting(hook, layer, getattr(component, hook)))
        stock = type(scheduler).__mro__[2]
        for method in ("add_request", "schedule", "update_from_output", "_preempt_request", "_free_request"):
            monkeypatch.setattr(stock, method, self._noting(method, "vllm", getattr(stock, method)))

    def _noting(self, name: str, layer: str, stock: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, layer))
            return stock(*args, **kwargs)

        return noted

    def around(self, before: str | None, method: str | None, after: str | None) -> list[str]:
        """The layers that were called for these three, in order."""
        return [layer for name, layer in self.calls if name in (before, method, after)]


@pytest.fixture
def steps() -> StepLoop:
    return StepLoop(build_scheduler(space={"swap_patience_tokens": 0}, num_blocks=24))


def test_components_are_called_outside_in_before_vllm_and_inside_out_after_it(
    steps: StepLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(steps.scheduler, monkeypatch)

    steps.add(make_request("r1", list(range(100)), hint("a")))
    assert watched.around(None, "add_request", "on_added") == ["vllm", *reversed(LAYERS)]

    steps.step()
    assert watched.around("before_step", "schedule", "after_step") == [*LAYERS, "vllm", *reversed(LAYERS)]
    assert watched.around(None, "update_from_output", "after_update") == ["vllm", *reversed(LAYERS)]

    steps.run()
    assert watched.around("before_free", "_free_request", None) == [*LAYERS, "vllm"]


def test_a_preemption_is_told_before_and_after(steps: StepLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    steps.add(*(make_request(f"r{n}", [n] * 100, hint(f"a{n}"), max_tokens=150) for n in range(3)))
    watched = Watched(steps.scheduler, monkeypatch)

    steps.run()
    called = watched.around("before_preempt", "_preempt_request", "after_preempt")
    assert called
    assert called[: 2 * len(LAYERS) + 1] == [*LAYERS, "vllm", *reversed(LAYERS)]


def test_only_events_that_the_registry_has_applied_reach_the_components(
    steps: StepLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Any] = []
    monkeypatch.setattr(steps.scheduler.admission, "on_events", lambda events, now: heard.extend(events))
    steps.add(make_request("r1", list(range(100)), hint("a", call="c")))
    known, unknown = (protocol.ToolStart(call=call, tool_call="t", tool="build") for call in ("c", "d"))

    answer = steps.scheduler.tokencake_events([protocol.to_wire(known), protocol.to_wire(unknown)], 0.0)

    assert answer["outcomes"] == ["applied", "unknown"]
    assert heard == [known]


def test_an_error_in_one_component_is_counted_and_stops_no_other(
    steps: StepLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a defect")

    for layer in LAYERS:
        for hook in HOOKS:
            monkeypatch.setattr(getattr(steps.scheduler, layer), hook, broken)
    steps.add(make_request("r1", list(range(100)), hint("a")))
    steps.run()

    assert steps.received["r1"] == 4
    assert steps.scheduler.registry.counts["errors",] > len(LAYERS)
