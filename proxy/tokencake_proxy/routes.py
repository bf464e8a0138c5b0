"""The allow-list of routes that reach the engine, and the name under which each is counted.

Everything else is refused. vLLM checks its API key under `/v1`, `/v2`, `/inference` and `/cohere` only; its development
and administration routes (`/sleep`, `/collective_rpc`, `/reset_prefix_cache`, `/pause`, ...) need no key at the engine
and do not pass. `/invocations` does not pass either, because it reaches every kind of generation. A route outside `/v1`
that passes (`/tokenize`, `/pooling`, ...) needs a key that the engine has accepted.
"""

from __future__ import annotations

import re
from typing import Final

from tokencake.protocol import DECISIONS_PATH, EVENTS_PATH, STATE_PATH
from tokencake_proxy.dialects import DIALECTS

HEALTH_PATHS: Final = ("/health", "/ping")
METRICS_PATH: Final = "/metrics"

EVENTS_ROUTE: Final = "tokencake_events"
VIEW_ROUTES: Final = ("tokencake_state", "tokencake_decisions")
REFUSED_ROUTE: Final = "refused"

ROUTES: Final = {dialect.path: dialect.name for dialect in DIALECTS} | {
    "/v1/embeddings": "embeddings",
    "/v1/models": "models",
    EVENTS_PATH: EVENTS_ROUTE,
    STATE_PATH: "tokencake_state",
    DECISIONS_PATH: "tokencake_decisions",
    "/tokenize": "tokenize",
    "/detokenize": "detokenize",
    "/pooling": "pooling",
    "/classify": "classify",
    "/score": "score",
    "/rerank": "rerank",
    "/version": "version",
}
"""Path -> the value of the label `route` in the metrics."""

_ADMINISTRATION: Final = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_OPEN_PREFIXES: Final = {"/v1/": "other_v1", "/v2/": "other_v2"}

_KEY_CHECKED_PREFIX: Final = "/v1/"

_SEPARATORS: Final = re.compile(r"[/\\]")


def engine_route(path: str) -> str | None:
    """The name of the decoded `path`, one of a bounded set; None for a path that does not pass.

    Dot segments never pass: a server between proxy and engine might resolve `/v1/../sleep`.
    """
    if not {".", ".."}.isdisjoint(_SEPARATORS.split(path)):
        return None
    if path.rstrip("/") in _ADMINISTRATION:
        return None
    named = ROUTES.get(path)
    if named is not None:
        return named
    return next((name for prefix, name in _OPEN_PREFIXES.items() if path.startswith(prefix)), None)


def engine_checks_key(path: str, method: str) -> bool:
    """Whether every supported vLLM itself checks the API key there. It answers `OPTIONS` without a key."""
    return path.startswith(_KEY_CHECKED_PREFIX) and method != "OPTIONS"
