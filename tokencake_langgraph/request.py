"""The hint in a request to the engine.

The body carries it as `vllm_xargs["tokencake"]`, a JSON string, which every gateway forwards and a vLLM without the
plug-in ignores. The ids are in headers too, for proxies and logs. Values that the user has set are never replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from tokencake.protocol import HINT_KEY, MAX_HINT_BYTES, Hint

CALL_HEADER: Final = "X-Request-Id"
SESSION_HEADER: Final = "X-Session-ID"


def tool_names(tools: Iterable[Any]) -> list[str]:
    """The names of tools in OpenAI's JSON, whatever their type."""
    names = []
    for tool in tools:
        if isinstance(tool, Mapping):
            name = (tool.get("function") or tool.get("custom") or tool).get("name")
            if isinstance(name, str) and name:
                names.append(name)
    return names


def attach_hint(
    call_params: Mapping[str, Any],
    model_params: Mapping[str, Any],
    default_headers: Mapping[str, str],
    hint: Hint,
) -> dict[str, Any]:
    """`call_params` with the hint in `extra_body` and the ids in `extra_headers`.

    A parameter of the call would replace the model's parameter completely. So both are merged here; the call's values
    take precedence.
    """
    body: dict[str, Any] = {"vllm_xargs": {HINT_KEY: _text(hint)}}
    for params in (model_params, call_params):
        if theirs := params.get("extra_body"):
            body = {**body, **theirs, "vllm_xargs": {**body["vllm_xargs"], **(theirs.get("vllm_xargs") or {})}}
    headers = {CALL_HEADER: hint.call, SESSION_HEADER: hint.session, **trace_context()}
    set_by_user = {**(model_params.get("extra_headers") or {}), **(call_params.get("extra_headers") or {})}
    if set_by_user or default_headers:
        taken = {name.lower() for name in (*set_by_user, *default_headers)}
        headers = {name: value for name, value in headers.items() if name.lower() not in taken} | set_by_user
    return {**call_params, "extra_body": body, "extra_headers": headers}


def trace_context() -> dict[str, str]:
    """W3C trace headers of the active OpenTelemetry span; empty without a span.

    OpenTelemetry's own instrumentation does not cover the HTTP client that openai 3 uses.
    """
    # If it was never imported, no span can be active, and importing it would cost more than building the hint.
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None or not trace.get_current_span().get_span_context().is_valid:
        return {}
    from opentelemetry import propagate  # noqa: PLC0415 - optional

    headers: dict[str, str] = {}
    propagate.inject(headers)
    return headers


def _text(hint: Hint) -> str:
    text = hint.to_json()
    return text if len(text) <= MAX_HINT_BYTES else replace(hint, expects_tools=None).to_json()
