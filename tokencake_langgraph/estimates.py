"""Expected durations of tools, given by the user.

They are given per model, `ChatTokencake(tool_estimates={"search": 4.0})`, or per tool,
`tool.metadata = {"tokencake": {"estimate_s": 4.0}}`. They are optional: the engine learns durations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from langchain_core.tools import BaseTool

from tokencake.protocol.parsing import MAX_SECONDS


def estimate_in(metadata: Mapping[str, Any]) -> float | None:
    """The estimate in a tool's metadata, in seconds; None if there is no valid one."""
    given = metadata.get("tokencake")
    if given is None:
        return None
    estimate_s = given.get("estimate_s") if isinstance(given, Mapping) else None
    return float(estimate_s) if is_duration(estimate_s) else None


def estimates_of(tools: Sequence[Any]) -> dict[str, float]:
    """Tool name -> seconds, for the tools that have an estimate.

    Raises:
        ValueError: a tool has an estimate that is not a valid duration.
    """
    estimates: dict[str, float] = {}
    for tool in tools:
        if not isinstance(tool, BaseTool) or not tool.metadata or "tokencake" not in tool.metadata:
            continue
        estimate_s = estimate_in(tool.metadata)
        if estimate_s is None:
            given = tool.metadata["tokencake"]
            raise ValueError(
                f"metadata['tokencake'] of tool {tool.name!r} is {given!r}; "
                'expected the seconds it takes, for example {"estimate_s": 4.0}.'
            )
        estimates[tool.name] = estimate_s
    return estimates


def is_duration(value: object) -> TypeGuard[float]:
    """Whether `value` is a number of seconds that the wire contract allows."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_SECONDS
