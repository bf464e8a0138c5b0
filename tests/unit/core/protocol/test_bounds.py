"""Every bound of the contract, on both of its sides."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tokencake import protocol
from tokencake.front_end import RUST_FRONT_END, front_end_problem
from tokencake.protocol import Hint, ProtocolError, TooLargeError, UnmarkedError, parsing
from tokencake.settings import MeasureSettings, SettingsError, section


@pytest.mark.parametrize(
    ("parser", "taken", "refused"),
    [
        (parsing.text(3), ["a", "abc", "äöü"], ["", "abcd", 1, None, "a\ud800", "\udfff"]),
        (parsing.text(), ["x" * 256], ["x" * 257]),
        (parsing.number(1, 3), [1, 3, 2.5, 1.0], [0.999, 3.001, True, "2", None, float("nan")]),
        (parsing.number(0, 3), [0], [False]),
        (parsing.count(5), [0, 5], [-1, 6, 1.0, True, "1"]),
        (parsing.count(), [1_000_000], [1_000_001]),
        (parsing.flag, [True, False], [0, 1, "true", None]),
        (parsing.one_of("a", "b"), ["a", "b"], ["c", "", None]),
        (parsing.list_of(parsing.flag, 2), [[], [True, False]], [[True] * 3, (True,), {}, [1]]),
        (parsing.edge, [["a", "b"]], [["a"], ["a", "b", "c"], ("a", "b"), ["a", 1], [1, "b"]]),
        (parsing.object_of(parsing.flag, 2), [{}, {"a": True, "b": True}], [{"a": 1}, dict.fromkeys("abc", True), []]),
        (parsing.object_of(parsing.flag, 2), [], [{"": True}]),
        (
            parsing.estimates,
            [{}, {"t": None}, {"t": 0}, {f"{n}": 1.5 for n in range(128)}, {"t": 30 * 86_400.0}],
            [{f"{n}": None for n in range(129)}, [], {"t": -1}, {"": 1}, {"t": 30 * 86_400.0 + 1}],
        ),
        (parsing.scalar, ["a", 1, 0.5, True, -1e15, 1e15], [1.1e15, -1.1e15, None, [], "x" * 257]),
        (parsing.SECONDS, [0, 30 * 86_400.0], [-0.001, 30 * 86_400.0 + 1]),
        (parsing.AGO, [0, 3_600], [-0.001, 3_600.1]),
    ],
)
def test_a_value_at_its_bound_is_taken_and_one_beyond_it_refused(
    parser: parsing.Parser, taken: list[Any], refused: list[Any]
) -> None:
    for value in taken:
        found = parser("here", value)
        assert list(found) == value if isinstance(found, tuple) else found == value
    for value in refused:
        with pytest.raises(ProtocolError, match="here"):
            parser("here", value)


def test_a_number_becomes_a_float_and_a_boolean_stays_one() -> None:
    assert type(parsing.number(0, 5)("here", 3)) is float
    assert parsing.scalar("here", True) is True
    assert parsing.scalar("here", False) is False
    assert type(parsing.scalar("here", 1)) is float


def test_the_error_names_the_part_that_is_wrong() -> None:
    for parser, value, where in (
        (parsing.list_of(parsing.flag, 3), [True, 1], "here[1]"),
        (parsing.edge, ["a", 1], "here[1]"),
        (parsing.edge, [1, "a"], "here[0]"),
        (parsing.object_of(parsing.flag, 3), {"a": 1}, "here.'a'"),
        (parsing.object_of(parsing.flag, 3), {"": 1}, "here key"),
        (parsing.estimates, {"t": "x"}, "here.'t'"),
    ):
        with pytest.raises(ProtocolError) as caught:
            parser("here", value)
        assert caught.value.field == where


def test_a_record_takes_null_for_absent_and_misses_what_is_required() -> None:
    assert parsing.parse_record(Hint, "h", {"session": "s", "depth": None, "unknown": 1}) == Hint(session="s")
    for raw in ({}, {"session": None}):
        with pytest.raises(ProtocolError, match=r"h\.session is missing"):
            parsing.parse_record(Hint, "h", raw)
    with pytest.raises(ProtocolError, match="expected an object"):
        parsing.parse_record(Hint, "h", [])


def test_ids_are_scoped_and_unscoped_again_with_empty_ones_left_alone() -> None:
    graph = protocol.Graph("g", {"a": {}}, (), {"j": ("a",)})
    scoped = protocol.scoped(graph, "t::")
    assert (scoped.graph, scoped.joins, scoped.tenant) == ("t::g", {"t::j": ("a",)}, "t::")
    assert protocol.scoped(graph, "") is graph
    assert protocol.scoped(protocol.SessionEnd("s"), "t::") == protocol.SessionEnd("t::s")
    assert protocol.scoped(Hint(session="s"), "t::").call is None

    raw = {"graph": "t::g", "joins": {"t::j": ["a"]}, "nodes": {"a": {}}, "other": 1, "call": ""}
    names = ("graph", "joins", "call", "absent")
    assert parsing.unscoped(raw, "t::", names, "here") == {**raw, "graph": "g", "joins": {"j": ["a"]}}
    assert parsing.unscoped(raw, "", names, "here") is raw
    assert parsing.unscoped([1], "t::", names, "here") == [1]
    for wrong in ({"graph": "g"}, {"joins": {"j": []}}):
        with pytest.raises(UnmarkedError):
            parsing.unscoped(wrong, "t::", names, "here")


def hint_of(size: int) -> str:
    """A hint of this many bytes."""
    empty = json.dumps({"session": "s", "unknown": ""})
    return json.dumps({"session": "s", "unknown": "x" * (size - len(empty))})


def test_a_hint_has_16_kib_at_most_in_bytes_and_not_in_characters() -> None:
    assert protocol.parse_hint(hint_of(16_384)) == Hint(session="s")
    with pytest.raises(TooLargeError):
        protocol.parse_hint(hint_of(16_385))
    wide = hint_of(16_000).replace("xx", "\u00fc\u00fc")
    assert len(wide) == 16_000
    with pytest.raises(TooLargeError):
        protocol.parse_hint(wide)


def test_a_body_has_a_bounded_length_and_number_of_events() -> None:
    protocol.check_body_size(262_144)
    protocol.check_body_size(4 * 262_144, is_scoped=True)
    for size, is_scoped in ((262_145, False), (4 * 262_144 + 1, True)):
        with pytest.raises(TooLargeError):
            protocol.check_body_size(size, is_scoped=is_scoped)

    def body(count: int) -> bytes:
        return json.dumps({"events": [{}] * count}).encode()

    assert len(protocol.parse_events(body(1_000))) == 1_000
    with pytest.raises(TooLargeError):
        protocol.parse_events(body(1_001))
    with pytest.raises(TooLargeError):
        protocol.parse_events(b" " * 262_145)


@pytest.mark.parametrize("raw", [None, [], {}, {"type": None}, {"type": "other"}, {"type": ["graph"]}])
def test_an_event_is_an_object_of_a_known_type(raw: object) -> None:
    with pytest.raises(ProtocolError, match="event"):
        protocol.parse_event(raw)


def test_stages_are_bounded_and_go_over_the_wire_as_objects() -> None:
    def start(count: int) -> dict[str, Any]:
        return {"type": "tool_start", "call": "c", "tool_call": "t", "tool": "x", "stages": [{"name": "s"}] * count}

    event = protocol.parse_event(start(32))
    assert protocol.to_wire(event)["stages"] == [{"name": "s"}] * 32
    with pytest.raises(ProtocolError, match="32"):
        protocol.parse_event(start(33))


@pytest.mark.parametrize(
    ("config", "steps"), [({}, 0), (None, 0), ("text", 0), ({"tokencake": {"measure": {"steps": 5}}}, 5)]
)
def test_a_section_says_what_is_not_the_default(config: object, steps: int) -> None:
    assert section(config, "measure", MeasureSettings).steps == steps


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ([], "expected an object"),
        ({"other": {}}, "tokencake.other is not known; the sections are measure, registry, space, time"),
        ({"measure": {"step": 1}}, "tokencake.measure.step is not known; the settings are steps"),
        ({"measure": []}, "tokencake.measure is"),
        ({"measure": {"steps": 100_001}}, "tokencake.measure.steps is 100001"),
    ],
)
def test_a_section_that_cannot_be_used_is_refused_with_its_name(config: object, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        section({"tokencake": config}, "measure", MeasureSettings)


@pytest.mark.parametrize(("value", "is_problem"), [(None, False), ("", False), (" 0 ", False), ("1", True)])
def test_the_front_end_without_routes_is_a_problem_where_it_is_switched_on(value: str | None, is_problem: bool) -> None:
    environ = {} if value is None else {RUST_FRONT_END: value}

    assert (front_end_problem(environ) is not None) == is_problem
