"""Whatever happens in whatever order, no block is lost, owned twice, or hit with something else in it."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from vllm.v1.request import RequestStatus

from tests.harness.kv_worker import SchedulerHarness
from tokencake import protocol

SESSIONS = 4

actions = st.one_of(
    st.tuples(st.just("add"), st.integers(0, SESSIONS - 1), st.integers(5, 120), st.integers(1, 40)),
    st.tuples(st.just("extend"), st.integers(0, SESSIONS - 1), st.integers(1, 60), st.integers(1, 40)),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("job"), st.integers(0, 10), st.booleans()),
    st.tuples(st.just("jobs"), st.integers(0, 10)),
    st.tuples(st.just("abort"), st.integers(0, 10)),
    st.tuples(st.just("start"), st.integers(0, 10), st.sampled_from([None, 0.01, 5.0, 300.0])),
    st.tuples(st.just("progress"), st.integers(0, 10), st.sampled_from([0.0, 0.5, 1.0])),
    st.tuples(st.just("end"), st.integers(0, 10), st.sampled_from([None, 0.0, 30.0])),
    st.tuples(st.just("stall"), st.integers(0, SESSIONS - 1), st.booleans()),
    st.tuples(st.just("talk"), st.integers(0, SESSIONS - 1), st.integers(40, 120)),
    st.tuples(st.just("away")),
    st.tuples(st.just("back"), st.integers(0, SESSIONS - 1)),
    st.tuples(st.just("twins"), st.integers(0, SESSIONS - 1), st.integers(1, 60), st.booleans()),
    st.tuples(st.just("session_end"), st.integers(0, SESSIONS - 1)),
    st.tuples(st.just("app_end"), st.integers(0, 1)),
    st.tuples(st.just("wait"), st.sampled_from([0.05, 1.0, 30.0, 400.0])),
    st.tuples(st.just("reset"), st.booleans(), st.booleans()),
    st.tuples(st.just("wipe")),
)


class Trace:
    """Plays actions on a bench."""

    def __init__(self, engine: SchedulerHarness) -> None:
        self.engine = engine
        self.names: list[str] = []
        self.last: dict[int, list[int]] = {}
        self.latest: dict[int, str] = {}

    def play(self, action: tuple[Any, ...]) -> None:
        getattr(self, action[0])(*action[1:])
        self.engine.check()

    def add(self, session: int, length: int, output: int) -> None:
        # Sessions share a system prompt of two blocks.
        self._call(session, [1] * 32 + [10 + session] * length, output)

    def extend(self, session: int, more: int, output: int) -> None:
        if session in self.last:
            self._call(session, (self.last[session] + [7] * 5 + [more] * more)[:300], output)

    def _call(self, session: int, tokens: list[int], output: int) -> None:
        self.last[session] = tokens
        hint = {"expects_tools": {"build": [0.01, 5.0, None, 100.0][session]}, "app": f"a{session % 2}"}
        reuse = "final" if output == 13 else "extends" if output % 2 else None
        self.names.append(self.engine.call(tokens, f"s{session}", output, reuse=reuse, **hint))
        self.latest[session] = self.names[-1]

    def step(self, times: int) -> None:
        for _ in range(times):
            if self.engine.scheduler.has_requests():
                self.engine.step()
                self.engine.check()

    def job(self, index: int, ok: bool) -> None:
        if self.engine.worker.jobs:
            self.engine.finish_job(index % len(self.engine.worker.jobs), ok=ok)
            self.step(1)

    def jobs(self, count: int) -> None:
        for _ in range(min(count, len(self.engine.worker.jobs))):
            self.engine.finish_job()
        self.step(1)

    def abort(self, index: int) -> None:
        if self.names:
            name = self.names[index % len(self.names)]
            self.engine.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def start(self, index: int, estimate_s: float | None) -> None:
        if self.names:
            self.engine.send(protocol.ToolStart(self.names[-1 - index % len(self.names)], "t", "build", estimate_s))

    def progress(self, index: int, fraction: float) -> None:
        if self.names:
            self.engine.send(protocol.ToolProgress(self.names[-1 - index % len(self.names)], "t", fraction=fraction))

    def end(self, index: int, duration_s: float | None) -> None:
        # Often without a start, twice, or while the call is still waiting or running.
        if self.names:
            self.engine.send(protocol.ToolEnd(self.names[-1 - index % len(self.names)], "t", duration_s=duration_s))

    def stall(self, session: int, is_start: bool) -> None:
        kind = protocol.StallStart if is_start else protocol.StallEnd
        self.engine.send(kind(f"s{session}", "human"))

    def talk(self, session: int, length: int) -> None:
        """A call from its arrival to its end, copies included."""
        self.add(session, length, 3)
        for _ in range(40):
            self.jobs(10)

    def away(self) -> None:
        """What nobody holds leaves the device."""
        self.wipe()
        self.jobs(10)

    def back(self, session: int) -> None:
        """The agent's tool has ended and its prefix is not on the device: an upload begins."""
        self.away()
        if session in self.latest:
            name = self.latest[session]
            self.engine.send(protocol.ToolStart(name, "t", "build"), protocol.ToolEnd(name, "t"))
            self.step(2)

    def twins(self, session: int, more: int, is_cut: bool) -> None:
        """Two calls want the same prefix at once, and the first may leave while it is loaded."""
        if session in self.last:
            self.away()
            text = self.last[session]
            self.extend(session, more, 3)
            self.last[session] = text
            self.extend(session, more + 1, 4)
            self.step(2)
            if is_cut:
                self.engine.scheduler.finish_requests(self.names[-2], RequestStatus.FINISHED_ABORTED)

    def session_end(self, session: int) -> None:
        self.engine.send(protocol.SessionEnd(f"s{session}"))

    def app_end(self, app: int) -> None:
        self.engine.send(protocol.AppEnd(f"a{app}"))

    def wait(self, seconds: float) -> None:
        self.engine.clock.now += seconds
        self.step(1)

    def reset(self, with_running: bool, with_host: bool) -> None:
        # vLLM refuses while the blocks of a preempted call or of a load cannot be had.
        with contextlib.suppress(RuntimeError):
            self.engine.scheduler.reset_prefix_cache(with_running, with_host)

    def wipe(self) -> None:
        self.engine.cache.wipe()
        self.step(1)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("policy", "num_blocks", "host_blocks"),
    [("ours", 40, 30), ("ours", 28, 300), ("ours", 40, 1), ("ours", 40, 0), ("lru", 40, 30), ("paper", 28, 40)],
)
def test_no_block_is_lost_or_owned_twice(policy: str, num_blocks: int, host_blocks: int, is_async: bool) -> None:
    options = {"policy": policy, "num_blocks": num_blocks, "host_blocks": host_blocks, "is_async": is_async}

    @given(st.lists(actions, min_size=10, max_size=60))
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    def play(trace: list[tuple[Any, ...]]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            engine = SchedulerHarness(patch, keep_share=0.5, job_mib=0.03, **options)
            player = Trace(engine)
            for action in trace:
                player.play(action)
            # Progress: whatever happened, everything ends and everything is given back.
            engine.run(2_000)
            engine.check()
            held = sum(len(blocks) for blocks in engine.cache.pinned.values())
            assert not engine.cache.is_busy
            assert engine.pool.num_gpu_blocks - 1 - engine.pool.get_num_free_blocks() <= held
            assert len(engine.cache.tier) + engine.cache.tier.free_slots == host_blocks

    play()
