"""What the gate tells the policy, and what it keeps of its answers within one step."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from vllm.v1.request import RequestStatus

from tests.unit.vllm.vllm_adapter.pools import BLOCK_TOKENS, Device, keys
from tokencake.protocol import Hint
from tokencake.registry.registry import Registry
from tokencake.space_scheduler.applications import AppTracker
from tokencake.space_scheduler.explain import DecisionExplainer
from tokencake.space_scheduler.growth import GrowthReservation
from tokencake.space_scheduler.policy import AdmissionState, Refusal
from tokencake.space_scheduler.settings import SpaceSettings
from tokencake_vllm.component import ErrorContainment
from tokencake_vllm.space_scheduler.admission_gate import AdmissionGate
from tokencake_vllm.vllm_adapter.block_view import BlockView


class Policy:
    """Refuses what it is told to, and remembers what it has seen."""

    rank_reasons = ("it arrived first",)

    def __init__(self) -> None:
        self.refused: dict[str, Any] = {}
        self.seen: list[tuple[str, int, AdmissionState]] = []

    def refusal(self, call: Any, need_blocks: int, state: AdmissionState) -> Refusal | None:
        self.seen.append((call.request_id, need_blocks, state))
        found: Refusal | None = self.refused.get(call.request_id)
        return found


class Engine:
    """A gate over a device of 20 blocks."""

    def __init__(self, **settings: Any) -> None:
        self.device, self.policy, self.registry = Device(20), Policy(), Registry()
        self.applications = AppTracker({}.get, answer_quantile=0.8)
        self.errors: list[int] = []
        chosen = SpaceSettings(**settings)
        policy: Any = self.policy
        self.gate = AdmissionGate(
            chosen,
            policy,
            self.applications,
            BlockView(self.device.manager, BLOCK_TOKENS),
            DecisionExplainer(chosen, policy, self.applications, self.registry),
            self.registry,
            ErrorContainment(lambda: self.errors.append(1)),
        )
        self.admitted: list[Any] = []

    def add(self, name: str, tokens: int = 40, *, is_plain: bool = False, max_tokens: int = 100, **hint: Any) -> Any:
        given = None if is_plain else Hint(session=name, app=name, **hint)
        self.applications.add(name, given, prompt_tokens=tokens, max_tokens=max_tokens, now=0.0)
        return self.device.request(name, num_tokens=tokens, max_tokens=max_tokens)

    def start(self, request: Any, tokens: int) -> None:
        """The request gets blocks for so many tokens."""
        self.device.tables[request.request_id] = self.device.take(keys(request.request_id, -(-tokens // 16)))
        request.status = RequestStatus.RUNNING
        self.admitted.append(request)

    def admits(self, request: Any, now: float = 0.0) -> bool:
        call = self.applications.calls[request.request_id]
        return self.gate.admits(request, call, lambda: self.admitted, now)

    def refusals(self, reason: str) -> int:
        return self.registry.counts["space_refusals", reason]

    @property
    def state(self) -> AdmissionState:
        return self.policy.seen[-1][2]


def test_the_policy_sees_what_a_call_needs_and_what_is_free() -> None:
    engine = Engine()
    engine.gate.step = 7
    engine.gate.exclusive_blocks = {"x": 3}
    assert engine.admits(engine.add("a", 40))

    name, need, state = engine.policy.seen[0]
    assert (name, need) == ("a", 3)
    assert (state.total_blocks, state.free_blocks, state.block_tokens, state.step) == (20, 20, 16, 7)
    assert state.exclusive_blocks == {"x": 3}
    assert (state.reservations, state.bypassed, state.taken, state.bypass_expired) == ((), (), (), False)


def test_a_promise_is_what_is_left_of_answer_and_prompt_and_what_comes_free() -> None:
    engine = Engine()
    request = engine.add("a", 100, max_tokens=30)
    engine.start(request, 48)
    request.num_output_tokens = 10
    assert engine.gate.reservation(request) == GrowthReservation(20, 4, 3)

    engine.device.pool.touch(engine.device.tables["a"][:1])
    request.num_tokens = 32
    assert engine.gate.reservation(request) == GrowthReservation(20, 0, 2), (
        "it has more than it needs, and shares the first"
    )
    request.num_output_tokens = 30
    assert engine.gate.left_tokens(request) == 1, "it is not over yet"
    request.num_output_tokens = 29
    assert engine.gate.left_tokens(request) == 1
    request.num_output_tokens = 28
    assert engine.gate.left_tokens(request) == 2
    del engine.applications.calls["a"]
    assert engine.gate.left_tokens(request) == 2, "of a request without a record its limit counts"


def test_those_admitted_before_the_first_question_are_promised_and_later_ones_as_they_start() -> None:
    engine = Engine()
    running = engine.add("runs", 32)
    engine.start(running, 32)
    first, second, third = engine.add("a", 20), engine.add("b", 20), engine.add("c", 20)
    assert engine.admits(first)
    assert [reservation.freed_blocks for reservation in engine.state.reservations] == [2]

    engine.start(first, 20)
    assert engine.admits(second)
    assert len(engine.state.reservations) == 2
    assert [(call.request_id, need) for call, need in engine.state.taken] == [("a", 2)]
    assert engine.admits(third), "the second did not get its blocks"
    assert len(engine.state.reservations) == 2
    assert len(engine.state.taken) == 1


def test_a_request_that_was_preempted_again_has_not_started() -> None:
    engine = Engine()
    first, second = engine.add("a", 20), engine.add("b", 20)
    assert engine.admits(first)
    first.status = RequestStatus.PREEMPTED
    assert engine.admits(second)

    assert engine.state.taken == ()


def test_refused_calls_are_counted_and_told_to_the_policy_in_their_order() -> None:
    engine = Engine()
    engine.policy.refused = {"a": "full", "b": "delays"}
    for name, tokens in (("a", 40), ("b", 100), ("c", 16)):
        assert engine.admits(engine.add(name, tokens)) == (name == "c")

    assert engine.state.bypassed == (3, 7)
    assert (engine.refusals("full"), engine.refusals("delays")) == (1, 1)
    words = engine.gate._explainer.view(0.0, 9.0, call=None, app=None, limit=9)["decisions"]
    assert [decision["call"] for decision in words] == ["a", "b"]
    engine.gate.reset()
    assert engine.gate.state().bypassed == ()


def test_a_bounded_number_of_calls_is_passed_over_in_a_step() -> None:
    engine = Engine(scan=2)
    engine.policy.refused = {"a": "full", "b": "full"}
    assert [engine.admits(engine.add(name)) for name in ("a", "b", "c")] == [False] * 3

    assert len(engine.policy.seen) == 2, "the third is not asked for"
    engine.gate.reset()
    assert engine.admits(engine.add("d"))


def test_what_kind_of_call_was_passed_over_is_known() -> None:
    engine = Engine()
    engine.policy.refused = dict.fromkeys(("usual", "urgent", "plain"), "full")

    def seen() -> tuple[bool, bool]:
        state = engine.gate.state()
        return state.has_bypassed_critical, state.has_bypassed_unhinted

    engine.admits(engine.add("usual"))
    assert seen() == (False, False)
    engine.admits(engine.add("urgent", critical=True))
    assert seen() == (True, False)
    engine.admits(engine.add("plain", is_plain=True))
    assert seen() == (True, True)
    engine.gate.reset()
    assert seen() == (False, False)


@pytest.mark.parametrize(("waited_s", "bypass_expired"), [(19.9, False), (20.0, False), (20.1, True)])
def test_the_first_in_line_is_passed_for_so_long_and_no_longer(waited_s: float, bypass_expired: bool) -> None:
    engine = Engine(pass_s=20.0)
    engine.policy.refused = {"a": "full", "b": "full"}
    first, second = engine.add("a"), engine.add("b")
    for now in (100.0, 100.0 + waited_s):
        engine.gate.reset()
        engine.admits(first, now)
        assert engine.applications.calls["a"].first_skipped_s == 100.0
        engine.admits(second, now)

    assert engine.gate.state().bypass_expired == bypass_expired
    assert engine.applications.calls["b"].first_skipped_s is None, "only the first in line is waited for"


def test_a_reason_that_no_policy_may_give_is_told_as_undeclared_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = Engine()
    engine.policy.refused = {"a": "no idea", "b": 7}
    engine.gate._has_logged_undeclared = False
    assert [engine.admits(engine.add(name)) for name in ("a", "b")] == [False, False]

    assert (engine.refusals("undeclared"), engine.errors) == (2, [])


def test_a_call_that_is_not_asked_for_because_of_a_swap_is_told_so() -> None:
    engine = Engine()
    request = engine.add("a")
    engine.gate.note_reserved(request, engine.applications.calls["a"], 1.0)

    assert (engine.refusals("kept"), engine.policy.seen) == (1, [])


def test_a_defect_while_a_refusal_is_noted_lets_nothing_in(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    engine.policy.refused = {"a": "full"}
    monkeypatch.setattr(engine.gate._explainer, "note_skipped", lambda *_: 1 / 0)

    assert not engine.admits(engine.add("a"))
    assert engine.errors == [1]
