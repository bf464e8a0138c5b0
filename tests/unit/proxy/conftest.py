"""A proxy on a real uvicorn and an engine whose bytes a test scripts, both in one background event loop.

Tests are plain functions that talk to them over sockets. The engine runs a *script*: a coroutine function that receives
each connection and reads requests and writes bytes on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import re
import socket
import struct
import threading
from dataclasses import dataclass, field

import httpx
import openai
import pytest
import uvicorn
import uvloop

from tokencake_proxy.server import server_config
from tokencake_proxy.settings import ProxySettings

PATIENCE_S = 10


@dataclass
class Received:
    """A request as it was on the wire."""

    request_line: bytes
    lines: list[tuple[bytes, bytes]]
    body: bytes

    def values(self, name):
        return [value for key, value in self.lines if key.lower() == name]

    @property
    def names(self):
        return {key.lower() for key, _ in self.lines}


@dataclass
class EngineConnection:
    """One connection to the engine; `number` counts from 1."""

    number: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    requests: list[Received]

    async def request(self):
        """The next request, or None when the peer has closed."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionResetError):
            return None
        first, *rest = head[:-4].split(b"\r\n")
        lines = [tuple(line.split(b": ", 1)) for line in rest]
        length = next((int(value) for name, value in lines if name.lower() == b"content-length"), 0)
        received = Received(first, lines, await self.reader.readexactly(length))
        self.requests.append(received)
        return received

    async def send(self, data):
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, body=b"{}", head=b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"):
        await self.send(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    def reset(self):
        """Break the connection with RST instead of an orderly close."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@dataclass
class RawEngine:
    port: int = 0
    requests: list[Received] = field(default_factory=list)
    connections: int = 0
    saw_disconnect: threading.Event = field(default_factory=threading.Event)
    script: object = None
    keys: list[bytes] = field(default_factory=list)
    """The keys that `demand_keys` accepts."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def calls(self):
        """The requests without the proxy's own key checks."""
        return [request for request in self.requests if request.request_line != b"GET /v1/models HTTP/1.1"]

    async def connected(self, reader, writer):
        self.connections += 1
        line = EngineConnection(self.connections, reader, writer, self.requests)
        try:
            await self.script(line)
        except (ConnectionResetError, BrokenPipeError):
            self.saw_disconnect.set()
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def demand_keys(self, line):
        """The script of vLLM with `--api-key`: under `/v1` it serves only requests with one of `keys`."""
        while (received := await line.request()) is not None:
            path = received.request_line.split(b" ")[1]
            (authorization,) = received.values(b"authorization") or [b""]
            if path.startswith(b"/v1") and authorization not in [b"Bearer " + key for key in self.keys]:
                await line.answer(b'{"error":"Unauthorized"}', b"HTTP/1.1 401 Unauthorized\r\n")
            else:
                await line.answer()

    async def until_gone(self, line):
        """Wait until the proxy has closed `line`."""
        with contextlib.suppress(ConnectionResetError):
            await line.reader.read()
        self.saw_disconnect.set()


async def answer_everything(line):
    while (received := await line.request()) is not None:
        await line.answer(json.dumps({"saw": received.request_line.decode()}).encode())


class BackgroundLoop:
    """The background event loop."""

    def __init__(self):
        self.loop = uvloop.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.serving = []

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE_S)

    def start_proxy(self, settings):
        listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        server = uvicorn.Server(server_config(dataclasses.replace(settings, shutdown_grace_s=1)))
        self.serving.append((server, asyncio.run_coroutine_threadsafe(server.serve([listener]), self.loop)))
        return server, RunningProxy(listener.getsockname()[1])

    def close(self):
        for server, _ in self.serving:
            server.should_exit = True
        for _, serving in self.serving:
            serving.result(PATIENCE_S)
        self.run(_settle())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


async def _settle():
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()


@dataclass
class RunningProxy:
    port: int

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def metric(self, name, **labels):
        """The value of a sample of `/metrics`; 0 when there is none yet."""
        text = httpx.get(f"{self.url}/metrics", trust_env=False, verify=False).text
        for line in text.splitlines():
            found = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if found and found[1] == name and dict(re.findall(r'(\w+)="(.*?)"', found[2] or "")) == labels:
                return float(found[3])
        return 0.0


@pytest.fixture(scope="session")
def background():
    background = BackgroundLoop()
    yield background
    background.close()


@pytest.fixture(autouse=True)
def no_traceback_in_the_log():
    """The proxy handles every error itself: uvicorn must log no traceback."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("uvicorn.error").addHandler(handler)
    yield
    logging.getLogger("uvicorn.error").removeHandler(handler)
    assert [record.getMessage() for record in records if record.exc_info] == []


@pytest.fixture
def start_engine(background):
    """Start an engine that answers every request with 200 until it is given another script."""
    servers = []

    def start(port=0):
        engine = RawEngine(script=answer_everything)
        servers.append(background.run(asyncio.start_server(engine.connected, "127.0.0.1", port)))
        engine.port = servers[-1].sockets[0].getsockname()[1]
        return engine

    yield start
    for server in servers:
        background.loop.call_soon_threadsafe(server.close)


@pytest.fixture
def engine(start_engine):
    return start_engine()


@pytest.fixture
def unused_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture
def start_proxy(background):
    """Start a proxy with these settings. It is shut down after the test, without waiting."""
    servers = []

    def start(upstream, **settings):
        server, proxy = background.start_proxy(ProxySettings(upstream, **settings))
        servers.append(server)
        return proxy

    yield start
    for server in servers:
        server.should_exit = True


@pytest.fixture
def proxy(engine, start_proxy):
    return start_proxy(engine.url)


@pytest.fixture
def http():
    """A client that reads no settings from the environment."""
    with httpx.Client(trust_env=False, verify=False, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture
def openai_client(proxy):
    with (
        httpx.Client(trust_env=False, verify=False, timeout=PATIENCE_S) as transport,
        openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="k", http_client=transport, max_retries=0) as client,
    ):
        yield client


@pytest.fixture
def dial():
    """Open a raw connection to a port."""
    with contextlib.ExitStack() as opened:

        def connect(port):
            return opened.enter_context(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S))

        yield connect


@pytest.fixture
def exchange_bytes(dial):
    """Send bytes to a port and return all bytes until the peer closes."""

    def exchange(port, request):
        sock = dial(port)
        sock.sendall(request)
        pieces = []
        while piece := sock.recv(65_536):
            pieces.append(piece)
        return b"".join(pieces)

    return exchange
