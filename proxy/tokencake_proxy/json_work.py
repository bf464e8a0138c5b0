"""Where the JSON of a request body is processed: in the event loop, in turn, or in a worker process."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

from tokencake_proxy.media import is_costly_json
from tokencake_proxy.workers import WorkerProcesses

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokencake_proxy.settings import ProxySettings

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_SHORT_BYTES: Final = 16_384
"""A body up to this size is processed at once: taking turns would delay it more than it delays others."""


class JsonWork:
    """Runs functions that parse a body, each where it delays other requests least."""

    def __init__(self, settings: ProxySettings) -> None:
        self._inline_bytes = settings.json_inline_bytes
        self._workers = WorkerProcesses(settings.json_memory_bytes, settings.json_processes)
        self._turn = PacedLock()

    async def run(
        self,
        body: bytes,
        work: Callable[_Arguments, _Result],
        *arguments: _Arguments.args,
        **named: _Arguments.kwargs,
    ) -> _Result:
        """The result of `work`, which parses `body`. It must be picklable, and so must its arguments and its result.

        Raises:
            Refusal: `work` raised it, or needs more memory than `json_memory_bytes`.
        """
        if len(body) <= _SHORT_BYTES:
            return work(*arguments, **named)
        if len(body) > self._inline_bytes or is_costly_json(body):
            return await self._workers.run(work, *arguments, **named)
        async with self._turn:
            return work(*arguments, **named)


class PacedLock:
    """A lock for work in the event loop. After each use it stays locked for as long as that use took.

    So other requests get at least half of the event loop's time.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._began_s = self._free_s = 0.0

    async def __aenter__(self) -> None:
        """Wait for the lock."""
        await self._lock.acquire()
        try:
            await asyncio.sleep(self._free_s - time.perf_counter())
        except asyncio.CancelledError:
            self._lock.release()
            raise
        self._began_s = time.perf_counter()

    async def __aexit__(self, *_: object) -> None:
        """Unlock."""
        ended_s = time.perf_counter()
        self._free_s = 2 * ended_s - self._began_s
        self._lock.release()
