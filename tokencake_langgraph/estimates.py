"""How long does the user expect a tool to take?

Said per model, `ChatTokencake(tool_estimates={"search": 4.0})`, or per tool,
`tool.metadata = {"tokencake": {"estimate_s": 4.0}}`. Nobody needs to say it: the engine learns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from langchain_core.tools import BaseTool

from tokencake.protocol.parsing import MAX_SECONDS


def estimate_in(metadata: Mapping[str, Any]) -> float | None:
    """The estimate that a tool's metadata carries, in seconds; None if there is none that makes sense."""
    said = metadata.get("tokencake")
    if said is None:
        return None
    estimate_s = said.get("estimate_s") if isinstance(said, Mapping) else None
    return float(estimate_s) if is_duration(estimate_s) else None


def estimates_of(tools: Sequence[Any]) -> dict[str, float]:
    """The estimates of those tools that carry one.

    Raises:
        ValueError: a tool carries something that is no duration.
    """
    estimates: dict[str, float] = {}
    for tool in tools:
        if not isinstance(tool, BaseTool) or not tool.metadata or "tokencake" not in tool.metadata:
            continue
        estimate_s = estimate_in(tool.metadata)
        if estimate_s is None:
            said = tool.metadata["tokencake"]
            raise ValueError(
                f"metadata['tokencake'] of tool {tool.name!r} is {said!r}; "
                'expected the seconds it takes, for example {"estimate_s": 4.0}.'
            )
        estimates[tool.name] = estimate_s
    return estimates


def is_duration(value: object) -> TypeGuard[float]:
    """Whether `value` is a number of seconds that the contract takes."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_SECONDS
