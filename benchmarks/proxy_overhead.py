"""What does the proxy add to a call?

An engine that answers at once, the proxy in front of it and this client are three processes. Direct and proxied calls
take turns within one run, so that both meet the same machine; figures of different runs are not to be compared.

    python benchmarks/proxy_overhead.py [--requests N] [--json FILE]

`latency` is from sending a 2 kB chat completion to having the whole answer, `first chunk` to having the first event of
a stream. Client, proxy and engine share the cores: with few of them, figures above one call at a time say how long the
processes waited for each other, and the proxy's CPU time per call is the one to trust.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import socket
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

_CONCURRENCIES: Final = (1, 16, 64)
_ROUNDS: Final = 6
_HOST: Final = "127.0.0.1"
_START_TIMEOUT_S: Final = 30

_BODY: Final = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 2_000}]}).encode()
_HEAD: Final = b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
_REQUESTS: Final = {
    "latency": _HEAD + b"Content-Length: %d\r\n\r\n" % len(_BODY) + _BODY,
    "first chunk": _HEAD + b"X-Stream: 1\r\nContent-Length: %d\r\n\r\n" % len(_BODY) + _BODY,
}
_EVENT: Final = b'data: {"choices": [{"delta": {"content": "word"}}]}\n\n'
_EVENTS_PER_STREAM: Final = 8
_ANSWER: Final = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % 500 + b"y" * 500
_STREAM_HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

Figure = Literal["latency", "first chunk"]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report; times in milliseconds."""

    figure: Figure
    concurrency: int
    quantile: str
    direct_ms: float
    proxied_ms: float
    proxy_cpu_ms_per_call: float


# --- the three processes --------------------------------------------------------------------------


def _run_engine(listener: socket.socket) -> None:
    import uvloop  # noqa: PLC0415 - the children's; importing this file needs none of it

    uvloop.run(_serve(listener))


async def _serve(listener: socket.socket) -> None:
    server = await asyncio.start_server(_answer, sock=listener, backlog=1024)
    await server.serve_forever()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    event = b"%x\r\n%s\r\n" % (len(_EVENT), _EVENT)
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(len(_BODY) if b"content-length" in head else 0)
            if b"x-stream" not in head:
                writer.write(_ANSWER)
                continue
            writer.write(_STREAM_HEAD)
            for _ in range(_EVENTS_PER_STREAM):
                writer.write(event)
                await asyncio.sleep(0)
            writer.write(b"0\r\n\r\n")
    writer.close()


def _run_proxy(engine_port: int, proxy_port: int) -> None:
    from tokencake_proxy.server import run  # noqa: PLC0415
    from tokencake_proxy.settings import ProxySettings  # noqa: PLC0415

    run(ProxySettings(f"http://{_HOST}:{engine_port}", shutdown_grace_s=1), _HOST, proxy_port, "warning")


@contextlib.contextmanager
def _processes() -> Iterator[tuple[int, int, int]]:
    """Ports of engine and proxy, and the proxy's process id."""
    spawning = multiprocessing.get_context("spawn")
    with socket.create_server((_HOST, 0), backlog=1024) as listener, socket.create_server((_HOST, 0)) as probe:
        engine_port, proxy_port = listener.getsockname()[1], probe.getsockname()[1]
        probe.close()
        engine = spawning.Process(target=_run_engine, args=(listener,), daemon=True)
        proxy = spawning.Process(target=_run_proxy, args=(engine_port, proxy_port), daemon=True)
        engine.start()
        proxy.start()
        try:
            _wait_until_it_listens(proxy_port)
            yield engine_port, proxy_port, int(proxy.pid or 0)
        finally:
            for process, number in ((proxy, signal.SIGTERM), (engine, signal.SIGKILL)):
                os.kill(int(process.pid or 0), number)
                process.join()


def _wait_until_it_listens(port: int) -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            socket.create_connection((_HOST, port)).close()
        except ConnectionRefusedError:
            if time.monotonic() > deadline_s:
                raise SystemExit(f"the proxy did not start within {_START_TIMEOUT_S} s") from None
            time.sleep(0.05)
        else:
            return


# --- measuring ------------------------------------------------------------------------------------


async def _calls(port: int, figure: Figure, count: int) -> list[float]:
    """Seconds of `count` calls, one after another, on one connection, after one that opens it and is not counted.

    uvloop accepts one connection in each turn of its loop, so the first calls of many clients wait for each other.
    """
    reader, writer = await asyncio.open_connection(_HOST, port)
    times_s = []
    for _ in range(1 + count):
        began_s = time.perf_counter()
        writer.write(_REQUESTS[figure])
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 "):
            raise SystemExit(f"port {port} answered {head.splitlines()[0]!r}")
        if figure == "latency":
            await reader.readexactly(500)
            times_s.append(time.perf_counter() - began_s)
        else:
            await reader.readuntil(b"\n\n")
            times_s.append(time.perf_counter() - began_s)
            await reader.readuntil(b"\r\n0\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    return times_s[1:]


async def _measured(port: int, figure: Figure, concurrency: int, count: int) -> list[float]:
    share = max(1, count // concurrency)
    lists = await asyncio.gather(*(_calls(port, figure, share) for _ in range(concurrency)))
    return [time_s for times_s in lists for time_s in times_s]


async def _compared(
    engine_port: int, proxy_port: int, proxy_pid: int, figure: Figure, concurrency: int, count: int
) -> list[Row]:
    direct_s: list[float] = []
    proxied_s: list[float] = []
    cpu_s = 0.0
    for _ in range(_ROUNDS):
        direct_s += await _measured(engine_port, figure, concurrency, count // _ROUNDS)
        used_before_s = _cpu_s(proxy_pid)
        proxied_s += await _measured(proxy_port, figure, concurrency, count // _ROUNDS)
        cpu_s += _cpu_s(proxy_pid) - used_before_s
    return [
        Row(
            figure,
            concurrency,
            f"p{percent}",
            1e3 * statistics.quantiles(direct_s, n=100)[percent - 1],
            1e3 * statistics.quantiles(proxied_s, n=100)[percent - 1],
            1e3 * cpu_s / (len(proxied_s) + _ROUNDS * concurrency),
        )
        for percent in (50, 99)
    ]


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))


# --- reporting ------------------------------------------------------------------------------------


def _table(rows: list[Row]) -> str:
    titles = f"{'':11} calls {'':4} {'direct ms':>10} {'proxied ms':>11} {'added ms':>9} {'ratio':>6} CPU ms/call"
    return "\n".join(
        [
            titles,
            *(
                f"{row.figure:11} {row.concurrency:5} {row.quantile:4} {row.direct_ms:10.3f} {row.proxied_ms:11.3f} "
                f"{row.proxied_ms - row.direct_ms:9.3f} {row.proxied_ms / row.direct_ms:6.1f} "
                f"{row.proxy_cpu_ms_per_call:12.3f}"
                for row in rows
            ),
        ]
    )


def measure(requests: int) -> list[Row]:
    """The report's lines, each from `requests` direct and as many proxied calls."""
    import uvloop  # noqa: PLC0415

    figures: tuple[Figure, ...] = ("latency", "first chunk")
    with _processes() as (engine_port, proxy_port, proxy_pid):
        return [
            row
            for figure in figures
            for concurrency in _CONCURRENCIES
            for row in uvloop.run(_compared(engine_port, proxy_port, proxy_pid, figure, concurrency, requests))
        ]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="What does the proxy add to a call?")
    parser.add_argument("--requests", type=int, default=3_000, metavar="N", help="calls per line and side (3000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    if args.requests < 2 * _ROUNDS:
        parser.error(f"--requests is {args.requests}; expected {2 * _ROUNDS} or more")
    rows = measure(args.requests)
    print(_table(rows))
    if args.json is not None:
        report: dict[str, Any] = {
            "cpu_count": os.cpu_count(),
            "requests": args.requests,
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
