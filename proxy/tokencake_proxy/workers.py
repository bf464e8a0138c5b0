"""Worker processes for large bodies: they block no other request, and their memory is limited.

A thread would not help: Python's JSON parser holds the interpreter lock from the first byte to the last, 2.7 s for
50 MiB.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import resource
import signal
import subprocess
import sys
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

from tokencake_proxy.errors import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_NICENESS: Final = 10
"""The event loop has priority where there are few cores."""


class WorkerProcesses:
    """Runs functions in other processes, one process for each call of a function.

    Args:
        memory_bytes: address space of one process.
        processes: how many may run at a time; further calls wait.
    """

    def __init__(self, memory_bytes: int, processes: int) -> None:
        self._memory_bytes = memory_bytes
        self._free = asyncio.Semaphore(processes)

    async def run(
        self, work: Callable[_Arguments, _Result], *arguments: _Arguments.args, **named: _Arguments.kwargs
    ) -> _Result:
        """The result of `work`. Function, arguments and result must be picklable. Cancelling ends the process.

        Raises:
            Refusal: `work` raised it, or its process died, as it does when the memory does not suffice.
        """
        async with self._free:
            process = subprocess.Popen(  # noqa: ASYNC220, S603 - our own module; starting takes a few milliseconds
                [sys.executable, "-m", __name__, str(self._memory_bytes)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            try:
                result = await asyncio.to_thread(_submit, process, (work, arguments, named))
            finally:
                process.kill()  # does nothing to a process that has ended
        if process.returncode != 0:
            raise Refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                "body_too_costly",
                f"The request's body could not be read within {self._memory_bytes} bytes of memory "
                "(`json_memory_bytes`). Send less.",
            )
        if isinstance(result, Refusal):
            raise result
        return result  # type: ignore[no-any-return]


def _submit(process: subprocess.Popen[bytes], task: Any) -> Any:
    """The result that the process returns; None if it has died."""
    with contextlib.suppress(BrokenPipeError, EOFError, pickle.UnpicklingError), process:
        if process.stdin is not None and process.stdout is not None:
            pickle.dump(task, process.stdin)  # writes large parts as they are, without the interpreter lock
            process.stdin.close()
            return pickle.load(process.stdout)  # noqa: S301 - written by `_work` below
    return None


def _work(memory_bytes: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.nice(_NICENESS)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    work, arguments, named = pickle.load(sys.stdin.buffer)  # noqa: S301 - written by `_submit` above
    try:
        result = work(*arguments, **named)
    except Refusal as refusal:
        result = refusal
    except MemoryError:
        sys.exit(1)
    pickle.dump(result, sys.stdout.buffer)


if __name__ == "__main__":
    _work(int(sys.argv[1]))
