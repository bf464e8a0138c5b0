"""Choice of the copier for the device that the KV caches lie on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from vllm.logger import init_logger

from tokencake_vllm.transfer.block_memory import block_views, host_rows
from tokencake_vllm.transfer.checksums import Checksums
from tokencake_vllm.transfer.jobs import Copier, NoCopier
from tokencake_vllm.transfer.stream_copier import StreamCopier
from tokencake_vllm.transfer.thread_copier import ThreadCopier

logger = init_logger("vllm.tokencake")


def make_copier(
    kv_caches: Mapping[str, Any],
    num_blocks: int,
    slots: int,
    *,
    checksum_every: int,
    allocate: Callable[[list[torch.Tensor], int], torch.Tensor] = host_rows,
) -> Copier:
    """The copier for where these caches lie, with its host memory; `NoCopier` where that cannot be had.

    Args:
        kv_caches: as vLLM registers them.
        num_blocks: of the device.
        slots: of the host.
        checksum_every: one copied block in this many is compared on both sides; 0 for none.
        allocate: makes the host memory.
    """
    try:
        views = block_views(kv_caches, num_blocks)
        rows = allocate(views, slots)
        kind = StreamCopier if views[0].device.type == "cuda" else ThreadCopier
        return kind(views, rows, checksums=Checksums(checksum_every, slots))
    except Exception:
        logger.exception("TokenCake: no host memory for %d KV blocks; nothing is offloaded", slots)
        return NoCopier()
