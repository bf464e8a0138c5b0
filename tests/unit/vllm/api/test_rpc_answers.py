"""What the scheduler answers reaches the API server, also where the operator lets vLLM serialize anything."""

from __future__ import annotations

import time
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

from tests.harness.kv_worker import MakeHarness
from tests.harness.scheduler import build_scheduler, make_request
from tests.harness.steps import StepLoop, hint
from tokencake import protocol


def through_vllm(answer: Any) -> Any:
    frames = MsgpackEncoder().encode(UtilityResult(answer))
    return MsgpackDecoder(UtilityResult).decode(frames).result


def answers_of(scheduler: Any, call: str) -> dict[str, Any]:
    events = [
        protocol.to_wire(protocol.ToolStart(call, "t", "build")),
        protocol.to_wire(protocol.ToolEnd(call, "t", duration_s=2.0)),
    ]
    return {
        "events": scheduler.tokencake_events(events, time.time()),
        "state": scheduler.tokencake_state(None, None, 100),
        "decisions": scheduler.tokencake_decisions(None, None, 100),
        "steps": scheduler.tokencake_steps(100),
        "metrics": scheduler.tokencake_metrics(),
    }


@pytest.mark.parametrize("serializes_anything", ["0", "1"])
def test_every_answer_arrives_as_it_was_given(
    serializes_anything: str,
    make_harness: MakeHarness,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", serializes_anything)
    engine = make_harness()
    with_time = answers_of(engine.scheduler, engine.long_stall())
    steps = StepLoop(build_scheduler(num_blocks=20))
    steps.add(*(make_request(f"r{n}", [n] * 100, hint(f"app{n}", call=f"c{n}", agent="a")) for n in range(8)))
    steps.run()
    with_space = answers_of(steps.scheduler, "c1")
    assert with_time["metrics"]["observed"]
    assert with_space["decisions"]["decisions"]
    for answers in (with_time, with_space):
        assert {name: through_vllm(answer) for name, answer in answers.items()} == answers
