import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tokencake import protocol
from tokencake.protocol import Hint, ProtocolError, TooLargeError, parse_event, parse_events, parse_hint

FULL = Hint(
    session="thread-1/programmer",
    call="run-1",
    app="root-1",
    app_started_ago_s=12.5,
    agent="programmer",
    graph="abc",
    node="model",
    parent_call="run-0",
    parent_tool_call="call_1",
    depth=2,
    remaining=3,
    max_depth=5,
    out_degree=1,
    fan_out=3,
    fan_index=0,
    join="review",
    critical=True,
    importance=4.0,
    expects_tools={"search": 4.0, "run_tests": None},
    reuse="extends",
    expected_output_tokens=200,
)


def body(*events: object) -> bytes:
    return json.dumps({"v": 1, "events": list(events)}).encode()


def test_a_hint_round_trips() -> None:
    assert parse_hint(FULL.to_json()) == FULL


def test_a_hint_needs_nothing_but_its_session() -> None:
    assert parse_hint('{"session": "s"}') == Hint(session="s")


def test_unknown_fields_of_a_hint_are_ignored() -> None:
    assert parse_hint('{"session": "s", "from_the_future": [1]}') == Hint(session="s")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (7, "hint is 7"),
        ("{", "hint is not JSON"),
        ("[]", "hint is []"),
        ("{}", "hint.session is missing"),
        ('{"session": ""}', "hint.session is ''"),
        ('{"session": 7}', "hint.session is 7"),
        ('{"session": "\\ud800"}', "hint.session"),
        ('{"session": "s", "v": 2}', "hint.v is 2"),
        ('{"session": "s", "depth": -1}', "hint.depth is -1"),
        ('{"session": "s", "depth": true}', "hint.depth is True"),
        ('{"session": "s", "depth": 1.5}', "hint.depth is 1.5"),
        ('{"session": "s", "critical": 1}', "hint.critical is 1"),
        ('{"session": "s", "importance": 11}', "hint.importance is 11"),
        ('{"session": "s", "importance": NaN}', "hint holds NaN"),
        ('{"session": "s", "app_started_ago_s": 1e400}', "hint.app_started_ago_s is inf"),
        ('{"session": "s", "reuse": "maybe"}', "hint.reuse is 'maybe'; expected one of extends, final, unknown"),
        ('{"session": "s", "expects_tools": ["a"]}', "hint.expects_tools"),
        ('{"session": "s", "expects_tools": {"a": -1}}', "hint.expects_tools.'a' is -1"),
        ("[" * 10_000, "hint"),
        ("9" * 5_000, "hint is not JSON"),
    ],
)
def test_a_malformed_hint_is_void_and_the_error_names_the_field(text: object, named: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_hint(text)
    assert str(caught.value).startswith(named)


def test_a_hint_of_a_megabyte_is_void() -> None:
    with pytest.raises(TooLargeError, match="more than 16384 bytes"):
        parse_hint(json.dumps({"session": "s", "agent": "x" * 1_000_000}))


def test_the_error_about_a_huge_value_is_short() -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_hint(json.dumps({"session": "s", "agent": ["x" * 100] * 100}))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "event",
    [
        protocol.ToolStart("c", "t", "search", 1.5, 30.0, (protocol.Stage("query", 0.5), protocol.Stage("rank"))),
        protocol.ToolProgress("c", "t", fraction=0.5, ago_s=0.25),
        protocol.ToolEnd("c", "t", "search", "error", 2.0),
        protocol.StallStart("s", "human"),
        protocol.StallEnd("s", "human"),
        protocol.SessionEnd("s"),
        protocol.AppEnd("a", "cancelled"),
        protocol.Graph("g", {"a": {"kind": "llm"}, "b": {}}, (("a", "b"),), {"b": ("a",)}),
    ],
)
def test_every_event_round_trips(event: protocol.Event) -> None:
    assert parse_event(json.loads(json.dumps(protocol.to_wire(event)))) == event


def test_a_malformed_event_does_not_affect_the_others() -> None:
    first, second, third = parse_events(
        body(
            {"type": "session_end", "session": "s"}, {"type": "tool_end", "call": "c"}, {"type": "app_end", "app": "a"}
        )
    )
    assert first == protocol.SessionEnd("s")
    assert isinstance(second, ProtocolError)
    assert str(second) == "events[1].tool_call is missing"
    assert third == protocol.AppEnd("a")


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b"", "body is not JSON"),
        (b"\xff", "body is not UTF-8"),
        (b"[]", "body is []"),
        (b"{}", "body.events is None"),
        (b'{"v": 9, "events": []}', "body.v is 9"),
    ],
)
def test_an_unusable_body_is_refused_with_the_reason(raw: bytes, named: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_events(raw)
    assert str(caught.value).startswith(named)


def test_ten_thousand_events_in_one_body_are_refused() -> None:
    with pytest.raises(TooLargeError, match="10000 events; at most 1000"):
        parse_events(body(*[{}] * 10_000))


@pytest.mark.parametrize("value", [10**30, "\ud800", {"deep": 1}, [1]])
def test_a_graph_holds_plain_values_only(value: object) -> None:
    event = {"type": "graph", "graph": "g", "nodes": {"a": {"x": value}}, "edges": []}
    (parsed,) = parse_events(json.dumps({"events": [event]}).encode())
    assert isinstance(parsed, ProtocolError)
    assert parsed.field == "events[0].nodes.'a'.'x'"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(fields=st.dictionaries(st.sampled_from([name for name, *_ in protocol.parsing.parsers(Hint)]), json_values))
def test_any_hint_is_parsed_or_refused(fields: dict[str, object]) -> None:
    try:
        hint = parse_hint(json.dumps(fields))
    except ProtocolError:
        return
    assert hint.importance is None or math.isfinite(hint.importance)
    assert parse_hint(hint.to_json()) == hint


@given(event=st.dictionaries(st.sampled_from(["type", "call", "tool_call", "tool", "stages", "ago_s"]), json_values))
@example(event={"call": math.inf})
def test_any_event_is_parsed_or_refused(event: dict[str, object]) -> None:
    for kind in ("tool_start", "tool_end", "graph"):
        text = json.dumps({"events": [{**event, "type": kind}]}).encode("utf-8", "surrogatepass")
        try:
            (parsed,) = parse_events(text)
        except ProtocolError:  # Python wrote NaN or Infinity: that is no JSON, and all of it is refused
            continue
        assert isinstance(parsed, ProtocolError) or parsed.type == kind
