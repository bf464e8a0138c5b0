"""Host memory that this process may still take: of the machine, and of the container that it runs in.

Linux promises more than it has, and ends the process when the memory is written: what is asked for is compared first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import psutil  # type: ignore[import-untyped]  # vLLM brings it, without types

_CGROUPS: Final = (
    # Where a container sees its own control group: the limit, what is used, and what it consists of.
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


class Memory(NamedTuple):
    """In bytes."""

    total: int
    available: int


def host_memory() -> Memory:
    """The memory of the machine or the container, whichever has less."""
    machine = psutil.virtual_memory()
    found = [Memory(machine.total, machine.available)]
    for limit, used, parts in _CGROUPS:
        try:
            total = int(Path(limit).read_text())
            names = dict(line.split() for line in Path(parts).read_text().splitlines())
            files = int(names.get("file", names.get("cache", 0))) - int(names.get("shmem", 0))
            found.append(Memory(total, total - int(Path(used).read_text()) + max(0, files)))  # files can be dropped
        except (OSError, ValueError):  # there is no such file, or it says "max"
            continue
    return Memory(min(memory.total for memory in found), max(0, min(memory.available for memory in found)))


def shortage(own_bytes: int, node_bytes: int) -> str | None:
    """Why this process cannot take `own_bytes` where all ranks of its node take `node_bytes`; None where it can."""
    memory = host_memory()
    if node_bytes > memory.total:
        return f"{_gib(node_bytes)} GiB are asked for on a machine or container of {_gib(memory.total)} GiB"
    if own_bytes > memory.available:
        return f"{_gib(own_bytes)} GiB are asked for by this rank, and {_gib(memory.available)} GiB are available"
    return None


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
