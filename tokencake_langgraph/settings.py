"""Base URL and API key of a model whose constructor does not give them.

The base URL is `TOKENCAKE_BASE_URL`, else the `OPENAI_API_BASE` or `OPENAI_BASE_URL` that `ChatOpenAI` reads, else the
proxy on this machine. The key is `TOKENCAKE_API_KEY`. `OPENAI_API_KEY` is sent only to a server that the `OPENAI_`
variables name themselves, so that swapping the class never sends OpenAI's key to another server.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

DEFAULT_BASE_URL: Final = "http://127.0.0.1:8700/v1"
"""The proxy's own default port."""

NO_API_KEY: Final = "EMPTY"
"""The usual key for a vLLM server that requires none; the OpenAI client needs a non-empty one."""


def with_endpoint(values: Mapping[str, Any], env: Mapping[str, str]) -> dict[str, Any]:
    """The constructor's `values` with base URL and key filled in."""
    rest = dict(values)
    url = _first(rest.pop("base_url", None), rest.pop("openai_api_base", None))
    key = _first(rest.pop("api_key", None), rest.pop("openai_api_key", None), env.get("TOKENCAKE_API_KEY"))
    url = _first(url, env.get("TOKENCAKE_BASE_URL"))
    if url is None:
        url = _first(env.get("OPENAI_API_BASE"), env.get("OPENAI_BASE_URL"))
        if url is not None:
            key = _first(key, env.get("OPENAI_API_KEY"))
    return {**rest, "base_url": url or DEFAULT_BASE_URL, "api_key": key or NO_API_KEY}


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None and value != ""), None)
