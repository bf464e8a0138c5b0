"""Overhead of the proxy for one call.

An engine that answers at once, the proxy in front of it and this client are three processes. Direct and proxied calls
take turns within one run, so that both meet the same machine; figures of different runs are not to be compared.

    python benchmarks/proxy_overhead.py [--requests N] [--json FILE] [--against CHECKOUT]

`latency` is from sending a 2 kB chat completion to having the whole answer, `first chunk` to having the first event of
a stream. Client, proxy and engine share the cores: with few of them, figures above one call at a time say how long the
processes waited for each other, and the proxy's CPU time per call is the one to trust. With `--against`, the proxy of
another revision, checked out in a folder, takes turns with this one.
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
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.context import SpawnProcess

_CONCURRENCIES: Final = (1, 16, 64)
_ROUNDS: Final = 30
_HOST: Final = "127.0.0.1"
_THIS: Final = Path(__file__).resolve().parents[1]
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

    proxy: str
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


def _run_proxy(engine_port: int, proxy_port: int, checkout: Path) -> None:
    sys.path[:0] = [str(checkout / "proxy"), str(checkout / "engine")]
    from tokencake_proxy.server import run  # noqa: PLC0415
    from tokencake_proxy.settings import ProxySettings  # noqa: PLC0415

    run(ProxySettings(f"http://{_HOST}:{engine_port}", shutdown_grace_s=1), _HOST, proxy_port, "warning")


@dataclass(frozen=True, slots=True)
class _Proxy:
    name: str
    port: int
    pid: int


@contextlib.contextmanager
def _processes(checkouts: dict[str, Path]) -> Iterator[tuple[int, list[_Proxy]]]:
    """The port of the engine, and a proxy of each checkout."""
    spawning = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as running:
        listener = running.enter_context(socket.create_server((_HOST, 0), backlog=1024))
        engine_port = listener.getsockname()[1]
        engine = spawning.Process(target=_run_engine, args=(listener,), daemon=True)
        running.callback(_end, engine, signal.SIGKILL)
        engine.start()
        proxies = []
        for name, checkout in checkouts.items():
            with socket.create_server((_HOST, 0)) as probe:
                port = probe.getsockname()[1]
            process = spawning.Process(target=_run_proxy, args=(engine_port, port, checkout), daemon=True)
            running.callback(_end, process, signal.SIGTERM)
            process.start()
            proxies.append(_Proxy(name, port, int(process.pid or 0)))
        for proxy in proxies:
            _wait_until_it_listens(proxy.port)
        yield engine_port, proxies


def _end(process: SpawnProcess, number: signal.Signals) -> None:
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


async def _compared(engine_port: int, proxies: list[_Proxy], figure: Figure, concurrency: int, count: int) -> list[Row]:
    direct_s: list[float] = []
    proxied_s: dict[_Proxy, list[float]] = {proxy: [] for proxy in proxies}
    cpu_s = dict.fromkeys(proxies, 0.0)
    for round_number in range(_ROUNDS):
        direct_s += await _measured(engine_port, figure, concurrency, count // _ROUNDS)
        for proxy in proxies[:: 1 if round_number % 2 else -1]:
            used_before_s = _cpu_s(proxy.pid)
            proxied_s[proxy] += await _measured(proxy.port, figure, concurrency, count // _ROUNDS)
            cpu_s[proxy] += _cpu_s(proxy.pid) - used_before_s
    return [
        Row(
            proxy.name,
            figure,
            concurrency,
            f"p{percent}",
            1e3 * statistics.quantiles(direct_s, n=100)[percent - 1],
            1e3 * statistics.quantiles(proxied_s[proxy], n=100)[percent - 1],
            1e3 * cpu_s[proxy] / (len(proxied_s[proxy]) + _ROUNDS * concurrency),
        )
        for percent in (50, 99)
        for proxy in proxies
    ]


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))


# --- reporting ------------------------------------------------------------------------------------


def _table(rows: list[Row]) -> str:
    titles = (
        f"{'':5} {'':11} calls {'':4} {'direct ms':>10} {'proxied ms':>11} {'added ms':>9} {'ratio':>6} CPU ms/call"
    )
    return "\n".join(
        [
            titles,
            *(
                f"{row.proxy:5} {row.figure:11} {row.concurrency:5} {row.quantile:4} "
                f"{row.direct_ms:10.3f} {row.proxied_ms:11.3f} "
                f"{row.proxied_ms - row.direct_ms:9.3f} {row.proxied_ms / row.direct_ms:6.1f} "
                f"{row.proxy_cpu_ms_per_call:12.3f}"
                for row in rows
            ),
        ]
    )


def measure(requests: int, against: Path | None) -> list[Row]:
    """The report's lines, each from `requests` direct and as many proxied calls."""
    import uvloop  # noqa: PLC0415

    figures: tuple[Figure, ...] = ("latency", "first chunk")
    checkouts = {"this": _THIS} | ({} if against is None else {"other": against})
    with _processes(checkouts) as (engine_port, proxies):
        return [
            row
            for figure in figures
            for concurrency in _CONCURRENCIES
            for row in uvloop.run(_compared(engine_port, proxies, figure, concurrency, requests))
        ]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="What does the proxy add to a call?")
    parser.add_argument("--requests", type=int, default=6_000, metavar="N", help="calls per line and side (6000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="a folder with another revision")
    args = parser.parse_args()
    if args.against is not None and not (args.against / "proxy" / "tokencake_proxy").is_dir():
        parser.error(f"--against is {args.against}, which holds no proxy/tokencake_proxy; expected a checkout")
    if args.requests < 2 * _ROUNDS:
        parser.error(f"--requests is {args.requests}; expected {2 * _ROUNDS} or more")
    rows = measure(args.requests, args.against)
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
