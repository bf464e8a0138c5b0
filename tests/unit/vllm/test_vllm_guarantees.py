"""What vLLM's scheduler promises its users, said in our words and asked of stock vLLM and of every policy of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.request import Request, RequestStatus

from tests.harness.scheduler import build_scheduler, make_request
from tests.harness.steps import StepLoop, hint, tokens_by_step

SPACE: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "ours": {"enabled": True},
    "strict": {"enabled": True, "guarded": 0},
    "paper": {"enabled": True, "policy": "paper"},
}

ABORTED = RequestStatus.FINISHED_ABORTED


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def is_async(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=list(SPACE))
def engine(request: pytest.FixtureRequest, is_async: bool) -> Callable[..., StepLoop]:
    """`engine(num_blocks=, **fields of the scheduler's config)` is a fresh engine."""
    space = SPACE[request.param]
    stock = AsyncScheduler if is_async else Scheduler

    def make(num_blocks: int = 200, **scheduler: Any) -> StepLoop:
        create = stock if space is None else None
        return StepLoop(build_scheduler(create, is_async=is_async, num_blocks=num_blocks, space=space, **scheduler))

    return make


@pytest.fixture
def call() -> Callable[..., Request]:
    """`call("r1", 90)` is a request of an application of its own, with a prompt of 90 tokens that nobody shares."""

    def make(name: str, tokens: int | list[int], *, app: str | None = None, answer: int = 4, **fields: Any) -> Request:
        prompt = [sum(name.encode()) * 7 + place for place in range(tokens)] if isinstance(tokens, int) else tokens
        request: Request = make_request(name, prompt, hint(app or name, call=name), max_tokens=answer)
        for field, value in fields.items():
            setattr(request, field, value)
        return request

    return make


# --- limits -----------------------------------------------------------------------------------------


def test_never_more_calls_run_than_max_num_seqs(engine: Any, call: Any) -> None:
    steps = engine(max_num_seqs=3)
    steps.add(*(call(f"r{n}", 40, answer=9) for n in range(10)))
    steps.run()

    assert max(len(tokens) for tokens in steps.trace) == 3
    assert steps.received == {f"r{n}": 9 for n in range(10)}
    steps.check_empty()


def test_no_step_has_more_tokens_than_the_budget(engine: Any, call: Any) -> None:
    steps = engine(max_num_batched_tokens=64)
    steps.add(*(call(f"r{n}", 100 + n, answer=9) for n in range(6)))
    steps.run()

    assert max(sum(tokens.values()) for tokens in steps.trace) <= 64
    assert set(steps.received.values()) == {9}
    steps.check_empty()


def test_a_long_prompt_is_computed_in_chunks_beside_the_calls_that_run(engine: Any, call: Any) -> None:
    steps = engine(max_num_batched_tokens=64)
    steps.add(call("short", 10, answer=30))
    steps.step()
    steps.add(call("long", 300, answer=2))
    steps.run()

    chunks = tokens_by_step(steps.trace, "long")
    assert chunks[:4] == [63] * 4
    assert sum(chunks) == 300 + 2 - 1  # the last token of an answer is never computed
    assert steps.received == {"short": 30, "long": 2}
    steps.check_empty()


def test_a_long_prompt_takes_no_more_than_its_threshold_while_others_wait(engine: Any, call: Any) -> None:
    steps = engine(long_prefill_token_threshold=40)
    steps.add(call("a", 200), call("b", 200))
    steps.run()

    assert max(tokens_by_step(steps.trace, "a")[:2] + tokens_by_step(steps.trace, "b")[:2]) <= 40
    steps.check_empty()


def test_an_answer_ends_at_its_limit_and_at_the_models(engine: Any, call: Any) -> None:
    steps = engine()
    steps.add(call("limit", 30, answer=5), call("model", 2_040, answer=100))
    steps.run()

    assert steps.received == {"limit": 5, "model": 8}
    assert steps.ends == {"limit": ["length"], "model": ["length"]}
    steps.check_empty()


def test_an_answer_ends_at_a_stop_token(engine: Any, call: Any) -> None:
    steps = engine()
    request = call("r", 30, answer=50)
    request.sampling_params.stop_token_ids = [7]
    request.sampling_params.ignore_eos = False
    steps.add(request)
    steps.run()

    assert (steps.received["r"], steps.ends["r"]) == (1, ["stop"])
    steps.check_empty()


def test_the_worker_hears_once_that_a_call_is_new_and_once_that_it_is_over(engine: Any, call: Any) -> None:
    steps = engine(num_blocks=24)
    names = [f"r{n}" for n in range(8)]
    steps.add(*(call(name, 90, answer=40) for name in names))
    steps.run()
    steps.check_empty()

    assert steps.preempted
    assert steps.new == dict.fromkeys(names, 1)
    assert steps.finished_ids == dict.fromkeys(names, 1)


# --- prefix caching ---------------------------------------------------------------------------------


def test_a_prompt_seen_before_is_not_computed_again_but_for_its_end(engine: Any, call: Any) -> None:
    steps = engine()
    prompt = list(range(96))
    steps.add(call("first", prompt))
    steps.run()
    steps.add(call("same", prompt), call("longer", [*prompt, *range(500, 540)]))
    steps.run()

    # Whatever is cached, the last token is computed: its logits are wanted, and blocks of 16 are whole.
    assert tokens_by_step(steps.trace, "same")[0] == 16
    assert tokens_by_step(steps.trace, "longer")[0] == 40
    steps.check_empty()


def test_a_prefix_is_shared_by_calls_that_run_at_the_same_time(engine: Any, call: Any) -> None:
    steps = engine(num_blocks=40)
    prompt = list(range(320))
    steps.add(call("first", [*prompt, 1_000], answer=30))
    steps.run(until=lambda: steps.received["first"] > 0)
    steps.add(*(call(f"r{n}", [*prompt, 2_000 + n], answer=4) for n in range(5)))
    steps.step()

    # 39 blocks would not hold two of these prompts if each had its own.
    assert len(steps.scheduler.running) == 6
    steps.run()
    steps.check_empty()


def test_a_call_that_reads_no_cache_computes_its_whole_prompt(engine: Any, call: Any) -> None:
    steps = engine()
    prompt = list(range(96))
    steps.add(call("first", prompt))
    steps.run()
    steps.add(call("fresh", prompt, skip_reading_prefix_cache=True))
    steps.run()

    assert tokens_by_step(steps.trace, "fresh")[0] == 96


def test_the_cache_is_reset_only_while_nobody_runs(engine: Any, call: Any) -> None:
    steps = engine()
    prompt = list(range(96))
    steps.add(call("first", prompt, answer=20))
    steps.step()
    assert not steps.scheduler.reset_prefix_cache()
    steps.run()
    steps.step()
    assert steps.scheduler.reset_prefix_cache()
    steps.add(call("again", prompt))
    steps.run()

    assert tokens_by_step(steps.trace, "again")[0] == 96
    steps.check_empty()


def test_a_reset_with_running_calls_makes_them_compute_again_and_lose_no_token(engine: Any, call: Any) -> None:
    steps = engine(num_blocks=40)
    steps.add(*(call(f"r{n}", 90, answer=20) for n in range(4)))
    steps.run(until=lambda: min(steps.received[f"r{n}"] for n in range(4)) > 3)
    while steps.under_way:
        steps.complete()
    before = steps.computed("r0")
    assert steps.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert steps.free_blocks == 39
    steps.run()

    assert steps.computed("r0") - before >= 90

    assert steps.received == {f"r{n}": 20 for n in range(4)}
    steps.check_empty()


# --- preemption -------------------------------------------------------------------------------------


def test_a_preempted_call_goes_on_where_it_was(engine: Any, call: Any) -> None:
    steps = engine(num_blocks=24)
    steps.add(*(call(f"r{n}", 90, answer=60) for n in range(6)))
    steps.run()

    assert steps.preempted
    assert steps.received == {f"r{n}": 60 for n in range(6)}
    steps.check_empty()


def test_nobody_is_preempted_while_everything_fits(engine: Any, call: Any) -> None:
    steps = engine(num_blocks=200)
    steps.add(*(call(f"r{n}", 90, answer=60) for n in range(8)))
    steps.run()

    assert not steps.preempted
    assert steps.order() == [f"r{n}" for n in range(8)]


# --- abort ------------------------------------------------------------------------------------------


def _wait_for_the_victim(steps: StepLoop) -> str:
    steps.run(until=lambda: bool(steps.preempted))
    return next(iter(steps.preempted))


def test_a_call_can_be_aborted_while_it_waits(engine: Any, call: Any) -> None:
    steps = engine(num_blocks=12)
    steps.add(call("runs", 120, answer=20), call("waits", 120))
    steps.step()
    steps.scheduler.finish_requests("waits", ABORTED)
    steps.run()

    assert steps.received == {"runs": 20}
    steps.check_empty()


def test_a_call_can_be_aborted_between_two_chunks_of_its_prompt(engine: Any, call: Any) -> None:
    steps = engine(max_num_batched_tokens=64)
    steps.add(call("r", 500))
    steps.step()
    steps.step()
    steps.scheduler.finish_requests("r", ABORTED)

    steps.check_empty()


def test_a_call_can_be_aborted_in_its_answer_and_what_it_held_is_for_the_next(engine: Any, call: Any) -> None:
    steps = engine(num_blocks=12)
    steps.add(call("runs", 120, answer=200), call("waits", 120, answer=6))
    for _ in range(8):
        steps.step()
    steps.scheduler.finish_requests("runs", ABORTED)
    steps.run()

    assert steps.received["waits"] == 6
    steps.check_empty()


def test_a_call_can_be_aborted_after_it_was_preempted(engine: Any, call: Any) -> None:
    steps = engine(num_blocks=24)
    steps.add(*(call(f"r{n}", 90, answer=60) for n in range(6)))
    victim = _wait_for_the_victim(steps)
    steps.scheduler.finish_requests(victim, ABORTED)
    steps.run()

    assert {name: count for name, count in steps.received.items() if name != victim} == {
        f"r{n}": 60 for n in range(6) if f"r{n}" != victim
    }
    steps.check_empty()


def test_aborting_twice_or_somebody_unknown_or_everybody_is_no_error(engine: Any, call: Any) -> None:
    steps = engine(num_blocks=24)
    steps.add(*(call(f"r{n}", 90, answer=60) for n in range(6)))
    steps.step()
    for names in (["r0"], ["r0", "nobody"], None):
        steps.scheduler.finish_requests(names, ABORTED)

    assert not steps.scheduler.has_unfinished_requests()
    steps.check_empty()


# --- structured output ------------------------------------------------------------------------------


class Grammar:
    """Accepts everything."""

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        del request_id, tokens
        return True

    def is_terminated(self) -> bool:
        return False


def _structured(name: str, answer: int = 4) -> Request:
    plain = make_request(name, list(range(40)), hint(name), max_tokens=answer)
    params = plain.sampling_params.clone()
    params.structured_outputs = StructuredOutputsParams(json="{}")
    return Request(name, list(range(40)), params, None, arrival_time=0.0, block_hasher=plain._block_hasher)


def test_a_call_waits_for_its_grammar_and_others_do_not(engine: Any, call: Any) -> None:
    steps = engine()
    waits = _structured("waits")
    steps.add(waits, call("passes", 40))
    steps.run(until=lambda: steps.received["passes"] == 4)
    assert steps.received["waits"] == 0
    waits.structured_output_request.grammar = Grammar()
    steps.run()

    assert steps.received == {"waits": 4, "passes": 4}
    steps.check_empty()


def test_a_call_whose_grammar_fails_ends_with_an_error_and_others_go_on(engine: Any, call: Any) -> None:
    steps = engine()
    fails = _structured("fails")
    steps.add(fails, call("passes", 40))
    fails.structured_output_request.grammar = ValueError("no such schema")
    steps.run()

    assert (steps.ends["fails"], steps.received["passes"]) == (["error"], 4)
    steps.check_empty()


def test_a_call_can_be_aborted_while_its_grammar_is_made(engine: Any) -> None:
    steps = engine()
    steps.add(_structured("r"))
    steps.step()
    steps.scheduler.finish_requests("r", ABORTED)

    steps.check_empty()


# --- LoRA -------------------------------------------------------------------------------------------


def test_never_more_adapters_run_than_max_loras_and_others_pass_those_that_wait(engine: Any, call: Any) -> None:
    steps = engine(max_loras=1)
    adapters = {name: LoRARequest(name, number, "/nowhere") for number, name in enumerate("abc", 1)}
    of = {}
    for number in range(9):
        adapter = "abc-"[number % 4]
        request = call(f"r{number}", 40, answer=6, lora_request=adapters.get(adapter))
        of[f"r{number}"] = adapter
        steps.add(request)
    steps.step()
    assert {of[name] for name in steps.trace[0]} == {"a", "-"}
    steps.run()

    assert all(len({of[name] for name in tokens} - {"-"}) <= 1 for tokens in steps.trace)
    assert set(steps.received.values()) == {6}
    steps.check_empty()


# --- streaming input --------------------------------------------------------------------------------


def _turn(tokens: list[int], answer: int = 4, *, is_last: bool = False) -> Request:
    plain = make_request("talk", tokens, hint("talk", call="talk"), max_tokens=answer)
    return Request(
        "talk",
        tokens,
        plain.sampling_params,
        None,
        arrival_time=0.0,
        block_hasher=plain._block_hasher,
        resumable=not is_last,
    )


def test_a_talk_goes_on_with_what_it_has_computed(engine: Any, call: Any) -> None:
    steps = engine()
    steps.add(_turn(list(range(64))))
    steps.run(until=lambda: steps.ends.get("talk") == ["stop"] or steps.ends.get("talk") == ["length"])
    while steps.under_way:
        steps.complete()
    held = steps.pool.num_gpu_blocks - 1 - steps.free_blocks
    assert held == 5  # its blocks stay its own while it waits for its user
    assert not steps.scheduler.has_unfinished_requests()
    assert steps.received["talk"] == 4

    steps.add(call("other", 40))
    steps.run()
    before = steps.computed("talk")
    steps.add(_turn(list(range(900, 920))))
    steps.run(until=lambda: steps.received["talk"] == 8)
    while steps.under_way:
        steps.complete()
    assert steps.computed("talk") - before <= 20 + 4  # nothing of the first turn was computed again

    steps.add(_turn([], is_last=True))
    steps.check_empty()


def test_turns_that_come_early_wait_in_line(engine: Any) -> None:
    steps = engine()
    steps.add(_turn(list(range(64))), _turn(list(range(500, 520))))
    steps.add(_turn([1], is_last=True))
    steps.run()

    assert steps.received["talk"] == 8
    steps.check_empty()


def test_a_talk_that_waits_for_its_user_takes_a_slot(engine: Any, call: Any) -> None:
    steps = engine(max_num_seqs=2)
    steps.add(_turn(list(range(64))))
    steps.run(until=lambda: steps.received["talk"] == 4)
    steps.add(*(call(f"r{n}", 40, answer=6) for n in range(4)))
    steps.run(until=lambda: steps.received["r0"] == 1)
    assert [len(tokens) for tokens in steps.trace[-2:]] == [1, 1]
    steps.run(until=lambda: all(steps.received[f"r{n}"] == 6 for n in range(4)))
    steps.scheduler.finish_requests("talk", ABORTED)

    steps.check_empty()


def test_a_talk_outlives_a_crowd_that_wants_its_memory(engine: Any, call: Any) -> None:
    steps = engine(num_blocks=24)
    steps.add(_turn(list(range(64)), answer=40))
    steps.add(*(call(f"r{n}", 90, answer=40) for n in range(6)))
    steps.run(until=lambda: steps.received["talk"] == 40)
    steps.add(_turn(list(range(900, 930)), answer=40))
    steps.add(_turn([], is_last=True))
    steps.run()

    assert steps.received == {"talk": 80} | {f"r{n}": 40 for n in range(6)}
    steps.check_empty()


# --- several answers --------------------------------------------------------------------------------


def test_the_answers_of_one_request_are_each_on_their_own_and_share_their_prompt(engine: Any) -> None:
    plain = make_request("r", list(range(96)), hint("a", call="c"), max_tokens=6)
    params = plain.sampling_params.clone()
    params.n = 4
    wanted = EngineCoreRequest(
        request_id="r",
        external_req_id="r",
        prompt_token_ids=list(range(96)),
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    parent = ParentRequest(wanted)
    steps = engine()
    for index in range(4):
        name, child = parent.get_child_info(index)
        steps.add(Request(name, list(range(96)), child, None, arrival_time=0.0, block_hasher=plain._block_hasher))
    steps.run()

    assert steps.received == {f"{index}_r": 6 for index in range(4)}
    assert sum(tokens_by_step(steps.trace, f"{index}_r")[0] for index in range(4)) == 96 + 3 * 16
    if (registry := getattr(steps.scheduler, "registry", None)) is not None:
        assert list(registry.calls) == ["c"]
        assert registry.calls["c"].output_tokens == 24
    steps.check_empty()


# --- pause (and sleep, which pauses first) ----------------------------------------------------------


def test_a_paused_engine_schedules_nothing_and_takes_nothing_away(engine: Any, call: Any) -> None:
    steps = engine(num_blocks=24)
    steps.add(*(call(f"r{n}", 90, answer=30) for n in range(6)))
    steps.step()
    running = {request.request_id for request in steps.scheduler.running}
    steps.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    for _ in range(40):
        assert steps.step().num_scheduled_tokens == {}
    assert {request.request_id for request in steps.scheduler.running} == running
    assert not steps.preempted
    steps.scheduler.set_pause_state(PauseState.UNPAUSED)
    steps.run()

    assert steps.received == {f"r{n}": 30 for n in range(6)}
    steps.check_empty()


def test_an_engine_that_takes_nobody_new_lets_those_that_run_come_to_their_end(engine: Any, call: Any) -> None:
    steps = engine(max_num_seqs=5)
    steps.add(*(call(f"r{n}", 90, answer=10) for n in range(8)))
    steps.step()
    running = {request.request_id for request in steps.scheduler.running}
    steps.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    steps.run()
    assert {name for name, count in steps.received.items() if count == 10} == running
    steps.scheduler.set_pause_state(PauseState.UNPAUSED)
    steps.run()

    assert steps.received == {f"r{n}": 10 for n in range(8)}
    steps.check_empty()


# --- embeddings -------------------------------------------------------------------------------------


def test_a_request_for_an_embedding_has_no_hint_and_is_served(engine: Any) -> None:
    import torch
    from vllm.pooling_params import PoolingParams
    from vllm.v1.outputs import ModelRunnerOutput

    steps = engine()
    hasher = make_request("x", [1])._block_hasher
    request = Request("r", list(range(40)), None, PoolingParams(task="embed"), arrival_time=0.0, block_hasher=hasher)
    steps.scheduler.add_request(request)
    output = steps.scheduler.schedule()
    assert output.num_scheduled_tokens == {"r": 40}
    answer = ModelRunnerOutput(req_ids=["r"], req_id_to_index={"r": 0}, pooler_output=[torch.zeros(2)])
    steps.scheduler.update_from_output(output, answer)

    steps.check_empty()


# --- vLLM's own priorities --------------------------------------------------------------------------


def test_with_vllms_own_priorities_the_least_urgent_is_the_victim(engine: Any, call: Any) -> None:
    steps = engine(num_blocks=24, policy="priority")
    for number in range(4):
        steps.add(call(f"r{number}", 90, answer=60, priority=number))
    steps.run()

    assert steps.preempted
    assert set(steps.preempted) <= {"r3", "r2"}
    assert steps.received == {f"r{n}": 60 for n in range(4)}


def test_sampling_parameters_are_passed_on_untouched(engine: Any) -> None:
    steps = engine()
    request = make_request("r", list(range(40)), hint("a"))
    before = request.sampling_params.clone()
    steps.add(request)
    steps.run()

    assert isinstance(request.sampling_params, SamplingParams)
    assert repr(request.sampling_params) == repr(before)
