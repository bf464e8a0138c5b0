"""Permission to use the AMX registers of the CPU, asked before vLLM's first step.

Linux kills a process with SIGILL at its first AMX instruction unless it has asked for the registers
(`arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`). vLLM's attention kernel for AMX does not ask; oneDNN does, at
its first larger matrix product. A worker whose first step has a few tokens therefore dies, with or without TokenCake.
The permission is the process's: threads share it and forked children inherit it.
"""

from __future__ import annotations

from vllm.logger import init_logger

logger = init_logger("vllm.tokencake")


def request_amx() -> None:
    """Ask for the registers where vLLM computes on a CPU that has them; a refusal leaves everything as it was."""
    try:
        import torch  # noqa: PLC0415  # heavy
        from vllm.platforms import current_platform  # noqa: PLC0415  # finds the device

        # `_is_amx_tile_supported` is what vLLM chooses its AMX kernels by.
        if not current_platform.is_cpu() or not torch.cpu._is_amx_tile_supported():  # noqa: SLF001  # no public name
            return
        is_granted = torch.cpu._init_amx()  # noqa: SLF001  # PyTorch asks so before its own AMX kernels
        logger.debug("TokenCake: AMX registers %s", "granted" if is_granted else "refused")
    except Exception:  # a first step of many tokens asks as well
        logger.debug("TokenCake: AMX registers could not be asked for", exc_info=True)
