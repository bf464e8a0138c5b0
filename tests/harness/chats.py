"""Chats of LangGraph applications, played on an engine with hints and on stock vLLM: the same requests, hit for hit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import strategies as st

from tests.harness.kv_worker import SchedulerHarness
from tests.harness.scheduler import BLOCK_TOKENS, build_scheduler, make_request
from tests.harness.steps import ANSWER, StepLoop
from tokencake import protocol

LONGEST = 700
"""Tokens of a thread, at most."""


@dataclass(frozen=True)
class Request:
    """One request, as either engine gets it."""

    name: str
    tokens: tuple[int, ...]
    max_tokens: int
    hint: protocol.Hint | None


class PluginEngine:
    """The plug-in's scheduler with its worker."""

    def __init__(self, patch: pytest.MonkeyPatch, **options: Any) -> None:
        self.harness = SchedulerHarness(patch, **options)
        self.prefills: dict[str, Any] = {}

    def add(self, request: Request) -> None:
        hint = request.hint and request.hint.to_json()
        made = make_request(request.name, list(request.tokens), hint, request.max_tokens)
        self.prefills[request.name] = made.prefill_stats  # vLLM fills it in
        self.harness.add(made)

    def step(self) -> None:
        if self.harness.scheduler.has_requests():
            self.harness.step(finish_jobs=True)

    def run(self) -> None:
        self.harness.run(3_000)

    def abort(self, name: str) -> None:
        _abort(self.harness, name)

    def send(self, *events: Any) -> None:
        self.harness.send(*events)

    def wait(self, seconds: float) -> None:
        self.harness.clock.now += seconds
        self.run()


class StockEngine:
    """vLLM without the plug-in: it gets neither hints nor events."""

    def __init__(self, *, is_async: bool, num_blocks: int) -> None:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler

        scheduler = build_scheduler(
            AsyncScheduler if is_async else Scheduler,
            is_async=is_async,
            num_blocks=num_blocks,
            max_tokens_per_step=256,  # as in the harness
        )
        self.loop = StepLoop(scheduler)
        self._last_id = 0
        allocate = self.loop.pool.get_new_blocks

        def watch(count: int) -> Any:
            blocks = allocate(count)
            self._last_id = max([self._last_id, *(block.block_id for block in blocks)])
            return blocks

        self.loop.pool.get_new_blocks = watch
        self.prefills: dict[str, Any] = {}

    def add(self, request: Request) -> None:
        made = make_request(request.name, list(request.tokens), None, request.max_tokens)
        self.prefills[request.name] = made.prefill_stats  # vLLM fills it in
        self.loop.add(made)

    def step(self) -> None:
        if self.loop.scheduler.has_requests():
            self.loop.step()

    def run(self) -> None:
        self.loop.run()

    def abort(self, name: str) -> None:
        _abort(self.loop, name)

    def send(self, *events: Any) -> None:
        """Stock vLLM takes no events."""

    def wait(self, seconds: float) -> None:
        self.run()

    @property
    def blocks_used(self) -> int:
        """Blocks that a device must have for this run to evict nothing: vLLM takes unused blocks by their ids."""
        return self._last_id + 1


def _abort(loop: StepLoop, name: str) -> None:
    from vllm.v1.request import RequestStatus

    loop.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)


def cached_tokens(engine: PluginEngine | StockEngine) -> dict[str, int]:
    """Prompt tokens of each request that were cached, on the device or on the host."""
    return {
        name: stats.num_local_cached_tokens + stats.num_external_cached_tokens
        for name, stats in engine.prefills.items()
    }


@dataclass
class Thread:
    """One conversation under a checkpointer."""

    history: list[int] = field(default_factory=list)
    checkpoints: list[list[int]] = field(default_factory=list)
    open_tool: str | None = None
    """The call whose tool waits for a human."""


ENDS = ("now", "now", "now", "late", "twice", "early", "never")
REUSES = (None, None, "extends", "extends", "final")
SHAPES = ("answer", "answer", "tool", "interrupt", "parallel", "retry", "fork", "crash")

actions = st.one_of(
    st.tuples(
        st.just("turn"),
        st.integers(0, 3),
        st.integers(0, 1),
        st.sampled_from(SHAPES),
        st.integers(1, 70),
        st.integers(1, 40),
        st.sampled_from(REUSES),
        st.sampled_from(ENDS),
    ),
    st.tuples(
        st.just("alone"),
        st.integers(0, 1),
        st.integers(0, 2),
        st.integers(1, 70),
        st.integers(1, 40),
        st.sampled_from(REUSES),
        st.sampled_from(ENDS),
    ),
    st.tuples(st.just("plain"), st.integers(0, 2), st.integers(1, 70)),
    st.tuples(st.just("session_end"), st.integers(0, 3), st.integers(0, 1)),
    st.tuples(st.just("again"), st.integers(0, 20)),
    st.tuples(st.just("stray"), st.integers(0, 5)),
    st.tuples(st.just("wait"), st.sampled_from([0.05, 2.0, 70.0, 500.0])),
)


class Chats:
    """Plays actions on some engines at once."""

    def __init__(self, *engines: PluginEngine | StockEngine) -> None:
        self.engines = engines
        self.threads = [Thread() for _ in range(4)]
        self.made = 0
        self.held: list[Any] = []
        """Events that come late."""
        self.sent: list[Any] = []
        self.prompt_blocks = 0
        """Blocks that all requests would fill if they shared none."""
        self.largest = 0

    def play(self, trace: Sequence[tuple[Any, ...]]) -> None:
        for action in trace:
            getattr(self, action[0])(*action[1:])
        self._each(lambda engine: engine.run())

    # --- what applications do -----------------------------------------------------------------------

    def turn(self, thread: int, agent: int, shape: str, words: int, output: int, reuse: str | None, end: str) -> None:
        """One run of a graph on a thread: it extends what the thread remembers."""
        chat, app = self.threads[thread], self._name("run")
        if len(chat.history) > LONGEST:
            chat.history, chat.checkpoints = [], []
        session = f"thread-{thread}//agent-{agent}"
        fields = {"session": session, "app": app, "agent": f"agent-{agent}", "node": "model", "reuse": reuse}
        if chat.open_tool is not None:  # the human's answer
            self._send(protocol.ToolEnd(chat.open_tool, "t", duration_s=5.0))
            chat.open_tool = None
        if shape == "fork" and chat.checkpoints:
            chat.history = list(chat.checkpoints[words % len(chat.checkpoints)])
        if not chat.history:
            chat.history = [100 + agent] * 40
        chat.history += self._words(words)
        self._end_early(app, end)
        match shape:
            case "tool" | "interrupt":
                call = self._call(chat.history, output, expects_tools={"build": 5.0}, **fields)
                chat.history += [ANSWER] * output
                self._send(protocol.ToolStart(call, "t", "build"))
                if shape == "interrupt":
                    chat.open_tool = call
                else:
                    self._send(protocol.ToolEnd(call, "t", duration_s=1.0))
                    chat.history += self._words(words // 2 + 1)
                    self._call(chat.history, output, **fields)
                    chat.history += [ANSWER] * output
            case "parallel":
                for _ in range(2):
                    self._add(chat.history, output, **fields)
                self._run()
                chat.history += [ANSWER] * output
            case "retry" | "crash":
                call = self._add(chat.history, output, **fields)
                self._each(lambda engine: engine.step())
                self._each(lambda engine: engine.abort(call))
                if shape == "retry":
                    self._call(chat.history, output, **fields)
                    chat.history += [ANSWER] * output
            case _:
                self._call(chat.history, output, **fields)
                chat.history += [ANSWER] * output
        chat.checkpoints.append(list(chat.history))
        self._end(app, end)

    def alone(self, agent: int, topic: int, words: int, output: int, reuse: str | None, end: str) -> None:
        """One run of a graph without a checkpointer: its session is its own."""
        app = self._name("run")
        fields = {"session": f"{app}//agent-{agent}", "app": app, "agent": f"agent-{agent}", "node": "model"}
        text = [100 + agent] * 40 + [200 + topic] * 30 + self._words(words)
        self._end_early(app, end)
        call = self._call(text, output, expects_tools={"build": 0.01}, **fields)
        self._send(protocol.ToolStart(call, "t", "build"), protocol.ToolEnd(call, "t", duration_s=0.01))
        text += [ANSWER] * output + self._words(10)
        self._call(text, output, reuse=reuse, **fields)
        self._end(app, end)

    def plain(self, topic: int, words: int) -> None:
        """A client that sends no hints."""
        self._request(Request(self._name("plain"), tuple([100] * 40 + [300 + topic] * words), 5, None))
        self._run()

    # --- other events ---------------------------------------------------------------------------------

    def session_end(self, thread: int, agent: int) -> None:
        self._send(protocol.SessionEnd(f"thread-{thread}//agent-{agent}"))

    def again(self, index: int) -> None:
        """An event comes again, or at last."""
        if self.held:
            self._send(self.held.pop(index % len(self.held)))
        elif self.sent:
            self._send(self.sent[-1 - index % len(self.sent)])

    def stray(self, kind: int) -> None:
        """An event of something that the engine does not know."""
        self._send(
            (
                protocol.SessionEnd("unknown"),
                protocol.AppEnd("thread-1"),
                protocol.AppEnd("run"),
                protocol.ToolEnd("unknown", "t"),
                protocol.StallStart("thread-2//agent-0", "human"),
                protocol.AppEnd("thread-2//agent-0"),
            )[kind]
        )

    def wait(self, seconds: float) -> None:
        self._each(lambda engine: engine.wait(seconds))

    # --- parts -----------------------------------------------------------------------------------------

    def _name(self, kind: str) -> str:
        self.made += 1
        return f"{kind}-{self.made}"

    def _words(self, count: int) -> list[int]:
        self.made += 1
        return [1_000 + self.made] * count

    def _add(self, tokens: list[int], output: int, **fields: Any) -> str:
        call = self._name("call")
        self._request(Request(call, tuple(tokens), output, protocol.Hint(call=call, **fields)))
        return call

    def _call(self, tokens: list[int], output: int, **fields: Any) -> str:
        call = self._add(tokens, output, **fields)
        self._run()
        return call

    def _request(self, request: Request) -> None:
        blocks = -(-(len(request.tokens) + request.max_tokens) // BLOCK_TOKENS)
        self.prompt_blocks += blocks
        self.largest = max(self.largest, blocks)
        self._each(lambda engine: engine.add(request))

    def _run(self) -> None:
        self._each(lambda engine: engine.run())

    def _end_early(self, app: str, end: str) -> None:
        if end == "early":
            self._send(protocol.AppEnd(app))

    def _end(self, app: str, end: str) -> None:
        match end:
            case "now":
                self._send(protocol.AppEnd(app))
            case "twice":
                self._send(protocol.AppEnd(app), protocol.AppEnd(app))
            case "late":
                self.held.append(protocol.AppEnd(app))

    def _send(self, *events: Any) -> None:
        self.sent += events
        self._each(lambda engine: engine.send(*events))

    def _each(self, do: Callable[[PluginEngine | StockEngine], None]) -> None:
        for engine in self.engines:
            do(engine)
