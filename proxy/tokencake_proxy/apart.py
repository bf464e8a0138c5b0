"""Work on a large body in a process of its own: it stops no other call, and its memory has a limit.

A thread would not do: Python's JSON parser holds the interpreter from the first byte to the last, 2.7 s for 50 MiB.
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
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

from tokencake_proxy.errors import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable

_Arguments = ParamSpec("_Arguments")
_Answer = TypeVar("_Answer")

_NICENESS: Final = 10
"""The calls of others go first, where there are few cores."""


class Apart:
    """Runs functions in processes that live as long as one call of a function.

    Args:
        memory_bytes: what one process may have.
        processes: how many may run at a time.
    """

    def __init__(self, memory_bytes: int, processes: int) -> None:
        self._memory_bytes = memory_bytes
        self._places = asyncio.Semaphore(processes)

    async def run(
        self, work: Callable[_Arguments, _Answer], *arguments: _Arguments.args, **named: _Arguments.kwargs
    ) -> _Answer:
        """The answer of `work`, which like its arguments and its answer must be picklable. Cancelling ends the process.

        Raises:
            Refusal: `work` raised it, or its process died, as it does when the memory is not enough.
        """
        async with self._places:
            process = subprocess.Popen(  # noqa: ASYNC220, S603 - our own module; starting takes a few milliseconds
                [sys.executable, "-m", __name__, str(self._memory_bytes)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            try:
                answer = await asyncio.to_thread(_ask, process, (work, arguments, named))
            finally:
                process.kill()  # nothing happens to one that has ended
        if process.returncode != 0:
            raise Refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                "body_too_costly",
                f"The request's body could not be read within {self._memory_bytes} bytes of memory "
                "(`json_memory_bytes`). Send less.",
            )
        if isinstance(answer, Refusal):
            raise answer
        return answer  # type: ignore[no-any-return]


class Turns:
    """Lets one at a time work in the event loop, which is free for other calls as long after each as that took."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._began_s = self._free_s = 0.0

    async def __aenter__(self) -> None:
        """Wait for a turn."""
        await self._lock.acquire()
        try:
            await asyncio.sleep(self._free_s - time.perf_counter())
        except asyncio.CancelledError:
            self._lock.release()
            raise
        self._began_s = time.perf_counter()

    async def __aexit__(self, *_: object) -> None:
        """End the turn."""
        ended_s = time.perf_counter()
        self._free_s = 2 * ended_s - self._began_s
        self._lock.release()


def _ask(process: subprocess.Popen[bytes], question: Any) -> Any:
    """None from a process that has died."""
    with contextlib.suppress(BrokenPipeError, EOFError, pickle.UnpicklingError), process:
        if process.stdin is not None and process.stdout is not None:
            pickle.dump(question, process.stdin)  # large parts are written as they are, without holding the interpreter
            process.stdin.close()
            return pickle.load(process.stdout)  # noqa: S301 - written by `_answer` below
    return None


def _answer(memory_bytes: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.nice(_NICENESS)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    work, arguments, named = pickle.load(sys.stdin.buffer)  # noqa: S301 - written by `_ask` above
    try:
        answer = work(*arguments, **named)
    except Refusal as refusal:
        answer = refusal
    except MemoryError:
        sys.exit(1)
    pickle.dump(answer, sys.stdout.buffer)


if __name__ == "__main__":
    _answer(int(sys.argv[1]))
