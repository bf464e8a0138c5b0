"""Answers from KV that went to the host and came back, compared with stock vLLM to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu import processes
from benchmarks.gpu.engine import Answer, Engine, Setup, gpu_options, prompt
from benchmarks.gpu.report import Report
from tokencake import protocol
from tokencake.forecast.costs import CostModel

ANSWER_TOKENS: Final = 8
TOOL_TOKENS: Final = 20
GRAPHS: Final = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}
MODES: Final[dict[str, dict[str, Any]]] = {
    "eager": {"enforce_eager": True, "async_scheduling": False, "attention_backend": "TRITON_ATTN"},
    "async": {"enforce_eager": True, "async_scheduling": True, "attention_backend": "FLASH_ATTN"},
    "graphs": {"compilation_config": GRAPHS, "async_scheduling": True, "attention_backend": "TRITON_ATTN"},
}
MODES_ON_CPU: Final[dict[str, dict[str, Any]]] = {"eager": {"enforce_eager": True}}
LIMITS: Final = {
    "max_model_len": 4_096,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
    "num_gpu_blocks_override": 400,
}


def check(report: Report, model: Path, logs: Path, *, is_cpu: bool) -> None:
    """A stock engine and one of ours with the same options beside each other, in each mode."""
    block = 32 if is_cpu else 16
    lengths = [10 * block - ANSWER_TOKENS - 1, 10 * block - ANSWER_TOKENS, 10 * block, 10 * block + 1]
    lengths += [] if is_cpu else [1_400, 3_000]
    where = {} if is_cpu else {**gpu_options(), "kv_cache_memory_bytes": 2**30}
    for mode, options in (MODES_ON_CPU if is_cpu else MODES).items():
        every = {**LIMITS, "block_size": block, **where, **options}
        stock = Setup(f"{mode}, stock", "stock", model, every)
        ours = Setup(f"{mode}, ours", "ours", model, every, {"host_kv_gib": 0.5, "debug_checksums": True})
        works = {
            stock.name: partial(_stock, setup=stock, lengths=lengths),
            ours.name: partial(_ours, setup=ours, lengths=lengths),
        }
        found = processes.run(report, works, logs)
        expected, answers = found.get(stock.name), found.get(ours.name)
        if expected and answers:
            _compare(report, mode, expected, answers)


def _compare(report: Report, mode: str, expected: dict[Any, Answer], answers: dict[Any, Answer]) -> None:
    differing: dict[str, Any] = {str(key): _difference(expected[key], answers[key]) for key in expected}
    figures = {"answers": len(expected), "logprobs": sum(3 * len(answer.tokens) for answer in expected.values())}
    faults = {key: what for key, what in differing.items() if what}
    report.tell(f"{mode}: answers, logprobs and hits are stock's", not faults, **figures, differing=faults)


def _difference(one: Answer, other: Answer) -> dict[str, Any] | None:
    if (one.tokens, one.logprobs, one.cached) == (other.tokens, other.logprobs, other.cached):
        return None
    pairs = zip(one.logprobs, other.logprobs, strict=True)
    gaps = [abs(a[token] - b[token]) for a, b in pairs for token in a.keys() & b.keys()]
    return {
        "same_tokens": one.tokens == other.tokens,
        "worst_logprob": max(gaps, default=None),
        "cached": [one.cached, other.cached],
    }


def _conversation(
    engine: Engine, length: int, between: Callable[[int, Answer], None], round_: int = 0
) -> dict[tuple[int, int], Answer]:
    """Three calls, each of which extends the one before it; `between` stands for the tool."""
    tokens, answers = prompt(length, length), {}
    for turn in range(3):
        call = f"{length}-{round_}/{turn}"
        answer = engine.ask(tokens, call, answer_tokens=ANSWER_TOKENS, is_last=turn == 2)  # noqa: PLR2004  # the third
        answers[length, turn] = answer
        tokens = [*tokens, *answer.tokens, *prompt(turn + 1, TOOL_TOKENS)]
        if turn < 2:  # noqa: PLR2004  # as above
            between(turn, answer)
    return answers


def _stock(report: Report, setup: Setup, lengths: list[int]) -> dict[Any, Answer]:
    """The answers; given twice, because only an engine that repeats itself can be compared with."""
    engine = Engine(report, setup)
    rounds: list[dict[Any, Answer]] = []
    for _ in range(2):
        answers: dict[Any, Answer] = {}
        for length in lengths:
            answers |= _conversation(engine, length, lambda _turn, _answer: None)
        rounds.append(answers)
        engine.llm.reset_prefix_cache()
    one, two = rounds
    differing = {str(key): gap for key in one if (gap := _difference(one[key], two[key]))}
    report.tell(f"{setup.name} repeats itself", not differing, differing=differing)
    return one


def _ours(report: Report, setup: Setup, lengths: list[int]) -> dict[Any, Answer]:
    """The answers. After a first call its KV is moved out, wiped and uploaded, after a second one loaded on demand."""
    CostModel.recompute_s = _never_worth_it  # type: ignore[method-assign, assignment]  # this is about bytes: copy all
    engine = Engine(report, setup)
    answers: dict[Any, Answer] = {}
    for length in lengths:
        moves: list[dict[str, Any]] = []
        answers |= _conversation(engine, length, partial(_move, engine, moves))
        prefixes = [answers[length, turn].told["prefix_tokens"] for turn in (1, 2)]
        is_moved = all(move["offloaded"] and move["after_wipe"] == 0 for move in moves) and moves[0]["uploaded"]
        is_used = prefixes[0]["host"] == 0 < prefixes[0]["device"] and prefixes[1]["device"] == 0 < prefixes[1]["host"]
        report.tell(
            f"{setup.name}, {length} tokens go and come back", is_moved and is_used, moves=moves, prefixes=prefixes
        )
    report.tell(f"{setup.name}, counts", None, **engine.counts())
    report.attempt(_spoiled, setup.name, engine, lengths[2], answers)
    return answers


def _never_worth_it(_rates: CostModel, _blocks: int) -> float:
    return float("inf")


def _move(engine: Engine, moves: list[dict[str, Any]], turn: int, answer: Answer) -> None:
    blocks = answer.told["blocks"]
    move: dict[str, Any] = {"offloaded": engine.settled(answer.call, "on_host") == blocks, "wiped": engine.wipe()}
    move["after_wipe"] = engine.kv(answer.call)["on_device"]
    if turn == 0:
        engine.tell(protocol.ToolStart(answer.call, "t", "build"), protocol.ToolEnd(answer.call, "t", duration_s=600.0))
        move["uploaded"] = engine.settled(answer.call, "on_device") == blocks
    moves.append(move)


def _spoiled(report: Report, name: str, engine: Engine, length: int, answers: dict[Any, Answer]) -> None:
    """With wrong bytes on the host the answer must differ; else the comparison would prove nothing."""

    def spoil(turn: int, answer: Answer) -> None:
        if turn == 0:
            engine.settled(answer.call, "on_host")
            engine.wipe()
            engine.spoil_host_memory()

    found = _conversation(engine, length, spoil, round_=1)[length, 1]
    gap = _difference(answers[length, 1], found)
    is_loaded = found.told["prefix_tokens"]["host"] > 0
    report.tell(f"control: {name}, wrong bytes give another answer", bool(gap) and is_loaded, gap=gap)
