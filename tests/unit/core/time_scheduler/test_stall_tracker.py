"""What the life of a call and the events between calls teach of stalls, and what is expected of each."""

from __future__ import annotations

import pytest

from tokencake import protocol
from tokencake.forecast.durations import Forecast
from tokencake.forecast.roles import Role, role_of
from tokencake.protocol import Hint
from tokencake.registry.registry import Registry
from tokencake.time_scheduler.expected_stall import AFTER_TOOLS, ANSWER
from tokencake.time_scheduler.prefixes import CachedPrefix
from tokencake.time_scheduler.stall_tracker import StallTracker


def blocks(name: str, count: int = 4) -> list[bytes]:
    return [f"{name}{place}".encode() for place in range(count)]


class Engine:
    """Calls of agents, as scheduler and registry see them."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.tracker = StallTracker(self.registry, blocks=1_000)

    def begin(self, name: str, keys: list[bytes], hint: Hint | None, now: float) -> CachedPrefix | None:
        if hint is not None:
            self.registry.add_call(name, hint, 64, now)
        return self.tracker.arrive(name, keys, hint, now)

    def run(self, name: str, now: float, took_s: float = 5.0, **fields: object) -> CachedPrefix:
        """A call that has its slot after a second and then takes so long."""
        hint = Hint(**{"session": f"s-{name}", "call": name, "agent": "a", "node": "n", **fields})
        self.begin(name, blocks(name), hint, now)
        self.tracker.start(name, now + 1.0)
        self.registry.finish_call(name, 1, is_aborted=False, now=now + 1.0 + took_s)
        found = self.tracker.finish(name, blocks(name), now + 1.0 + took_s)
        assert found is not None
        return found[0]

    def on_event(self, event: protocol.Event, now: float) -> tuple[list[str], list[str]]:
        self.registry.apply(event, now)
        stalled, dropped = self.tracker.on_event(event)
        return [prefix.id for prefix in stalled], [prefix.id for prefix in dropped]

    def extend(self, prefix: CachedPrefix, now: float) -> CachedPrefix | None:
        """The next call of its session comes."""
        hint = Hint(session=f"s-{prefix.id}", call=f"{prefix.id}-next", agent="a", node="n")
        return self.begin(f"{prefix.id}-next", [*prefix.block_hashes, b"more"], hint, now)

    def learned(self, role: Role, tool: str | None) -> list[float]:
        """The medians that single observations of these durations would have."""
        history = self.tracker.forecast._histories.get((role, tool or ""))
        return [] if history is None else sorted(history.weights)


AGENT, NODE = Role("a"), Role("a", node="n")


def seen(*seconds: float) -> list[float]:
    """As `Engine.learned` would say it."""
    forecast = Forecast()
    for each in seconds:
        forecast.learn(AGENT, "t", each)
    return sorted(forecast._histories.get((AGENT, "t")).weights)  # type: ignore[union-attr]


# --- learning ---------------------------------------------------------------------------------------


def test_the_time_from_the_first_slot_to_the_end_is_learned_as_that_of_an_answer() -> None:
    engine = Engine()
    engine.run("c", now=100.0, took_s=7.0)
    assert engine.learned(AGENT, ANSWER) == seen(7.0)

    engine.begin("d", blocks("d"), Hint(session="d", agent="b"), 100.0)
    engine.tracker.finish("d", blocks("d"), 140.0)
    assert engine.learned(Role("b"), ANSWER) == [], "it never had a slot"


def test_without_tools_the_stall_lasts_from_the_end_to_the_next_call() -> None:
    engine = Engine()
    prefix = engine.run("c", now=100.0, took_s=5.0)
    assert engine.extend(prefix, 126.0) is prefix
    assert engine.learned(AGENT, None) == seen(20.0)
    assert engine.learned(NODE, AFTER_TOOLS) == []


def test_what_a_hint_expects_is_not_learned_as_a_stall_without_tools() -> None:
    engine = Engine()
    engine.extend(engine.run("c", now=100.0, expects_tools={"t": None}), 126.0)

    assert engine.learned(AGENT, None) == []


def test_the_end_of_a_tool_teaches_its_duration_and_the_error_of_the_forecast() -> None:
    engine = Engine()
    engine.run("c", now=100.0)
    engine.on_event(protocol.ToolStart("c", "t1", "build", 10.0), 107.0)
    median_s = Forecast().stall(AGENT, "build", 10.0).quantile(0.5)
    assert engine.on_event(protocol.ToolEnd("c", "t1", duration_s=4.0), 111.0) == (["c"], [])

    assert engine.learned(AGENT, "build") == seen(4.0)
    assert engine.registry.drain()["observed"]["forecast_error_s"] == [pytest.approx(median_s - 4.0)]
    engine.on_event(protocol.ToolEnd("c", "t2", "build", duration_s=100.0), 111.0)
    assert engine.registry.drain()["observed"]["forecast_error_s"][0] > 80.0


def test_starts_and_ends_of_unknown_length_teach_nothing() -> None:
    engine = Engine()
    engine.run("c", now=100.0)
    engine.on_event(protocol.ToolStart("c", "t1", "build"), 107.0)
    engine.on_event(protocol.ToolEnd("c", "t2", "build"), 111.0)

    assert engine.learned(AGENT, "build") == []
    assert engine.on_event(protocol.ToolEnd("unknown", "t"), 111.0) == ([], [])


def test_behind_its_tools_a_call_comes_as_long_after_the_last_end() -> None:
    engine = Engine()
    prefix = engine.run("c", now=100.0)
    for tool, ended_s in (("t1", 110.0), ("t2", 120.0)):
        engine.on_event(protocol.ToolEnd("c", tool, "build", duration_s=1.0), ended_s)
    engine.tracker.arrive("c-next", [*prefix.block_hashes, b"more"], Hint(session="s-c", agent="a", node="n"), 128.0)

    assert engine.learned(NODE, AFTER_TOOLS) == seen(8.0)
    assert engine.learned(AGENT, None) == []


def test_a_tool_whose_end_was_lost_ended_with_the_next_call() -> None:
    engine = Engine()
    prefix = engine.run("c", now=100.0)
    engine.on_event(protocol.ToolEnd("c", "t1", "build", duration_s=1.0), 108.0)
    engine.on_event(protocol.ToolStart("c", "t2", "search"), 110.0)
    engine.tracker.arrive("c-next", [*prefix.block_hashes, b"more"], Hint(session="s-c", agent="a", node="n"), 140.0)

    assert engine.learned(AGENT, "search") == seen(30.0)
    assert engine.learned(NODE, AFTER_TOOLS) == seen(0.0)


def test_a_call_that_is_extended_raises_the_chance_and_one_that_is_not_lowers_it() -> None:
    engine = Engine()
    hint = Hint(session="s", agent="a", node="n")
    assert engine.tracker.reuse.probability(hint) == 0.5
    prefix = engine.run("c", now=100.0)
    engine.extend(prefix, 120.0)
    assert engine.tracker.reuse.probability(hint) == 0.75
    engine.tracker.give_up(engine.run("d", now=200.0))
    assert engine.tracker.reuse.probability(hint) < 0.75


def test_a_call_that_comes_after_its_prefix_was_given_up_is_learned_from() -> None:
    engine = Engine()
    prefix = engine.run("c", now=100.0, took_s=5.0)
    engine.tracker.give_up(prefix)
    probability = engine.tracker.reuse.probability(prefix.hint)
    assert engine.extend(prefix, 506.0) is None
    assert engine.tracker.reuse.probability(prefix.hint) > probability
    assert engine.learned(AGENT, None) == seen(400.0)


def test_a_prompt_without_the_block_of_its_middle_does_not_extend_a_prefix_that_was_given_up() -> None:
    engine = Engine()
    prefix = engine.run("c", now=100.0, took_s=5.0)
    engine.tracker.give_up(prefix)
    keys = [*blocks("c")[:2], *blocks("x", 3)]
    before = engine.tracker.reuse.probability(prefix.hint)
    engine.begin("other", keys, Hint(session="s-c", agent="a", node="n"), 506.0)
    assert engine.tracker.reuse.probability(prefix.hint) == before


def test_a_call_given_up_learns_the_length_of_its_stall_when_it_comes() -> None:
    engine = Engine()
    hint = Hint(session="s", agent="a", node="n")
    engine.tracker.arrive("c", blocks("c", 5), hint, 100.0)
    found = engine.tracker.finish("c", blocks("c", 5), 106.0)
    assert found is not None
    engine.tracker.give_up(found[0])
    engine.tracker.arrive("d", [b"c2", b"x"], hint, 156.0)

    assert engine.learned(AGENT, None) == seen(50.0)
    engine.tracker.arrive("e", [b"c2", b"x"], hint, 200.0)
    assert engine.learned(AGENT, None) == seen(50.0), "once"


def test_of_many_prefixes_given_up_the_oldest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokencake.time_scheduler.stall_tracker.MAX_PREFIXES", 2)
    engine = Engine()
    for name in ("c", "d", "e"):
        engine.tracker.give_up(engine.run(name, now=100.0))

    assert list(engine.tracker._given_up) == ["s-d", "s-e"]


# --- claims -----------------------------------------------------------------------------------------


def test_a_final_answer_and_a_session_that_is_over_are_claims() -> None:
    engine = Engine()
    assert engine.run("c", now=100.0).claim is None
    assert engine.run("d", now=100.0, reuse="final").claim == "final"
    hint = Hint(session="s", call="e", agent="a")
    engine.begin("e", blocks("e"), hint, 100.0)
    engine.registry.apply(protocol.SessionEnd("s"), 101.0)
    found = engine.tracker.finish("e", blocks("e"), 102.0)
    assert found is not None
    assert found[0].claim == "over"
    engine.tracker.arrive("f", blocks("f"), None, 100.0)
    plain = engine.tracker.finish("f", blocks("f"), 101.0)
    assert plain is not None
    assert plain[0].claim is None


def test_a_claim_is_believed_until_calls_come_after_all() -> None:
    engine = Engine()
    prefix = engine.run("c", now=100.0, reuse="final")
    assert engine.tracker.believed_claim(prefix) == "final"
    assert engine.extend(prefix, 120.0) is prefix
    assert engine.tracker.believed_claim(prefix) is None
    assert engine.tracker.reuse.probability(prefix.hint) == 0.5, (
        "what is extended in spite of a claim says nothing of others"
    )
    assert engine.tracker.believed_claim(engine.run("d", now=100.0)) is None


def test_the_blocks_of_a_dropped_prefix_that_only_it_had_go_first_from_the_tail() -> None:
    engine = Engine()
    hint = Hint(session="s", call="c", agent="a", reuse="final")
    other = Hint(session="t", call="d", agent="a")
    for name, given, keys in (("d", other, [*blocks("k", 2), b"d"]), ("c", hint, blocks("k", 4))):
        engine.begin(name, keys[:1], given, 100.0)
        engine.tracker.finish(name, keys, 101.0)
    prefix = engine.tracker.prefixes.by_id["c"]
    engine.tracker.drop(prefix)

    assert [engine.tracker.dropped.take() for _ in range(3)] == [b"k3", b"k2", None]
    assert "c" not in engine.tracker.prefixes.by_id


def test_a_block_that_another_lifetime_has_used_is_not_given_away_first_though_nobody_wants_it() -> None:
    engine = Engine()
    for name in ("c", "d"):
        hint = Hint(session=name, call=name, agent="a", reuse="final")
        engine.begin(name, [], hint, 100.0)
        engine.tracker.finish(name, [b"shared", name.encode()], 101.0)
    for name in ("c", "d"):
        engine.tracker.drop(engine.tracker.prefixes.by_id[name])

    assert [engine.tracker.dropped.take() for _ in range(3)] == [b"c", b"d", None]


def test_dropping_a_prefix_is_learned_unless_some_of_its_heirs_have_come() -> None:
    engine = Engine()
    prefix = engine.run("c", now=100.0, reuse="final")
    engine.extend(prefix, 120.0)  # refuted
    probability = engine.tracker.reuse.probability(prefix.hint, "final")
    branched = engine.run("d", now=100.0, reuse="final")
    branched.expected_children = 1
    engine.tracker.drop(branched)
    assert engine.tracker.reuse.probability(prefix.hint, "final") == probability

    engine.tracker.drop(engine.run("e", now=100.0, reuse="final"))
    assert engine.tracker.reuse.probability(prefix.hint, "final") < probability
    plain = engine.run("f", now=100.0)
    engine.tracker.drop(plain)
    assert engine.tracker.reuse.probability(plain.hint) == 0.5, "without a claim nothing is learned of it"


def test_the_end_of_a_session_drops_its_stalled_prefixes_where_such_ends_are_believed() -> None:
    engine = Engine()
    engine.run("c", now=100.0)
    engine.begin("c2", blocks("c2"), Hint(session="s-c", agent="a", node="n"), 110.0)
    assert engine.on_event(protocol.SessionEnd("s-c"), 120.0) == ([], ["c"])
    engine.tracker.reuse.refute(role_of(Hint(session="s", agent="a", node="n")), "over")
    engine.run("d", now=100.0)
    assert engine.on_event(protocol.SessionEnd("s-d"), 120.0) == ([], [])
    assert engine.tracker.prefixes.by_id["d"].claim == "over"


def test_the_end_of_an_application_drops_the_prefixes_of_its_own_sessions() -> None:
    engine = Engine()
    engine.run("c", now=100.0, session="app/one", app="app")
    engine.run("d", now=100.0, session="thread", app="app")

    assert engine.on_event(protocol.AppEnd("app"), 120.0) == ([], ["c"])


# --- what is expected -------------------------------------------------------------------------------


def test_a_finished_call_is_expected_back_at_the_median_and_given_up_after_the_late_quantile() -> None:
    engine = Engine()
    hint = Hint(session="s", call="c", agent="a", expects_tools={"t": 100.0})
    engine.begin("c", blocks("c"), hint, 100.0)
    found = engine.tracker.finish("c", blocks("c"), 106.0)
    assert found is not None
    prefix, remaining = found

    assert remaining == Forecast().stall(AGENT, "t", 100.0)
    assert prefix.back_s == pytest.approx(106.0 + remaining.quantile(0.5))
    assert prefix.give_up_s == pytest.approx(106.0 + 4 * remaining.quantile(0.9))


def test_events_change_what_is_expected_and_deadlines_when_it_is_given_up() -> None:
    engine = Engine()
    prefix = engine.run("c", now=100.0)
    assert engine.on_event(protocol.ToolStart("c", "t", "build", 60.0, 500.0), 107.0) == (["c"], [])
    remaining = engine.tracker.reforecast(prefix, 117.0)

    assert remaining == Forecast().stall(AGENT, "build", 60.0).given_elapsed(10.0)
    assert prefix.back_s == pytest.approx(117.0 + remaining.quantile(0.5))
    assert prefix.give_up_s == 617.0
    engine.on_event(protocol.ToolEnd("c", "t"), 120.0)
    assert engine.tracker.reforecast(prefix, 120.0).quantile(0.5) < 1.0


def test_a_prefix_without_a_record_of_its_call_is_expected_back_all_the_same() -> None:
    engine = Engine()
    engine.tracker.arrive("c", blocks("c"), None, 100.0)
    found = engine.tracker.finish("c", blocks("c"), 106.0)
    assert found is not None
    remaining = engine.tracker.reforecast(found[0], 106.0)

    assert found[0].give_up_s == pytest.approx(106.0 + max(60.0, 4 * remaining.quantile(0.9)))


def test_waits_tell_of_the_stalled_prefixes_of_their_session() -> None:
    engine = Engine()
    engine.run("c", now=100.0)
    engine.begin("c2", blocks("c2"), Hint(session="s-c", agent="a"), 106.0)

    assert engine.on_event(protocol.StallStart("s-c", "human"), 107.0) == (["c"], [])
    assert engine.on_event(protocol.StallEnd("s-c", "human"), 108.0) == (["c"], [])
    assert engine.on_event(protocol.Graph("g", {}, ()), 109.0) == ([], [])


def test_only_the_prefix_that_a_call_left_is_stalled_in_its_tools() -> None:
    engine = Engine()
    engine.run("c", now=100.0, session="s")
    engine.run("d", now=110.0, session="s")

    assert [prefix.id for prefix in engine.tracker.stalled_at("d")] == ["d"]
    assert engine.tracker.stalled_at("unknown") == []


@pytest.mark.parametrize(
    ("reuses", "has_open_subagents"),
    [([], False), (["final"], False), (["extends"], True), (["final", "unknown"], True), ([None], True)],
)
def test_a_stall_may_last_while_a_sub_agent_will_call_again(reuses: list[str | None], has_open_subagents: bool) -> None:
    engine = Engine()
    prefix = engine.run("c", now=100.0)
    for number, reuse in enumerate(reuses):
        hint = Hint(session=f"w{number}", agent="w", parent_call="c", reuse=reuse)  # type: ignore[arg-type]
        engine.begin(f"w{number}", blocks(f"w{number}"), hint, 107.0)

    assert engine.tracker.has_open_subagents(prefix) == has_open_subagents


def test_a_call_with_a_slot_runs_from_then_on() -> None:
    engine = Engine()
    engine.begin("c", blocks("c"), Hint(session="s"), 100.0)
    engine.tracker.start("c", 103.0)
    engine.tracker.start("unknown", 103.0)

    assert (engine.tracker.prefixes.by_id["c"].phase, engine.tracker.prefixes.by_id["c"].since_s) == ("running", 103.0)


def test_a_call_that_asks_for_a_dropped_prefix_wakes_it() -> None:
    engine = Engine()
    prefix = engine.run("c", now=100.0, reuse="final")
    engine.tracker.drop(prefix)
    assert engine.tracker.dropped.take() == b"c3"

    assert engine.tracker.wake(blocks("c"), "d", Hint(session="t", agent="b")) == [b"c3"]
    assert engine.tracker.believed_claim(engine.run("e", now=100.0, reuse="final")) is None
    assert engine.tracker.wake(blocks("c"), "d", None) == []
