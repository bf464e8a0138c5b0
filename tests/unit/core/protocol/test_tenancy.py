"""Prefixes, marks and salts of tenants, the scoped fields of the contract, and a mapping that tenants share fairly."""

import json
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.tenancy import TENANTS, mark_of, marked, prefix_of
from tokencake import protocol
from tokencake.forecast.fair_lru import FairLRU
from tokencake.protocol import (
    Hint,
    ProtocolError,
    TooLargeError,
    UnmarkedError,
    messages,
    parse_events,
    parse_hint,
    parsing,
)
from tokencake.protocol.tenancy import SecretError, Tenants, checked_secret, default_secret_file

ALICE = prefix_of("alice")
RECORDS = (Hint, *messages._EVENTS.values())

NAMES = {"agent", "node", "tool", "kind", "stage", "status", "reuse"}
"""Text that is no id: nothing is looked up by it but inside a record that its ids have found."""
OF_ITS_CALL = {"tool_call", "parent_tool_call"}
"""Ids that are looked up inside the one call that `call` or `parent_call` names."""


# --- marks ------------------------------------------------------------------------------------------


def test_a_mark_proves_its_prefix_and_nothing_else_does() -> None:
    assert TENANTS.prefix_from_mark(mark_of("alice")) == ALICE
    forged = [
        None,
        7,
        "",
        ALICE,
        "x" * 60,
        ALICE + "0" * 32,
        mark_of("alice")[:-1] + "g",
        prefix_of("bob") + mark_of("alice")[-32:],
        "é" * 40,
        "\ud800" * 40,
    ]
    for mark in forged:
        assert TENANTS.prefix_from_mark(mark) is None


def test_a_mark_of_another_secret_is_not_valid() -> None:
    other = Tenants(b"another secret of others")
    assert other.prefix_from_mark(mark_of("alice")) is None
    assert other.prefix_from_salt(TENANTS.salt(ALICE)) is None
    assert other.prefix(b"alice") != ALICE


@given(st.text(max_size=200))
def test_no_invented_text_is_a_mark_or_a_salt(text: str) -> None:
    assert TENANTS.prefix_from_mark(text) is None
    assert TENANTS.prefix_from_salt(text) is None


def test_a_salt_identifies_its_tenant() -> None:
    assert TENANTS.prefix_from_salt(TENANTS.salt(ALICE, "mine")) == ALICE
    for salt in (None, "", ".", ALICE, TENANTS.salt(ALICE)[:-1], TENANTS.salt(ALICE).replace(".", "..", 1)):
        assert TENANTS.prefix_from_salt(salt) is None


def test_scoped_names_of_tenants_differ() -> None:
    assert TENANTS.scoped_name(ALICE, "r") != TENANTS.scoped_name(prefix_of("bob"), "r")
    assert TENANTS.scoped_name(ALICE, "r") == TENANTS.scoped_name(ALICE, "r")


def test_a_short_secret_is_refused_with_the_way_out() -> None:
    assert checked_secret(" 0123456789abcdef\n", "here") == b"0123456789abcdef"
    with pytest.raises(SecretError, match="`VARIABLE` holds 3 characters; expected a secret of at least 16"):
        checked_secret("abc", "`VARIABLE`")


def test_the_default_secret_file_is_in_the_state_directory() -> None:
    assert default_secret_file({}, "/home/me") == "/home/me/.local/state/tokencake/tenant-secret"
    assert default_secret_file({"XDG_STATE_HOME": "/state"}, "/home/me") == "/state/tokencake/tenant-secret"


# --- the contract -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_every_text_field_of_the_contract_is_scoped_or_listed_as_no_id(kind: type) -> None:
    """A new field of text fails here until its definition says `scoped=True`, or this page that it is no id."""
    texts = {
        field.name
        for field in fields(kind)  # type: ignore[arg-type]
        if "parse" in field.metadata and ("str" in str(field.type) or "Literal" in str(field.type))
    }
    keyed = {"expects_tools", "nodes", "edges"}  # tools, and nodes of the graph that has them
    assert texts - keyed <= set(parsing.scoped_fields(kind)) | NAMES | OF_ITS_CALL


def test_what_the_proxy_scopes_comes_from_the_definitions() -> None:
    assert {"session", "call", "app", "graph", "parent_call", "join", "joins"} == protocol.SCOPED_FIELDS


def test_a_scoped_hint_is_the_clients_with_the_prefix_before_its_ids() -> None:
    hint = Hint(session="s", call="c", app="a", graph="g", parent_call="p", join="j", agent="writer", node="n")

    parsed = parse_hint(marked(hint, "alice"), TENANTS)

    assert parsed == protocol.scoped(hint, ALICE)
    assert {name: getattr(parsed, name) for name in parsing.scoped_fields(Hint)} == {
        name: ALICE + getattr(hint, name) for name in parsing.scoped_fields(Hint)
    }
    assert (parsed.tenant, parsed.agent, parsed.node) == (ALICE, "writer", "n")


def hint_json(**fields: object) -> str:
    return json.dumps({"session": ALICE + "s", "mark": mark_of("alice"), **fields})


@pytest.mark.parametrize(
    "text",
    [
        '{"session": "s"}',
        hint_json(mark=None),
        hint_json(mark=ALICE),
        hint_json(mark=mark_of("bob")),
        hint_json(session="s"),
        hint_json(session=prefix_of("bob") + "s"),
        hint_json(call="c"),
        hint_json(parent_call=prefix_of("bob") + "c"),
        hint_json(mark={"x": 1}),
    ],
)
def test_a_hint_is_accepted_only_with_a_mark_whose_prefix_is_in_all_its_ids(text: str) -> None:
    assert parse_hint(hint_json(), TENANTS).session == ALICE + "s"
    with pytest.raises(UnmarkedError):
        parse_hint(text, TENANTS)


def test_without_tenants_a_mark_is_an_unknown_field() -> None:
    assert parse_hint(hint_json()) == Hint(session=ALICE + "s")


def test_limits_apply_to_the_clients_own_ids() -> None:
    longest = "x" * protocol.MAX_ID_CHARS
    assert parse_hint(hint_json(session=ALICE + longest), TENANTS).session == ALICE + longest
    with pytest.raises(ProtocolError, match=r"hint\.session is 'xxx"):
        parse_hint(hint_json(session=ALICE + longest + "x"), TENANTS)
    with pytest.raises(ProtocolError, match=r"hint\.session is ''"):
        parse_hint(hint_json(session=ALICE), TENANTS)
    with pytest.raises(TooLargeError):
        parse_hint(hint_json(agent="x" * 20_000), TENANTS)


def test_an_event_without_the_prefix_is_invalid_and_the_others_are_applied() -> None:
    events = [{"type": "session_end", "session": name} for name in (ALICE + "s", "s", prefix_of("bob") + "s", "")]
    found = parse_events(json.dumps({"events": events}).encode(), ALICE)
    assert found[0] == protocol.SessionEnd("s")
    assert [type(event) for event in found[1:]] == [UnmarkedError, UnmarkedError, ProtocolError]


# --- bounds -----------------------------------------------------------------------------------------


def test_a_full_mapping_drops_an_entry_of_the_largest_owner() -> None:
    kept: FairLRU[str, int] = FairLRU(4)
    kept.put("mine", 0, "alice")
    for number in range(10):
        kept.put(f"bob{number}", number, "bob")
    assert list(kept) == ["mine", "bob7", "bob8", "bob9"]
    assert (kept.count("alice"), kept.count("bob"), kept.count("carol")) == (1, 3, 0)


def test_with_one_owner_it_is_an_lru() -> None:
    kept: FairLRU[str, int] = FairLRU(2)
    kept.put("a", 1)
    kept.put("b", 2)
    assert kept.put("a", 3) == []
    assert kept.put("c", 4) == [("b", 2)]
    assert list(kept.items()) == [("a", 3), ("c", 4)]
    assert (kept.get("a"), kept.get("b"), kept.pop("b")) == (3, None, None)


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from("abc"), st.booleans()), max_size=200))
def test_no_owner_below_its_share_loses_an_entry(deeds: list[tuple[int, str, bool]]) -> None:
    kept: FairLRU[tuple[str, int], None] = FairLRU(9)
    for number, owner, is_put in deeds:
        if is_put:
            for (other, _), _ in kept.put((owner, number), None, owner):
                assert kept.count(other) >= 3
        else:
            kept.pop((owner, number))
        assert len(kept) == sum(kept.count(each) for each in "abc") <= 9
