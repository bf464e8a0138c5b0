"""Requests of two tenants, rewritten by `TenantScope`."""

from __future__ import annotations

import json

from tests.harness.tenancy import TENANTS, prefix_of
from tokencake_proxy.tenants import TenantScope
from tokencake_proxy.upstream import ForwardedRequest

ALICE = [(b"authorization", b"Bearer alice's key")]
BOB = [(b"authorization", b"Bearer bob's key")]
ALICES = prefix_of("alice's key")


def send(body, headers=ALICE, route="chat_completions", target=b"/v1/chat/completions", **options):
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return TenantScope(TENANTS, **options).scoped(ForwardedRequest("POST", target, headers, text), route)


def dict_of(headers):
    return {name.decode(): value.decode() for name, value in headers}
