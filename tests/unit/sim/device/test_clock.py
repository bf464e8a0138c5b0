from hypothesis import given
from hypothesis import strategies as st

from tokencake_sim.device.clock import Clock, virtual_time


@given(st.lists(st.floats(0, 100), max_size=30))
def test_callbacks_run_in_the_order_of_their_times_and_first_come_first_served_among_equals(times):
    clock, seen = Clock(), []
    for index, time_s in enumerate(times):
        clock.at(time_s, lambda entry=(time_s, index): seen.append((entry, clock.now_s)))

    clock.advance_to(100.0)

    assert [entry for entry, _ in seen] == sorted((time_s, index) for index, time_s in enumerate(times))
    assert all(entry[0] == now_s for entry, now_s in seen)


def test_a_callback_may_ask_for_another_one_on_the_way():
    clock, seen = Clock(), []
    clock.at(1.0, lambda: clock.after(1.0, lambda: seen.append(clock.now_s)))

    clock.advance_to(5.0)

    assert seen == [2.0]
    assert clock.next_s is None


def test_a_time_in_the_past_is_now():
    clock, seen = Clock(), []
    clock.advance_to(3.0)
    clock.at(1.0, lambda: seen.append(clock.now_s))
    clock.advance_to(3.0)

    assert seen == [3.0]


def test_the_modules_that_ask_for_the_time_get_the_virtual_one_and_then_their_own_back():
    from vllm.v1.core.sched import scheduler

    clock = Clock()
    clock.advance_to(7.0)
    real = scheduler.time
    with virtual_time(clock):
        assert scheduler.time.monotonic() == scheduler.time.time() == 7.0
        assert scheduler.time.monotonic_ns() == 7_000_000_000
    assert scheduler.time is real
