"""Stand-ins for what the copies import from vLLM, and vLLM's own block copy to compare with."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import types
from pathlib import Path
from typing import Any


def has_vllm() -> bool:
    """Whether vLLM can be imported. A folder of that name on the path is not enough."""
    try:
        return importlib.util.find_spec("vllm.logger") is not None
    except (ModuleNotFoundError, ValueError):  # ValueError: the stand-in is installed, which has no spec
        return False


def install() -> None:
    """Make a vLLM of a few lines: its logger, and what `cuda_mem_ops` asks of it."""
    _module("vllm")
    _module("vllm.logger", init_logger=logging.getLogger)
    _module("vllm.envs", VLLM_KV_OFFLOAD_MAX_BATCH_DESCRIPTORS=0)
    _module("vllm.platforms", current_platform=types.SimpleNamespace(is_rocm=lambda: False))


def _module(name: str, **content: Any) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(content, __path__=[])
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def native_copies(folder: Path | None) -> tuple[Any, str]:
    """The module `cuda_mem_ops` of vLLM, from `folder` or from the installed vLLM, and where it is from.

    Without it there is nothing to compare with, which is no fault: None, and why.
    """
    name = "vllm.v1.simple_kv_offload.cuda_mem_ops"
    try:
        importlib.import_module("cuda.bindings.driver")  # what it calls
        if folder is None:
            return (
                (importlib.import_module(name), "vLLM") if has_vllm() else (None, "there is no vLLM, and no --native")
            )
        spec = importlib.util.spec_from_file_location("cuda_mem_ops", folder / "cuda_mem_ops.py")
        if spec is None or spec.loader is None:
            return None, f"{folder} is no folder"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:
        return None, f"{type(error).__name__}: {error}"
    return module, str(folder)
