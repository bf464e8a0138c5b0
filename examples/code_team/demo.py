"""`tokencake demo`: several tasks for the team at once, on a vLLM of this machine, with the engine's figures."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import httpx
import openai
from rich.console import Console
from rich.live import Live

import tokencake_langgraph
from code_team import report
from code_team.model import NAME, prepare_model
from code_team.team import build_team
from code_team.tools import BUILD_MACHINE_S
from tokencake_cli.processes import (
    STOCK_ENV,
    Processes,
    StartError,
    default_log_dir,
    engine_command,
    free_port,
    proxy_command,
    raise_on_sigterm,
    stock_command,
)
from tokencake_langgraph import ChatTokencake

MAX_TASKS: Final = 70
"""More tasks make more calls than the engine's state shows."""

EngineKind = Literal["tokencake", "stock"]

_TASKS: Final = (
    "a to-do list that is kept in a text file",
    "a converter between Celsius, Fahrenheit and Kelvin",
    "a word counter for folders of text files",
    "a small calculator with a history",
    "a tool that renames photos by their date",
    "a password generator with a strength check",
)

# A third of the KV memory that the agents of three tasks need at once, so that the schedulers have to decide.
ENGINE_FLAGS: Final = (
    *("--max-model-len", "2048", "--block-size", "32", "--num-gpu-blocks-override", "112", "--max-num-seqs", "16"),
    *("--enforce-eager", "--enable-prompt-tokens-details", "--gpu-memory-utilization", "0.3"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
)
ENGINE_ENV: Final = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tokencake demo", description=__doc__)
    parser.add_argument("--tasks", type=int, default=3, metavar="N", help="tasks at once (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--no-stock", action="store_true", help="do not run the same tasks on stock vLLM to compare")
    parser.add_argument("--no-progress", action="store_true", help="print no live table")
    parser.add_argument("--model", metavar="DIR", help=f"a model folder in place of {NAME}")
    args = parser.parse_args(argv)
    if not 1 <= args.tasks <= MAX_TASKS:
        parser.error(f"--tasks is {args.tasks}; expected a number from 1 to {MAX_TASKS}")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.parent}")
    return args


def main(argv: Sequence[str]) -> int:
    """Run the demo; returns the exit status."""
    args = _arguments(argv)
    console = Console()
    raise_on_sigterm()
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"  # all servers of the demo are on this machine
    try:
        model = args.model or str(prepare_model())
        summary = _measure("tokencake", model, args, console)
        if not args.no_stock:
            summary["stock"] = _measure("stock", model, args, console)
    except (StartError, RuntimeError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    if args.json:
        args.json.write_text(json.dumps(summary, indent=2) + "\n")
    console.print(report.table(summary))
    console.print(report.kv_summary(summary))
    if "stock" in summary:
        console.print(report.comparison(summary, summary["stock"]))
    return 0


def _measure(kind: EngineKind, model: str, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the tasks on one engine: with TokenCake, or stock vLLM without plug-ins."""
    with Processes(default_log_dir() / "demo" / kind) as processes:
        engine, proxy = _start_servers(processes, kind, model, console)
        is_watched = kind == "tokencake" and not args.no_progress
        try:
            return asyncio.run(_run(engine, proxy, kind, args.tasks, console if is_watched else None))
        except (openai.APIError, httpx.HTTPError) as error:
            processes.check()  # if a server has died, its log is more informative
            raise RuntimeError(f"a call failed: {error}") from error


def _start_servers(processes: Processes, kind: EngineKind, model: str, console: Console) -> tuple[str, str]:
    """Base URLs of the engine and of its proxy."""
    engine_port, proxy_port = free_port(), free_port()
    engine = f"http://127.0.0.1:{engine_port}"
    flags = [*ENGINE_FLAGS, "--served-model-name", "demo"]
    if kind == "stock":
        processes.start("engine", stock_command(model, engine_port, flags), {**ENGINE_ENV, **STOCK_ENV})
    else:
        processes.start("engine", engine_command(model, engine_port, flags), ENGINE_ENV)
    processes.start("proxy", proxy_command(engine, "127.0.0.1", proxy_port))
    name = "vLLM with TokenCake" if kind == "tokencake" else "stock vLLM for comparison"
    console.print(f"Starting {name}, {Path(model).name} and the proxy (logs in {processes.log_dir})")
    with console.status("loading, about a minute the first time"):
        processes.wait_until_healthy("engine", f"{engine}/health", timeout_s=600)
        processes.wait_until_healthy("proxy", f"http://127.0.0.1:{proxy_port}/health", timeout_s=30)
    return engine, f"http://127.0.0.1:{proxy_port}"


async def _run(engine: str, proxy: str, kind: EngineKind, tasks: int, console: Console | None) -> dict[str, Any]:
    model = ChatTokencake(
        model="demo",
        base_url=f"{proxy}/v1",
        temperature=0,
        max_retries=0,
        tool_estimates={"run_tests": BUILD_MACHINE_S + 0.5},
    )
    async with httpx.AsyncClient(base_url=proxy, timeout=30) as client:
        with tempfile.TemporaryDirectory(prefix="tokencake-demo-") as scratch:
            team = build_team(model, Path(scratch))
            task_s: list[float] = []

            async def work(number: int) -> None:
                await team.ainvoke({"task": _TASKS[number % len(_TASKS)]})
                task_s.append(time.monotonic() - started)

            started = time.monotonic()
            async with _progress(client, console):
                await asyncio.gather(*(work(number) for number in range(tasks)))
            wall_s = time.monotonic() - started
        await asyncio.to_thread(tokencake_langgraph.flush, 5.0)
        metrics = await client.get(f"{engine}/metrics")
        metrics.raise_for_status()
        measured = {"wall_s": wall_s, "task_s": task_s, **report.read_metrics(metrics.text)}
        return {**report.summarise(await _state(client)), **measured} if kind == "tokencake" else measured


async def _state(client: httpx.AsyncClient) -> dict[str, Any]:
    """The engine's state with the newest 1,000 calls: five pages of 200."""
    pages: list[dict[str, Any]] = []
    params: dict[str, Any] = {"limit": 200}
    for _ in range(5):
        answer = await client.get("/v1/tokencake/state", params=params)
        answer.raise_for_status()
        pages.append(answer.json())
        params["before"] = pages[-1]["next"]
        if params["before"] is None:
            break
    state: dict[str, Any] = {"calls": [], "apps": {}, "sessions": {}}
    for page in reversed(pages):
        state["calls"] += page["calls"]
        state["apps"] |= page["apps"]
        state["sessions"] |= page["sessions"]
    return state


@contextlib.asynccontextmanager
async def _progress(client: httpx.AsyncClient, console: Console | None) -> AsyncIterator[None]:
    """Show the engine's state twice a second while the body runs."""
    if console is None:
        yield
        return

    async def watch(live: Live) -> None:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                live.update(report.progress(await _state(client)))
            await asyncio.sleep(0.5)

    with Live(console=console, transient=True, auto_refresh=True) as live:
        task = asyncio.create_task(watch(live))
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
