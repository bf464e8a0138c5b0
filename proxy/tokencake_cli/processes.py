"""Child processes: an engine and a proxy that are started, watched and stopped together.

`Processes` starts them as one process group, stores their logs, waits until each one answers, and stops the whole group
at the end, whether by an exception, Ctrl-C, SIGTERM, or the death of this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

DEFAULT_PROXY_PORT: Final = 8700
DEFAULT_ENGINE_PORT: Final = 8701
STOP_GRACE_S: Final = 15.0
TAIL_LINES: Final = 25
_PR_SET_PDEATHSIG: Final = 1
_DIRECT: Final = urllib.request.build_opener(
    urllib.request.ProxyHandler({})
)  # `http_proxy` does not apply to processes of this machine


class StartError(RuntimeError):
    """A process did not start; the message holds the end of its log."""


def default_log_dir() -> Path:
    """`$XDG_STATE_HOME/tokencake/logs`."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "tokencake" / "logs"


def is_port_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could bind `port` now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def engine_command(model: str, port: int, flags: Sequence[str]) -> list[str]:
    """The command that starts stock vLLM with the plug-in on `port` of the loopback interface."""
    own = ["--host", "127.0.0.1", "--port", str(port)]
    return [sys.executable, "-m", "tokencake_vllm.serve", model, *own, *flags]


STOCK_ENV: Final = {"VLLM_PLUGINS": ""}
"""Environment in which vLLM loads no plug-in, even if one is installed."""


def stock_command(model: str, port: int, flags: Sequence[str]) -> list[str]:
    """The command that starts vLLM without the plug-in, for comparison. Use it with `STOCK_ENV`."""
    own = ["--model", model, "--host", "127.0.0.1", "--port", str(port)]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *own, *flags]


def proxy_command(upstream: str, host: str, port: int) -> list[str]:
    """The command that starts the proxy in front of `upstream`."""
    return [
        *(sys.executable, "-m", "tokencake_cli.main", "proxy"),
        *("--upstream", upstream, "--host", host, "--port", str(port)),
    ]


@dataclass(frozen=True, slots=True)
class _ChildProcess:
    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:])


class Processes:
    """A context manager. Leaving it stops the processes started in it, and all their child processes."""

    def __init__(self, log_dir: Path) -> None:
        self.log_dir = log_dir
        self._children: list[_ChildProcess] = []

    def __enter__(self) -> Self:
        self.log_dir.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, name: str, command: Sequence[str], env: dict[str, str] | None = None) -> None:
        """Start `command` in the group, with its output in `log_dir/name.log`."""
        log = self.log_dir / f"{name}.log"
        group = self._children[0].process.pid if self._children else 0
        parent = os.getpid()

        def exit_with_parent() -> None:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)

        if log.exists():
            log.replace(log.with_suffix(".previous.log"))
        with log.open("wb") as output:
            process = subprocess.Popen(  # noqa: S603  # our own commands
                list(command),
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=group,
                preexec_fn=exit_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509  # before any thread
            )
        self._children.append(_ChildProcess(name, process, log))

    def pid(self, name: str) -> int:
        """The process id of `name`."""
        return next(child.process.pid for child in self._children if child.name == name)

    def wait_until_healthy(
        self, name: str, url: str, on_wait: Callable[[float], None] | None = None, timeout_s: float | None = None
    ) -> None:
        """Return when `url` answers 200.

        Args:
            name: the process that should answer.
            url: its health route.
            on_wait: called about twice a second with the seconds waited.
            timeout_s: None waits as long as the process runs; a large model loads for minutes.

        Raises:
            StartError: a process of the group has ended, or the timeout has expired.
        """
        started = time.monotonic()
        while True:
            self.check()
            with contextlib.suppress(OSError, http.client.HTTPException), _DIRECT.open(url, timeout=5) as answer:
                if answer.status == 200:  # noqa: PLR2004
                    return
            waited_s = time.monotonic() - started
            if timeout_s is not None and waited_s > timeout_s:
                child = next(child for child in self._children if child.name == name)
                raise StartError(f"the {name} did not answer within {timeout_s:.0f} s.\n{self._log_end(child)}")
            if on_wait:
                on_wait(waited_s)
            time.sleep(0.5)

    def check(self) -> None:
        """Raise StartError if a process of the group has ended."""
        for child in self._children:
            if (status := child.process.poll()) is not None:
                raise StartError(f"the {child.name} ended with status {status}.\n{self._log_end(child)}")

    def _log_end(self, child: _ChildProcess) -> str:
        return f"The end of {child.log}:\n{child.tail()}"

    def stop(self) -> None:
        """Ask the group to stop, wait, then kill the rest. Ctrl-C does not interrupt this."""
        if not self._children:
            return
        with _signals_ignored():
            group = self._children[0].process.pid
            for child in reversed(self._children):
                with contextlib.suppress(ProcessLookupError):
                    child.process.terminate()
            deadline = time.monotonic() + STOP_GRACE_S
            for child in self._children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(max(0.1, deadline - time.monotonic()))
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
            for child in self._children:
                child.process.wait()
            self._children.clear()


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stops = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in stops]
    try:
        yield
    finally:
        for number, handler in zip(stops, before, strict=True):
            signal.signal(number, handler)


def raise_on_sigterm() -> None:
    """Make SIGTERM raise KeyboardInterrupt like Ctrl-C, so that context managers run."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
