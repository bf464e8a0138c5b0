"""A fault on vLLM's worker, for the negative control."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group

from tokencake_vllm.transfer.checksums import Checksums


class WorkerExtension:
    """For vLLM's `worker_extension_cls`."""

    def spoil_host_memory(self) -> None:
        """Change every byte of it, and let no checksum find out."""
        connector: Any = get_kv_transfer_group()
        copier = connector._copier  # noqa: SLF001  # there is no public way to harm it
        copier._checksums = Checksums(0, 1)  # noqa: SLF001  # as above
        for part in copier._slots:  # noqa: SLF001  # as above
            part.copy_(part.flip(-1))
