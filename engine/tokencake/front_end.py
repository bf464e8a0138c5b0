"""The front end of vLLM under which a plug-in has no HTTP routes, found by its setting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

RUST_FRONT_END: Final = "VLLM_USE_RUST_FRONTEND"


def front_end_problem(environ: Mapping[str, str]) -> str | None:
    """Why the API server of this environment cannot take TokenCake's events, or None.

    vLLM's Rust front end (off by default) loads no Python endpoint plug-in, so `/v1/tokencake/...` is absent there.
    """
    if environ.get(RUST_FRONT_END, "0").strip() in ("", "0"):
        return None
    return (
        f"{RUST_FRONT_END} is {environ[RUST_FRONT_END]!r}: vLLM's Rust front end loads no Python endpoint plug-in, so "
        "TokenCake hears of no tool call and has no state or metrics; unset the variable, or start vLLM itself, "
        "without TokenCake"
    )
