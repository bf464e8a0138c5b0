"""`tokencake demo`: several tasks through the team at once, on a vLLM of this machine, and what the engine saw."""

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
from typing import Any, Final

import httpx
import openai
from rich.console import Console
from rich.live import Live

import tokencake_langgraph
from code_team import report
from code_team.model import NAME, prepare_model
from code_team.team import build_team
from tokencake_langgraph import ChatTokencake
from tokencake_proxy.processes import (
    Processes,
    StartError,
    default_log_dir,
    engine_command,
    free_port,
    proxy_command,
    raise_on_sigterm,
)

MAX_TASKS: Final = 70
"""Of which the engine's state still shows every call."""

_TASKS: Final = (
    "a to-do list that is kept in a text file",
    "a converter between Celsius, Fahrenheit and Kelvin",
    "a word counter for folders of text files",
    "a small calculator with a history",
    "a tool that renames photos by their date",
    "a password generator with a strength check",
)

# A pool that the agents of three tasks do not all fit into at once, so that the scheduler has something to decide.
ENGINE_FLAGS: Final = (
    *("--max-model-len", "2048", "--block-size", "32", "--num-gpu-blocks-override", "192", "--max-num-seqs", "16"),
    *("--enforce-eager", "--enable-prompt-tokens-details", "--gpu-memory-utilization", "0.3"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
)
ENGINE_ENV: Final = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tokencake demo", description=__doc__)
    parser.add_argument("--tasks", type=int, default=3, metavar="N", help="tasks at once (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
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
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"  # all servers of the demo are here
    try:
        model = args.model or str(prepare_model())
        with Processes(default_log_dir() / "demo") as processes:
            base_url = _start_servers(processes, model, console)
            try:
                summary = asyncio.run(_run(base_url, args.tasks, None if args.no_progress else console))
            except (openai.APIError, httpx.HTTPError) as error:
                processes.check()  # if a server died, its log says more
                raise RuntimeError(f"a call failed: {error}") from error
    except (StartError, RuntimeError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    if args.json:
        args.json.write_text(json.dumps(summary, indent=2) + "\n")
    console.print(report.table(summary))
    share = summary["cached_tokens"] / max(1, summary["prompt_tokens"])
    stalled_s = sum(stall["seconds"] or 0.0 for stall in summary["stalls"])
    console.print(
        f"{summary['llm_calls']} LLM calls and {summary['tool_calls']} tool calls in {summary['wall_s']:.1f} s. "
        f"{share:.0%} of the prompt tokens came from the prefix cache instead of being computed again; "
        f"agents were stalled in tools for {stalled_s:.1f} s, each second of it known to the engine."
    )
    return 0


def _start_servers(processes: Processes, model: str, console: Console) -> str:
    engine_port, proxy_port = free_port(), free_port()
    engine = f"http://127.0.0.1:{engine_port}"
    flags = [*ENGINE_FLAGS, "--served-model-name", "demo"]
    processes.start("engine", engine_command(model, engine_port, flags), ENGINE_ENV)
    processes.start("proxy", proxy_command(engine, "127.0.0.1", proxy_port))
    console.print(f"Starting vLLM with {Path(model).name} and the proxy (logs in {processes.log_dir})")
    with console.status("loading, about a minute the first time"):
        processes.wait_until_healthy("engine", f"{engine}/health", timeout_s=600)
        processes.wait_until_healthy("proxy", f"http://127.0.0.1:{proxy_port}/health", timeout_s=30)
    return f"http://127.0.0.1:{proxy_port}"


async def _run(base_url: str, tasks: int, console: Console | None) -> dict[str, Any]:
    model = ChatTokencake(model="demo", base_url=f"{base_url}/v1", temperature=0, max_retries=0)
    async with httpx.AsyncClient(base_url=base_url, timeout=30) as client:
        with tempfile.TemporaryDirectory(prefix="tokencake-demo-") as scratch:
            team = build_team(model, Path(scratch))
            started = time.monotonic()
            async with _progress(client, console):
                await asyncio.gather(*(team.ainvoke({"task": _TASKS[number % len(_TASKS)]}) for number in range(tasks)))
            wall_s = time.monotonic() - started
        await asyncio.to_thread(tokencake_langgraph.flush, 5.0)
        return {**report.summarise(await _state(client)), "wall_s": wall_s}


async def _state(client: httpx.AsyncClient) -> dict[str, Any]:
    answer = await client.get("/v1/tokencake/state", params={"limit": 1_000})
    answer.raise_for_status()
    state: dict[str, Any] = answer.json()
    return state


@contextlib.asynccontextmanager
async def _progress(client: httpx.AsyncClient, console: Console | None) -> AsyncIterator[None]:
    """Show the engine's view while the body runs, twice a second."""
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
