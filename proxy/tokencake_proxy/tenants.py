"""How are the clients of one engine kept apart? Every id that a client names begins, at the engine, with its tenant.

A tenant is whoever has one API key; the engine checks the key, the proxy only tells keys apart. The prefix stands
before whatever the client sent, so no client can name another's session, call, application or graph, a `::` of its own
included. The engine shows a tenant its own records only and takes the prefix off again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, urlencode

from tokencake.protocol import HINT_KEY
from tokencake_proxy.errors import Refusal
from tokencake_proxy.headers import first_value
from tokencake_proxy.routes import EVENTS_ROUTE, VIEW_ROUTES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokencake_proxy.asgi import HeaderLine
    from tokencake_proxy.upstream import Call

MARK: Final = "::"
"""What follows the tenant in an id; `space.tenant_mark` of the engine."""

_IDS: Final = ("session", "call", "app", "parent_call", "graph")
_CARRIERS: Final = (("vllm_xargs",), ("sampling_params", "extra_args"))
"""Where a body may carry the hint: OpenAI's and Anthropic's shapes, and vLLM's own `generate`."""


def tenant_of(lines: Iterable[HeaderLine]) -> str:
    """The prefix of the ids of whoever sent these header lines; a hash, because ids are shown and logged."""
    _, _, key = (first_value(lines, b"authorization") or b"").partition(b" ")
    return hashlib.sha256(key).hexdigest()[:12] + MARK


def scoped(call: Call, route: str) -> Call:
    """`call` with its ids in the scope of its sender. What is malformed stays so: the engine says what is wrong.

    Raises:
        Refusal: the body cannot be read because it is nested too deeply.
    """
    try:
        return _scoped(call, route, tenant_of(call.lines))
    except RecursionError:
        raise Refusal(
            HTTPStatus.BAD_REQUEST, "nesting", "The request's body is nested too deeply to be read."
        ) from None


def _scoped(call: Call, route: str, tenant: str) -> Call:
    if route in VIEW_ROUTES:
        return replace(call, target=_scoped_target(call.target, tenant))
    body = _load(call.body)
    if route == EVENTS_ROUTE:
        target = _scoped_target(call.target, tenant)
        events = body.get("events") if isinstance(body, dict) else None
        if not isinstance(events, list):
            return replace(call, target=target)
        for event in events:
            _scope(event, tenant)
        return replace(call, target=target, body=json.dumps(body).encode())
    # Written anew from what was read: a body that two parsers would read in two ways is none any more.
    return replace(call, body=json.dumps(body).encode()) if _scope_hints(body, tenant) else call


def _load(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _scope_hints(body: Any, tenant: str) -> bool:
    """Whether there was a hint."""
    is_found = False
    for path in _CARRIERS:
        carrier = body
        for name in path:
            carrier = carrier.get(name) if isinstance(carrier, dict) else None
        text = carrier.get(HINT_KEY) if isinstance(carrier, dict) else None
        if isinstance(carrier, dict) and isinstance(text, str):
            hint = _load(text.encode(errors="replace"))
            _scope(hint, tenant)
            # A hint that cannot be read is void at the engine, too.
            carrier[HINT_KEY] = json.dumps(hint) if isinstance(hint, dict) else ""
            is_found = True
    return is_found


def _scope(record: Any, tenant: str) -> None:
    if isinstance(record, dict):
        for name in _IDS:
            if isinstance(record.get(name), str) and record[name]:
                record[name] = tenant + record[name]


def _scoped_target(target: bytes, tenant: str) -> bytes:
    path, _, query = target.partition(b"?")
    asked = [
        (name, value) for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True) if name != "tenant"
    ]
    own = [(name, tenant + value if name in _IDS else value) for name, value in asked]
    return path + b"?" + urlencode([*own, ("tenant", tenant)]).encode()
