"""Changes that the plug-in makes in a vLLM process: one new attribute on `EngineCore`, and one look before each wait.

`EngineCore.tokencake` is what the API server calls. `EngineCoreProc._process_input_queue`, in which an idle engine
waits, first tells our scheduler how to end that wait; what it does itself is stock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import vllm
from vllm.logger import init_logger

from tokencake import SUPPORTED_VLLM
from tokencake_vllm.amx import request_amx

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


def bind_waker(engine_core: Any) -> None:
    """Tell a scheduler of ours how to wake the engine loop of `engine_core`; one of vLLM's is left alone."""
    bind = getattr(engine_core.scheduler, "bind_waker", None)
    if bind is not None and hasattr(engine_core, "input_queue"):
        bind(partial(_wake, engine_core.input_queue))


def _binding(stock: Callable[[Any], None]) -> Callable[[Any], None]:
    """`EngineCoreProc._process_input_queue`, which binds the waker before it waits."""

    @wraps(stock)
    def process_input_queue(engine_core: Any) -> None:
        try:
            bind_waker(engine_core)
        except Exception:
            logger.exception("TokenCake: an idle engine will not wake for uploads")
        stock(engine_core)

    return process_input_queue


def call_scheduler(engine_core: Any, method: str, args: Sequence[Any]) -> Any:
    """Becomes `EngineCore.tokencake`, which vLLM's utility RPC finds by name and calls on the engine loop.

    Returns:
        What the scheduler's method returns, or None where the engine runs a scheduler that is not ours.
    """
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
    request_amx()
    from vllm.v1.engine.core import EngineCore, EngineCoreProc  # noqa: PLC0415  # heavy, and absent elsewhere

    EngineCore.tokencake = call_scheduler  # type: ignore[attr-defined]  # the attribute is new
    wait = EngineCoreProc._process_input_queue  # noqa: SLF001  # where an idle engine waits; there is no public hook
    if not hasattr(wait, "binds_tokencake"):
        binding: Any = _binding(wait)
        binding.binds_tokencake = True
        EngineCoreProc._process_input_queue = binding  # noqa: SLF001  # as above
