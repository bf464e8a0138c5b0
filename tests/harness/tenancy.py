"""What a proxy that keeps tenants apart would send, with a secret that the tests know."""

from __future__ import annotations

import json
from typing import Final

from tokencake import protocol
from tokencake.protocol import Hint
from tokencake.protocol.tenancy import Tenants

SECRET: Final = "the secret of the tests"
TENANTS: Final = Tenants(SECRET.encode())


def prefix_of(tenant: str) -> str:
    """The prefix of the tenant with this API key."""
    return TENANTS.prefix(tenant.encode())


def mark_of(tenant: str) -> str:
    """The proof of its prefix."""
    return TENANTS.mark(prefix_of(tenant))


def marked(hint: Hint, tenant: str) -> str:
    """The value of `vllm_xargs["tokencake"]` behind the proxy."""
    wire = protocol.to_wire(protocol.scoped(hint, prefix_of(tenant)))
    return json.dumps({"v": protocol.VERSION, **wire, protocol.MARK_KEY: mark_of(tenant)})


def parsed(hint: Hint, tenant: str) -> Hint:
    """The hint as the engine reads it."""
    return protocol.parse_hint(marked(hint, tenant), TENANTS)
