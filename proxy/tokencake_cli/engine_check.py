"""Check of a running engine: whether the Time Scheduler is on, and what the self-check of its copies found."""

from __future__ import annotations

from typing import Any

import httpx

from tokencake.protocol import STATE_PATH
from tokencake_cli.doctor import Finding

_TIMEOUT_S = 10.0


def engine_finding(url: str, api_key: str | None, transport: httpx.BaseTransport | None = None) -> Finding:
    """Ask the engine or proxy at `url`, with or without `/v1` at its end. Does not raise."""
    base = url.rstrip("/").removesuffix("/v1")
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        with httpx.Client(transport=transport, timeout=_TIMEOUT_S, headers=headers) as client:
            response = client.get(base + STATE_PATH, params={"limit": 1})
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        advice = "start it (`tokencake serve MODEL`), or give the URL of its proxy or API server to --base-url"
        return Finding("engine", "fail", f"{base}: {type(error).__name__}: {error}", advice)
    if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return Finding("engine", "fail", f"{base}: {response.status_code}", "give its key to --api-key")
    try:
        time = response.raise_for_status().json()["time"]
        return _finding(base, time["off"], time["host_blocks"], time.get("self_check"))
    except (httpx.HTTPStatusError, KeyError, TypeError, ValueError):
        found = f"{base}: {STATE_PATH} answers {response.status_code}, and not with a state"
        return Finding("engine", "fail", found, "vLLM runs there without TokenCake; start it with `tokencake engine`")


def _finding(base: str, off: str | None, host_blocks: int, check: dict[str, Any] | None) -> Finding:
    if off is not None:
        advice = "docs/time-scheduler.md names the ways out; vLLM runs as it is"
        return Finding("engine", "warn", f"{base}: the Time Scheduler is off: {off}", advice)
    copies = "its copies are checked with the first step"
    if check is not None:
        copies = f"copies checked, {check['blocks']} blocks out and back in {check['seconds'] * 1e3:.0f} ms"
    return Finding("engine", "ok", f"{base}: Time Scheduler on, {host_blocks} blocks of host memory, {copies}")
