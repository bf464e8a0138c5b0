"""The proxy as a process: start, errors at the start, and shutdown."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest

from tokencake_proxy import server
from tokencake_proxy.settings import ProxySettings

PATIENCE_S = 10
PROGRAM = """
import sys
from tokencake_proxy.server import run
from tokencake_proxy.settings import ProxySettings
run(ProxySettings(sys.argv[1], shutdown_grace_s=1), sys.argv[2], int(sys.argv[3]), "info")
"""


@contextlib.contextmanager
def running(upstream, host="127.0.0.1", port=0):
    """The process and the port that its log names."""
    command = [sys.executable, "-c", PROGRAM, upstream, host, str(port)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, text=True) as process:
        try:
            port = re.search(r"forwarding http://.*:(\d+) to", process.stderr.readline())
            assert "complete" in next(line for line in process.stderr if "startup" in line and "Waiting" not in line)
            yield process, int(port[1])
        finally:
            process.kill()


def end(process):
    """What a process that is about to end still says, and its exit status."""
    said = process.communicate(timeout=PATIENCE_S)[1]
    return said, process.returncode


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM)])
def test_it_serves_until_a_signal_and_ends_without_a_traceback(engine, number, status):
    with running(engine.url) as (process, port):
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models", trust_env=False).status_code == 200
        process.send_signal(number)
        said, code = end(process)

    assert code == status
    assert "Traceback" not in said


def test_a_stream_longer_than_the_grace_period_is_aborted_with_the_reason(engine):
    streaming = threading.Event()

    async def script(line):
        await line.request()
        await line.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        streaming.set()
        await engine.until_gone(line)

    engine.script = script
    with running(engine.url) as (process, port), socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n")
        assert streaming.wait(PATIENCE_S)
        process.terminate()
        received = b"".join(iter(lambda: client.recv(65_536), b""))
        said, _ = end(process)

    assert b"The proxy is shutting down" in received
    assert not received.endswith(b"0\r\n\r\n")
    assert engine.saw_disconnect.wait(PATIENCE_S)
    assert "Traceback" not in said


def test_a_port_in_use_is_named_with_the_way_out():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        command = [sys.executable, "-c", PROGRAM, "http://127.0.0.1:1", "127.0.0.1", str(port)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        ended = subprocess.run(command, capture_output=True, env=environment, text=True, check=False)

    assert ended.returncode == 1
    assert (
        ended.stderr
        == f"Port {port} on 127.0.0.1 is in use. Stop the server there, or choose another port with --port.\n"
    )


def test_an_unknown_host_is_named():
    command = [sys.executable, "-c", PROGRAM, "http://127.0.0.1:1", "203.0.113.1", "0"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, capture_output=True, env=environment, text=True, check=False)

    assert ended.returncode == 1
    assert ended.stderr.startswith("The proxy cannot listen on 203.0.113.1 port 0: ")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(("wanted", "hard", "served"), [(100, 10_000, 100), (4_096, 264, 100)])
def test_the_number_of_connections_fits_the_limit_of_open_files(monkeypatch, caplog, wanted, hard, served):
    limits = [(64, hard)]
    monkeypatch.setattr("resource.getrlimit", lambda _: limits[-1])
    monkeypatch.setattr("resource.setrlimit", lambda _, new: limits.append(new))

    settings = server._within_open_files(ProxySettings("http://h", max_connections=wanted))

    assert settings.max_connections == served
    assert limits[-1] == (264, hard)
    assert ("may open only 264 files" in caplog.text) == (served < wanted)
