"""Tenants kept apart: what one client sends is written anew so that it reaches nothing of another's.

A tenant is the holder of one API key. Its prefix comes before every id of a hint, an event or a question, whatever the
client sent, and a mark proves to the engine that the prefix is the proxy's (`tokencake/tenancy.py`). What vLLM itself
looks up by a client's name (request ids, media, cached prefixes) gets a name of the tenant's own; what reaches past the
scheduler (priorities, ranks, KV transfers) is left out. Members of a body that are not concerned keep their bytes.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import replace
from http import HTTPStatus
from math import ceil
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, unquote, urlencode

from tokencake.protocol import HINT_KEY, MARK_KEY, MAX_HINT_BYTES, SCOPED_FIELDS, TooLargeError, check_body_size
from tokencake_proxy.errors import Refusal
from tokencake_proxy.headers import first_value
from tokencake_proxy.json_members import elements_of, inner_of, is_null, joined, members_of, text_of, written
from tokencake_proxy.media import with_own_media
from tokencake_proxy.routes import EVENTS_ROUTE, VIEW_ROUTES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokencake.protocol.tenancy import Tenants
    from tokencake_proxy.asgi import HeaderLine
    from tokencake_proxy.event_budget import EventBudget
    from tokencake_proxy.json_members import Member, Members
    from tokencake_proxy.upstream import Call

_TENANT: Final = "tenant"
"""The parameter of a query by which the engine learns, with proof, who asks."""

_OUT_OF_REACH: Final = ("priority", "data_parallel_rank", "kv_transfer_params", "ec_transfer_params", "kv_hints")
"""Members that choose another's place, engine or KV."""
_LINES_OUT_OF_REACH: Final = (b"x-vllm-priority", b"x-data-parallel-rank", b"endpoint-load-metrics-format")
"""The last asks vLLM for the number of everybody's requests."""

_ARGUMENTS: Final = (("vllm_xargs",), ("sampling_params", "extra_args"))
"""Where a body carries arguments for extensions, the hint among them: OpenAI's and Anthropic's shapes, and vLLM's own.
A hint elsewhere gets no mark, and does not count."""
_RESPONSES: Final = "responses"
_RESPONSE_PATH: Final = re.compile(r"/v1/+responses/+([^/]+).*", re.DOTALL)
_UNSALTED: Final = ("tokenize", "detokenize")
_JSON_TYPES: Final = (b"/json", b"+json")


class TenantScope:
    """How the requests of each tenant are written anew.

    Args:
        tenants: what the secret makes.
        shares_prefixes: whether calls of different tenants may share cached prefixes.
        events: how many each tenant may report; None: any number.
    """

    def __init__(self, tenants: Tenants, *, shares_prefixes: bool = False, events: EventBudget | None = None) -> None:
        self._tenants = tenants
        self._shares_prefixes = shares_prefixes
        self._event_budget = events

    def prefix_of(self, lines: Iterable[HeaderLine]) -> str:
        """The prefix of the tenant that sent these header lines."""
        _, _, key = (first_value(lines, b"authorization") or b"").partition(b" ")
        return self._tenants.prefix(key.rstrip(b" \t"))  # white space after a value is no part of it (RFC 9112, 5)

    def scoped(self, call: Call, route: str) -> Call:
        """`call` in the scope of its sender. Malformed ids, hints and events stay so: the engine says what is wrong.

        Raises:
            Refusal: the body cannot be read or is too long, or the path is the operator's.
        """
        prefix = self.prefix_of(call.lines)
        call = replace(call, lines=self._lines(call.lines, prefix))
        try:
            if route in VIEW_ROUTES:
                return replace(call, target=self._target(call.target, prefix))
            if route == EVENTS_ROUTE:
                return replace(call, target=self._target(call.target, prefix), body=self._events(call.body, prefix))
            self._refuse_path_of_others(call, prefix)
            return replace(call, body=self._body(call, route, prefix)) if call.body else call
        except RecursionError:
            raise Refusal(
                HTTPStatus.BAD_REQUEST, "nesting", "The request's body is nested too deeply to be read."
            ) from None

    # --- the head ---------------------------------------------------------------------------------

    def _lines(self, lines: Iterable[HeaderLine], prefix: str) -> list[HeaderLine]:
        kept: list[HeaderLine] = []
        for name, value in lines:
            text = value.decode("latin-1")
            if name == b"x-session-id":
                kept.append((name, f"{prefix}{text}".encode("latin-1")))
            elif name == b"x-request-id":
                kept.append((name, self._tenants.scoped_name(prefix, text).encode("latin-1")))
            elif name not in _LINES_OUT_OF_REACH:
                kept.append((name, value))
        return kept

    def _target(self, target: bytes, prefix: str) -> bytes:
        path, _, query = target.partition(b"?")
        asked = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
        own = [(name, prefix + value if name in SCOPED_FIELDS else value) for name, value in asked if name != _TENANT]
        return path + b"?" + urlencode([*own, (_TENANT, self._tenants.mark(prefix))]).encode()

    def _refuse_path_of_others(self, call: Call, prefix: str) -> None:
        """Raise Refusal for a path of the operator's, or of a response that another tenant's call has made."""
        path = unquote(call.target.partition(b"?")[0].decode("latin-1"))
        if "/tokencake" in path.lower():
            raise Refusal(HTTPStatus.NOT_FOUND, "not_forwarded", f"{json.dumps(path)} is not a tenant's.")
        if (found := _RESPONSE_PATH.fullmatch(path)) is None or (call.method, found[1]) == ("POST", "render"):
            return
        if not self._tenants.owns_name(prefix, found[1]):
            raise _no_response(found[1])

    # --- the body ---------------------------------------------------------------------------------

    def _events(self, body: bytes, prefix: str) -> bytes:
        try:
            check_body_size(len(body))
        except TooLargeError as error:
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body_too_long", f"{error}.") from None
        try:
            members = members_of(body)
        except ValueError:
            return body
        events = elements_of(members.get("events")) if members is not None else None
        if events is None:
            return body
        wait_s = 0.0 if self._event_budget is None else self._event_budget.take(prefix, len(events))
        if wait_s:
            raise _too_many_events(wait_s)
        return joined({**(members or {}), "events": [_scoped_event(event, prefix) for event in events]})

    def _body(self, call: Call, route: str, prefix: str) -> bytes:
        try:
            members = members_of(call.body)
        except ValueError as error:
            # A form, or what only the engine can judge; a hint in it has no mark.
            if not _is_json(call.lines):
                return call.body
            raise Refusal(
                HTTPStatus.BAD_REQUEST, "bad_json", f"The request's body cannot be read as JSON: {error}."
            ) from None
        if members is None:
            return call.body
        before = dict(members)
        if route == _RESPONSES:
            self._own_response(members, prefix)
        self._keep_within_reach(members, prefix)
        self._scope_arguments(members, prefix)
        with_own_media(members, lambda name: self._tenants.scoped_name(prefix, name))
        if not self._shares_prefixes and route not in _UNSALTED:
            self._salt(members, prefix)
        return call.body if members == before else joined(members)

    def _own_response(self, members: Members, prefix: str) -> None:
        """Give a response that is to be stored an id by which its tenant is known, and let it continue its own only."""
        if is_null(members.get("request_id")):
            members["request_id"] = written(f"resp_{secrets.token_hex(16)}")
        continued = text_of(members.get("previous_response_id"))
        if continued is not None and not self._tenants.owns_name(prefix, continued):
            raise _no_response(continued)

    def _keep_within_reach(self, members: Members, prefix: str) -> None:
        for name in _OUT_OF_REACH:
            members.pop(name, None)
        if (session := text_of(members.get("session_id"))) is not None:
            members["session_id"] = written(prefix + session)
        if (request := text_of(members.get("request_id"))) is not None:
            members["request_id"] = written(self._tenants.scoped_name(prefix, request))

    def _scope_arguments(self, members: Members, prefix: str) -> None:
        for outer, *inner in _ARGUMENTS:
            found = inner_of(members.get(outer))
            arguments = inner_of(found.get(inner[0])) if found is not None and inner else found
            if found is None or arguments is None:
                continue
            before = dict(arguments)
            self._keep_within_reach(arguments, prefix)
            if (hint := text_of(arguments.get(HINT_KEY))) is not None:
                arguments[HINT_KEY] = written(self._hint(hint, prefix))
            if arguments != before:
                members[outer] = written({**found, inner[0]: arguments} if inner else arguments)

    def _hint(self, text: str, prefix: str) -> str:
        """The hint with its mark; one that is too long or cannot be read is void at the engine, too."""
        whole = text.encode(errors="replace")
        try:
            hint = members_of(whole) if len(whole) <= MAX_HINT_BYTES else None
        except ValueError:
            hint = None
        if hint is None:
            return ""
        scoped = _scoped_members(hint, prefix)
        return joined({**scoped, MARK_KEY: written(self._tenants.mark(prefix))}).decode()

    def _salt(self, members: Members, prefix: str) -> None:
        given = members.get("cache_salt")
        own = "" if is_null(given) else text_of(given)
        if own is not None:  # else it is no salt, and the engine says so
            members["cache_salt"] = written(self._tenants.salt(prefix, own))


def _scoped_event(event: Member, prefix: str) -> Member:
    members = inner_of(event)
    return event if members is None else written(_scoped_members(members, prefix))


def _scoped_members(members: Members, prefix: str) -> Members:
    """With the prefix before every id, as the fields' own definitions have it (`protocol.SCOPED_FIELDS`)."""
    scoped = dict(members)
    for name in SCOPED_FIELDS & members.keys():
        if text := text_of(members[name]):
            scoped[name] = written(prefix + text)
        elif (keyed := inner_of(members[name])) is not None:
            scoped[name] = written({prefix + key: value for key, value in keyed.items()})
    return scoped


def _too_many_events(wait_s: float) -> Refusal:
    return Refusal(
        HTTPStatus.TOO_MANY_REQUESTS,
        "too_many_events",
        f"More events than one tenant may report (`tenant_events_per_s`). Send these again in {wait_s:.1f} s.",
        [(b"retry-after", str(ceil(wait_s)).encode())],
    )


def _no_response(name: str) -> Refusal:
    return Refusal(HTTPStatus.NOT_FOUND, "not_found", f"Response with id {json.dumps(name)} not found.")


def _is_json(lines: Iterable[HeaderLine]) -> bool:
    """Whether an engine would read the body as JSON: also where no type is given."""
    kind, _, _ = (first_value(lines, b"content-type") or b"application/json").lower().partition(b";")
    return kind.strip().endswith(_JSON_TYPES)
