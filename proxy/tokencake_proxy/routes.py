"""Which requests may reach the engine, and under which name are they counted?

A proxy is where strangers arrive, so this is a list of what passes. vLLM checks its API key under `/v1`, `/v2`,
`/inference` and `/cohere` only; its development and administration routes (`/sleep`, `/collective_rpc`,
`/reset_prefix_cache`, `/pause`, ...) stand open beside them and do not pass. Neither does `/invocations`, which reaches
every kind of generation. What passes beside `/v1` (`/tokenize`, `/pooling`, ...) needs a key that the proxy has proven.
"""

from __future__ import annotations

import re
from typing import Final

from tokencake.protocol import DECISIONS_PATH, EVENTS_PATH, STATE_PATH

HEALTH_PATHS: Final = ("/health", "/ping")
METRICS_PATH: Final = "/metrics"

EVENTS_ROUTE: Final = "tokencake_events"
VIEW_ROUTES: Final = ("tokencake_state", "tokencake_decisions")
REFUSED_ROUTE: Final = "refused"

_NAMED: Final = {
    "/v1/chat/completions": "chat_completions",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/v1/embeddings": "embeddings",
    "/v1/models": "models",
    EVENTS_PATH: EVENTS_ROUTE,
    STATE_PATH: "tokencake_state",
    DECISIONS_PATH: "tokencake_decisions",
    "/inference/v1/generate": "generate",
    "/cohere/v2/chat": "cohere_chat",
    "/tokenize": "tokenize",
    "/detokenize": "detokenize",
    "/pooling": "pooling",
    "/classify": "classify",
    "/score": "score",
    "/rerank": "rerank",
    "/version": "version",
}
_ADMINISTRATION: Final = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_OPEN_PREFIXES: Final = {"/v1/": "other_v1", "/v2/": "other_v2"}

_GUARDED: Final = "/v1/"

_SEPARATORS: Final = re.compile(r"[/\\]")


def engine_route(path: str) -> str | None:
    """The bounded name of a decoded `path` that passes to the engine, or None for one that does not.

    Dot segments never pass: a server between proxy and engine might resolve `/v1/../sleep`.
    """
    if not {".", ".."}.isdisjoint(_SEPARATORS.split(path)):
        return None
    if path.rstrip("/") in _ADMINISTRATION:
        return None
    named = _NAMED.get(path)
    if named is not None:
        return named
    return next((name for prefix, name in _OPEN_PREFIXES.items() if path.startswith(prefix)), None)


def is_guarded(path: str, method: str) -> bool:
    """Whether every supported vLLM itself asks for the key there; `OPTIONS` it answers without."""
    return path.startswith(_GUARDED) and method != "OPTIONS"
