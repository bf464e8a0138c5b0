"""Errors of the simulator.

```
SimulationError
├── WorkloadError           a workload cannot be run; carries `where`
│   └── NeverFitsError      a call needs more KV blocks than the device has
├── SourceError             a file or a server cannot be read
├── UnknownPolicyError      no policy has this name
└── DeadlockError           nothing runs, something waits, and nothing will ever happen
```
"""

from __future__ import annotations

from collections.abc import Iterable


class SimulationError(Exception):
    """Any failure that the simulator reports itself."""


class WorkloadError(SimulationError, ValueError):
    """A workload cannot be run. The message names the source, the application, the node and the reason."""

    def __init__(self, source: str, where: str, problem: str) -> None:
        super().__init__(f"{source}: {where} {problem}")
        self.where = where


class NeverFitsError(WorkloadError):
    """A call needs more KV blocks than the device has; no policy can run it."""


class SourceError(SimulationError, OSError):
    """A file or a server cannot be read. The message says why and, where there is one, the way out."""


class UnknownPolicyError(SimulationError, ValueError):
    """No policy has this name."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__(f"policy {name!r} is not known; choose one of {', '.join(known)}")


class DeadlockError(SimulationError, RuntimeError):
    """Nothing runs, something waits, and nothing will ever happen. The message holds the state."""
