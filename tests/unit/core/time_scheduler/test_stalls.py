"""Whose prefix is wanted again, and until when?"""

from __future__ import annotations

import pytest

from tokencake.forecast.durations import Forecast
from tokencake.forecast.roles import Role
from tokencake.protocol import Hint, Stage
from tokencake.registry.records import CallRecord, Session, ToolCall, Wait
from tokencake.time_scheduler.expected_stall import AFTER_TOOLS, ANSWER, expected_remaining, give_up_after
from tokencake.time_scheduler.prefixes import CachedPrefix, PrefixIndex

KEYS = [bytes([number]) * 4 for number in range(10)]
OTHER = [bytes([100 + number]) * 4 for number in range(10)]


def hint(**fields: object) -> Hint:
    return Hint(session="s", agent="a", **fields)


def stalled(prefixes: PrefixIndex, name: str, keys: list[bytes], **fields: object) -> None:
    prefixes.arrive(name, keys[:1], hint(**fields), 0.0)
    prefixes.stall(name, keys, 1.0)


def test_the_call_that_extends_a_prefix_ends_its_stall() -> None:
    prefixes = PrefixIndex()
    stalled(prefixes, "one", KEYS[:4])
    predecessor = prefixes.arrive("two", KEYS[:6], hint(), 2.0)
    assert predecessor is not None
    assert predecessor.id == "one"
    assert list(prefixes.by_id) == ["two"]


def test_a_fan_out_is_waited_for_to_its_last_branch() -> None:
    prefixes = PrefixIndex()
    stalled(prefixes, "one", KEYS[:4])
    prefixes.arrive("two", KEYS[:6], hint(fan_out=2), 2.0)
    assert "one" in prefixes.by_id
    prefixes.arrive("three", [*KEYS[:4], *OTHER[:2]], hint(fan_out=2), 2.0)
    assert "one" not in prefixes.by_id


def test_an_answer_in_other_tokens_is_taken_for_the_same_session() -> None:
    prefixes = PrefixIndex()
    stalled(prefixes, "one", KEYS[:6])
    predecessor = prefixes.arrive("two", [*KEYS[:4], *OTHER[:4]], hint(), 2.0)
    assert predecessor is not None
    stalled(prefixes, "three", KEYS[:8])
    assert prefixes.arrive("four", [*KEYS[:2], *OTHER[:4]], hint(), 2.0) is None


def test_a_block_is_dead_when_nobody_wants_it() -> None:
    prefixes = PrefixIndex()
    stalled(prefixes, "one", KEYS[:4])
    stalled(prefixes, "two", [*KEYS[:2], *OTHER[:2]])
    removed = prefixes.remove("one")
    assert removed is not None
    assert prefixes.unreferenced(removed) == [KEYS[3], KEYS[2]]
    prefixes.remove("two")
    assert (prefixes.refcounts, prefixes._stalled_at, prefixes._by_session, prefixes._subagents) == ({}, {}, {}, {})


def test_a_call_that_lost_its_blocks_wants_what_it_had_written_too() -> None:
    prefixes = PrefixIndex()
    prefixes.arrive("one", KEYS[:4], hint(), 0.0)
    prefixes.on_preempt(prefixes.by_id["one"], KEYS[:6])
    assert (prefixes.by_id["one"].phase, prefixes.by_id["one"].block_hashes) == ("waiting", KEYS[:6])
    assert set(prefixes.refcounts) == set(KEYS[:6])
    prefixes.on_preempt(prefixes.by_id["one"], KEYS[:2])  # again, before it has computed its prompt
    assert prefixes.by_id["one"].block_hashes == KEYS[:6]
    prefixes.remove("one")
    assert not prefixes.refcounts


def prefix(**fields: object) -> CachedPrefix:
    return CachedPrefix("c", KEYS, hint(**fields), "stalled", 0.0)


def median(given: CachedPrefix, tools: list[ToolCall], now: float = 0.0, session: Session | None = None) -> float:
    call = CallRecord("c", given.hint, 0.0, 10, tools=dict(enumerate(tools)))
    return expected_remaining(given, call, session, PrefixIndex(), Forecast(), now).quantile(0.5)


def test_before_events_the_hint_tells_which_tools_may_come() -> None:
    assert median(prefix(expects_tools={"short": 1.0, "long": 30.0}), []) == pytest.approx(30.0, rel=0.2)


def test_of_several_tools_the_longest_counts() -> None:
    tools = [ToolCall("x", started_s=0.0, estimate_s=2.0), ToolCall("y", started_s=0.0, estimate_s=40.0)]
    assert median(prefix(), tools) == pytest.approx(40.0, rel=0.2)
    tools[1].ended_s = 5.0
    assert median(prefix(), tools) == pytest.approx(2.0, rel=0.2)


def test_stages_tell_the_rest() -> None:
    stages = (Stage("query", 2.0), Stage("embed", 3.0), Stage("generate", 20.0))
    tool = ToolCall("rag", started_s=0.0, stages=stages)
    assert median(prefix(), [tool]) == pytest.approx(25.0, rel=0.2)
    tool.stage = "generate"
    assert median(prefix(), [tool], now=4.0) == pytest.approx(20.0, rel=0.3)


def test_a_fraction_tells_the_pace() -> None:
    tool = ToolCall("build", started_s=0.0, estimate_s=1.0, fraction=0.25)
    assert median(prefix(), [tool], now=10.0) == pytest.approx(30.0, rel=0.3)


def test_a_human_is_waited_for_like_a_tool() -> None:
    session = Session("s", "a", None, "", 0.0, waits={"human": Wait(0.0, 300.0)})
    assert median(prefix(), [], session=session) == pytest.approx(300.0, rel=0.2)


def test_a_branch_waits_at_its_join_for_the_slowest_sibling() -> None:
    prefixes, forecast = PrefixIndex(), Forecast()
    for name in ("one", "two", "three"):
        at = Hint(session=name, call=name, agent="a", app="x", node=name, join="merge")
        keys = [*KEYS[:2], name.encode()]
        prefixes.arrive(name, keys, at, 0.0)
        prefixes.stall(name, keys, 0.0)
        prefixes.by_id[name].back_s = {"one": 1.0, "two": 30.0, "three": 8.0}[name]
    done = ToolCall("x", started_s=0.0, ended_s=1.0)
    one = prefixes.by_id["one"]
    call = CallRecord("one", one.hint or hint(), 0.0, 10, tools={"t": done})
    assert expected_remaining(one, call, None, prefixes, forecast, 1.0).quantile(0.5) == pytest.approx(29.0, rel=0.2)
    prefixes.remove("two")
    assert expected_remaining(one, call, None, prefixes, forecast, 1.0).quantile(0.5) == pytest.approx(7.0, rel=0.2)
    prefixes.remove("three")
    assert expected_remaining(one, call, None, prefixes, forecast, 1.0).quantile(0.5) < 0.01


def test_how_long_a_node_waits_behind_its_tools_is_learned() -> None:
    forecast = Forecast()
    for _ in range(10):
        forecast.learn(Role("a", node="n"), AFTER_TOOLS, 12.0)
    given = CachedPrefix("c", KEYS, hint(node="n", join="merge"), "stalled", 0.0)
    call = CallRecord("c", hint(), 0.0, 10, tools={"t": ToolCall("x", started_s=0.0, ended_s=4.0)})
    assert expected_remaining(given, call, None, PrefixIndex(), forecast, 4.0).quantile(0.5) == pytest.approx(
        12.0, rel=0.2
    )
    assert expected_remaining(given, call, None, PrefixIndex(), forecast, 14.0).quantile(0.5) < 3.0


def test_a_tool_lasts_as_long_as_the_last_answer_of_its_sub_agent() -> None:
    prefixes, forecast = PrefixIndex(), Forecast()
    for _ in range(10):
        forecast.learn(Role("a"), "delegate", 60.0)
        forecast.learn(Role("worker"), ANSWER, 2.0)
    worker = Hint(session="w", agent="worker", parent_call="c", parent_tool_call="t", reuse="final")
    prefixes.arrive("w", OTHER[:2], worker, 10.0)
    call = CallRecord("c", hint(), 0.0, 10, tools={"t": ToolCall("delegate", started_s=0.0)})
    given = CachedPrefix("c", KEYS, hint(call="c"), "stalled", 0.0)
    assert expected_remaining(given, call, None, prefixes, forecast, 10.0).quantile(0.5) == pytest.approx(2.0, rel=0.2)
    prefixes.remove("w")
    assert expected_remaining(given, call, None, prefixes, forecast, 10.0).quantile(0.5) == pytest.approx(50.0, rel=0.2)


def test_a_stall_is_given_up_at_its_deadline_or_after_four_times_its_late_quantile() -> None:
    remaining = Forecast().stall(Role(), None, 100.0)
    assert give_up_after(remaining, [50.0, None]) == 50.0
    assert give_up_after(remaining, []) == pytest.approx(4 * remaining.quantile(0.9))
    assert give_up_after(Forecast().stall(Role(), None, 0.1), []) == 60.0
