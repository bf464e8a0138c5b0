"""Tenant isolation: the proxy rewrites requests so that no client can reach another tenant's data.

A tenant is the holder of one API key. The proxy puts the tenant's prefix before every id of a hint, an event or a
query, whatever the client sent, and adds a mark that proves to the engine that the prefix is the proxy's
(`tokencake/protocol/tenancy.py`). Names by which vLLM itself looks something up (request ids, media, cached prefixes)
become unique to the tenant. Members that bypass the scheduler (priorities, ranks, KV transfers) are removed. The other
members of a body keep their bytes.
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
from tokencake_proxy.dialects import HINT_PATHS, OPENAI_RESPONSES
from tokencake_proxy.errors import Refusal
from tokencake_proxy.headers import first_value
from tokencake_proxy.media import scope_media_names
from tokencake_proxy.raw_json import (
    array_or_none,
    is_null,
    object_or_none,
    parse_members,
    string_or_none,
    to_json,
    to_raw,
)
from tokencake_proxy.routes import EVENTS_ROUTE, VIEW_ROUTES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokencake.protocol.tenancy import Tenants
    from tokencake_proxy.asgi import Header
    from tokencake_proxy.event_budget import EventBudget
    from tokencake_proxy.raw_json import RawJson, RawMembers
    from tokencake_proxy.upstream import ForwardedRequest

_TENANT: Final = "tenant"
"""The query parameter that holds the tenant's mark."""

_REMOVED_MEMBERS: Final = ("priority", "data_parallel_rank", "kv_transfer_params", "ec_transfer_params", "kv_hints")
"""Members of a body that choose a position in the queue, an engine or a KV transfer."""
_REMOVED_HEADERS: Final = (b"x-vllm-priority", b"x-data-parallel-rank", b"endpoint-load-metrics-format")
"""The last one asks vLLM for the number of requests of all clients."""

_RESPONSE_PATH: Final = re.compile(r"/v1/+responses/+([^/]+).*", re.DOTALL)
_UNSALTED: Final = ("tokenize", "detokenize")
_JSON_TYPES: Final = (b"/json", b"+json")


class TenantScope:
    """Rewrites the requests of each tenant.

    Args:
        tenants: derives prefixes, marks and salts from the secret.
        shares_prefixes: whether requests of different tenants may share cached prefixes.
        events: the rate limit on events; None for no limit.
    """

    def __init__(self, tenants: Tenants, *, shares_prefixes: bool = False, events: EventBudget | None = None) -> None:
        self._tenants = tenants
        self._shares_prefixes = shares_prefixes
        self._event_budget = events

    def prefix_of(self, headers: Iterable[Header]) -> str:
        """The prefix of the tenant that sent these `headers`."""
        _, _, key = (first_value(headers, b"authorization") or b"").partition(b" ")
        return self._tenants.prefix(key.rstrip(b" \t"))  # trailing white space is not part of a value (RFC 9112, 5)

    def scoped(self, request: ForwardedRequest, route: str) -> ForwardedRequest:
        """`request` limited to its tenant's data. Malformed ids, hints and events stay so: the engine reports them.

        Raises:
            Refusal: the body cannot be read or is too long, or the path is not for tenants.
        """
        prefix = self.prefix_of(request.headers)
        request = replace(request, headers=self._scope_headers(request.headers, prefix))
        try:
            if route in VIEW_ROUTES:
                return replace(request, target=self._scope_query(request.target, prefix))
            if route == EVENTS_ROUTE:
                target = self._scope_query(request.target, prefix)
                return replace(request, target=target, body=self._scope_events(request.body, prefix))
            self._check_path(request, prefix)
            return replace(request, body=self._scope_body(request, route, prefix)) if request.body else request
        except RecursionError:
            raise Refusal(
                HTTPStatus.BAD_REQUEST, "nesting", "The request's body is nested too deeply to be read."
            ) from None

    # --- the head ---------------------------------------------------------------------------------

    def _scope_headers(self, headers: Iterable[Header], prefix: str) -> list[Header]:
        kept: list[Header] = []
        for name, value in headers:
            text = value.decode("latin-1")
            if name == b"x-session-id":
                kept.append((name, f"{prefix}{text}".encode("latin-1")))
            elif name == b"x-request-id":
                kept.append((name, self._tenants.scoped_name(prefix, text).encode("latin-1")))
            elif name not in _REMOVED_HEADERS:
                kept.append((name, value))
        return kept

    def _scope_query(self, target: bytes, prefix: str) -> bytes:
        path, _, query = target.partition(b"?")
        given = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
        own = [(name, prefix + value if name in SCOPED_FIELDS else value) for name, value in given if name != _TENANT]
        return path + b"?" + urlencode([*own, (_TENANT, self._tenants.mark(prefix))]).encode()

    def _check_path(self, request: ForwardedRequest, prefix: str) -> None:
        """Raise Refusal for a path of the operator, and for a stored response of another tenant."""
        path = unquote(request.target.partition(b"?")[0].decode("latin-1"))
        if "/tokencake" in path.lower():
            raise Refusal(HTTPStatus.NOT_FOUND, "not_forwarded", f"{json.dumps(path)} is not available to tenants.")
        if (found := _RESPONSE_PATH.fullmatch(path)) is None or (request.method, found[1]) == ("POST", "render"):
            return
        if not self._tenants.owns_name(prefix, found[1]):
            raise _no_response(found[1])

    # --- the body ---------------------------------------------------------------------------------

    def _scope_events(self, body: bytes, prefix: str) -> bytes:
        try:
            check_body_size(len(body))
        except TooLargeError as error:
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body_too_long", f"{error}.") from None
        try:
            members = parse_members(body)
        except ValueError:
            return body
        events = array_or_none(members.get("events")) if members is not None else None
        if events is None:
            return body
        wait_s = 0.0 if self._event_budget is None else self._event_budget.take(prefix, len(events))
        if wait_s:
            raise _too_many_events(wait_s)
        return to_json({**(members or {}), "events": [_scoped_event(event, prefix) for event in events]})

    def _scope_body(self, request: ForwardedRequest, route: str, prefix: str) -> bytes:
        try:
            members = parse_members(request.body)
        except ValueError as error:
            # A form, or another format that the engine reads; a hint in it has no mark.
            if not _is_json(request.headers):
                return request.body
            raise Refusal(
                HTTPStatus.BAD_REQUEST, "bad_json", f"The request's body cannot be read as JSON: {error}."
            ) from None
        if members is None:
            return request.body
        before = dict(members)
        if route == OPENAI_RESPONSES.name:
            self._scope_stored_response(members, prefix)
        self._scope_members(members, prefix)
        self._scope_arguments(members, prefix)
        scope_media_names(members, lambda name: self._tenants.scoped_name(prefix, name))
        if not self._shares_prefixes and route not in _UNSALTED:
            self._salt(members, prefix)
        return request.body if members == before else to_json(members)

    def _scope_stored_response(self, members: RawMembers, prefix: str) -> None:
        """Give the response an id that identifies its tenant, and refuse to continue another tenant's response."""
        if is_null(members.get("request_id")):
            members["request_id"] = to_raw(f"resp_{secrets.token_hex(16)}")
        continued = string_or_none(members.get("previous_response_id"))
        if continued is not None and not self._tenants.owns_name(prefix, continued):
            raise _no_response(continued)

    def _scope_members(self, members: RawMembers, prefix: str) -> None:
        """Remove members that bypass the scheduler, and scope the ids among the others."""
        for name in _REMOVED_MEMBERS:
            members.pop(name, None)
        if (session := string_or_none(members.get("session_id"))) is not None:
            members["session_id"] = to_raw(prefix + session)
        if (request := string_or_none(members.get("request_id"))) is not None:
            members["request_id"] = to_raw(self._tenants.scoped_name(prefix, request))

    def _scope_arguments(self, members: RawMembers, prefix: str) -> None:
        """Scope the extension arguments in every place where some dialect has them, the hint among them."""
        for outer, *inner in HINT_PATHS:
            found = object_or_none(members.get(outer))
            arguments = object_or_none(found.get(inner[0])) if found is not None and inner else found
            if found is None or arguments is None:
                continue
            before = dict(arguments)
            self._scope_members(arguments, prefix)
            if (hint := string_or_none(arguments.get(HINT_KEY))) is not None:
                arguments[HINT_KEY] = to_raw(self._scope_hint(hint, prefix))
            if arguments != before:
                members[outer] = to_raw({**found, inner[0]: arguments} if inner else arguments)

    def _scope_hint(self, text: str, prefix: str) -> str:
        """The scoped hint with its mark; empty if it is too long or not readable, which is void at the engine too."""
        whole = text.encode(errors="replace")
        try:
            hint = parse_members(whole) if len(whole) <= MAX_HINT_BYTES else None
        except ValueError:
            hint = None
        if hint is None:
            return ""
        scoped = _scoped_members(hint, prefix)
        return to_json({**scoped, MARK_KEY: to_raw(self._tenants.mark(prefix))}).decode()

    def _salt(self, members: RawMembers, prefix: str) -> None:
        given = members.get("cache_salt")
        own = "" if is_null(given) else string_or_none(given)
        if own is not None:  # else it is not a valid salt, and the engine reports that
            members["cache_salt"] = to_raw(self._tenants.salt(prefix, own))


def _scoped_event(event: RawJson, prefix: str) -> RawJson:
    members = object_or_none(event)
    return event if members is None else to_raw(_scoped_members(members, prefix))


def _scoped_members(members: RawMembers, prefix: str) -> RawMembers:
    """`members` with the prefix before every id. The definitions of the fields say which are ids (`SCOPED_FIELDS`)."""
    scoped = dict(members)
    for name in SCOPED_FIELDS & members.keys():
        if text := string_or_none(members[name]):
            scoped[name] = to_raw(prefix + text)
        elif (keyed := object_or_none(members[name])) is not None:
            scoped[name] = to_raw({prefix + key: value for key, value in keyed.items()})
    return scoped


def _too_many_events(wait_s: float) -> Refusal:
    return Refusal(
        HTTPStatus.TOO_MANY_REQUESTS,
        "too_many_events",
        f"This tenant reports more events than it may (`tenant_events_per_s`). Send these again in {wait_s:.1f} s.",
        [(b"retry-after", str(ceil(wait_s)).encode())],
    )


def _no_response(name: str) -> Refusal:
    return Refusal(HTTPStatus.NOT_FOUND, "not_found", f"Response with id {json.dumps(name)} not found.")


def _is_json(headers: Iterable[Header]) -> bool:
    """Whether an engine would read the body as JSON. It does so without a content type, too."""
    kind, _, _ = (first_value(headers, b"content-type") or b"application/json").lower().partition(b";")
    return kind.strip().endswith(_JSON_TYPES)
