"""What does the plug-in change in a vLLM process? One new attribute on `EngineCore`, nothing is replaced."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import vllm
from vllm.logger import init_logger

from tokencake import SUPPORTED_VLLM

logger = init_logger("vllm.tokencake")


def version_problem(version_tuple: tuple[object, ...]) -> str | None:
    """Why this version of vLLM will not do, or None."""
    first, last = SUPPORTED_VLLM
    if first <= version_tuple[:2] <= last:
        return None
    oldest, newest = (".".join(map(str, pair)) for pair in SUPPORTED_VLLM)
    return (
        f"vLLM {vllm.__version__} is not supported by TokenCake, which knows the scheduler of {oldest} to {newest}; "
        "install one of these or start vLLM without TokenCake"
    )


def is_requested() -> bool:
    """Whether this process was started for TokenCake, rather than just having it installed."""
    return "tokencake" in os.environ.get("VLLM_PLUGINS", "").split(",")


def _wake(input_queue: Any) -> None:
    """Make the engine loop that sleeps on `input_queue` look for work, as vLLM itself does."""
    from vllm.v1.engine import EngineCoreRequestType  # noqa: PLC0415  # heavy

    input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))


def call_scheduler(engine_core: Any, method: str, args: Sequence[Any]) -> Any:
    """Becomes `EngineCore.tokencake`, which vLLM's utility RPC finds by name and calls on the engine loop.

    Returns:
        What the scheduler's method returns, or None where the engine runs a scheduler that is not ours.
    """
    if (bind := getattr(engine_core.scheduler, "bind_waker", None)) is not None and hasattr(engine_core, "input_queue"):
        bind(partial(_wake, engine_core.input_queue))
    bound = getattr(engine_core.scheduler, method, None) if method.startswith("tokencake_") else None
    return None if bound is None else bound(*args)


def register() -> None:
    """Entry point of `vllm.general_plugins`; runs in every vLLM process, possibly more than once.

    Raises:
        RuntimeError: TokenCake was asked for by `VLLM_PLUGINS` and this vLLM is too old or too new.
    """
    problem = version_problem(vllm.__version_tuple__)
    if problem is not None:
        if is_requested():
            raise RuntimeError(problem)
        logger.warning("TokenCake stays off: %s", problem)
        return
    from vllm.v1.engine.core import EngineCore  # noqa: PLC0415  # heavy, and absent from versions not supported

    EngineCore.tokencake = call_scheduler  # type: ignore[attr-defined]  # the attribute is new
