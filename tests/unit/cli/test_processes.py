"""Servers are started together, and none of them outlives its parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokencake_cli.processes import Processes, StartError, free_port, is_port_free

SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
STUBBORN = (
    "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('ignores', flush=True); time.sleep(600)"
)
PATIENCE_S = 60
"""How long a test waits for an expected event; it only ends a hang."""
PARENT = """
import sys
from pathlib import Path
from tokencake_cli.processes import Processes
with Processes(Path(sys.argv[1])) as processes:
    processes.start("sleeper", [sys.executable, "-c", "import time; time.sleep(600)"])
    print(processes.pid("sleeper"), flush=True)
    sys.stdin.read()
"""


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} still exists"
        time.sleep(0.05)


def test_a_server_is_waited_for_and_stopped(tmp_path: Path) -> None:
    port = free_port()
    with Processes(tmp_path) as processes:
        processes.start("server", [sys.executable, "-c", SERVER, str(port)])
        processes.wait_until_healthy("server", f"http://127.0.0.1:{port}/", timeout_s=PATIENCE_S)
        pid = processes.pid("server")
        assert is_alive(pid)
    assert not is_alive(pid)


def test_a_process_that_dies_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        processes.start("engine", [sys.executable, "-c", "import sys; sys.exit('the model is too large')"])
        with pytest.raises(StartError) as caught:
            processes.wait_until_healthy("engine", "http://127.0.0.1:9/")
    assert "the engine ended with status 1" in str(caught.value)
    assert "the model is too large" in str(caught.value)
    assert str(tmp_path / "engine.log") in str(caught.value)


def test_waiting_for_a_process_that_never_answers_times_out(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        processes.start("engine", [sys.executable, "-c", "import time; time.sleep(600)"])
        with pytest.raises(StartError, match="the engine did not answer within 1 s"):
            processes.wait_until_healthy("engine", f"http://127.0.0.1:{free_port()}/", timeout_s=1)


def test_a_process_that_ignores_sigterm_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokencake_cli.processes.STOP_GRACE_S", 0.5)
    spawn = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {STUBBORN!r}]).pid, flush=True); "
    with Processes(tmp_path) as processes:
        processes.start("engine", [sys.executable, "-c", spawn + STUBBORN])
        log = tmp_path / "engine.log"
        deadline = time.monotonic() + PATIENCE_S
        while log.read_text().count("ignores") < 2:  # the process and its child
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (child,) = [int(line) for line in log.read_text().split() if line.isdigit()]
        pids = [processes.pid("engine"), child]
    for pid in pids:
        wait_until_gone(pid)


def test_the_group_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        wait_until_gone(pid)


def test_a_port_in_use_is_not_free() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        assert not is_port_free(holder.getsockname()[1])
    assert is_port_free(free_port())
