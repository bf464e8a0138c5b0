import pytest
from vllm.v1.core.sched import scheduler as vllm_scheduler

from tokencake_sim import App, DeadlockError, Node, RunOptions, Tool, Workload
from tokencake_sim.policies import Policy
from tokencake_sim.simulate import simulate

STALLED = (Node("first", "n", 20, 4, tool=Tool("t", 5.0, 10)), Node("last", "n", 5, 4, ("first",)))


def prepare(profile, due_s, *, is_deaf=False, is_refusing=False):
    """One application on a scheduler that is due at `due_s`: the times at which it is stepped, and what starts it."""
    stepped = []

    class Due(vllm_scheduler.Scheduler):
        left = sorted(due_s)

        def next_due_s(self):
            return self.left[0] if self.left else None

        def schedule(self, *arguments, **options):
            now_s = vllm_scheduler.time.monotonic()
            stepped.append(now_s)
            while not is_deaf and self.left and self.left[0] <= now_s:
                self.left.pop(0)
            return super().schedule(*arguments, **options)

        def _handle_blocked_waiting_request(self, request):
            return not is_refusing and super()._handle_blocked_waiting_request(request)

    class OnTime(Policy):
        def scheduler(self, is_async):
            return Due

    workload = Workload("test", (App("a", "k", 0.0, STALLED),), "the test")
    return stepped, lambda: simulate(workload, profile, OnTime("on-time", "is due"), RunOptions())


def test_an_idle_scheduler_is_stepped_at_its_due_times(small):
    stepped, start = prepare(small, [2.0, 2.0, 3.5])

    start()

    assert [time_s for time_s in stepped if 1.0 < time_s < 4.9] == [2.0, 3.5]


def test_due_times_cost_no_time_and_change_no_call(small):
    (_, plain), (_, due) = prepare(small, []), prepare(small, [2.0, 3.5])

    assert due().trace == plain().trace


def test_a_due_time_that_never_moves_does_not_stop_the_clock(small):
    (_, plain), (_, deaf) = prepare(small, []), prepare(small, [2.0], is_deaf=True)

    assert deaf().metrics["makespan_s"] == plain().metrics["makespan_s"]


def test_a_due_time_wakes_a_scheduler_whose_calls_cannot_run(small):
    stepped, start = prepare(small, [2.0], is_refusing=True)

    with pytest.raises(DeadlockError, match=r"time 2\.000 s"):
        start()

    assert stepped[-1] == 2.0
