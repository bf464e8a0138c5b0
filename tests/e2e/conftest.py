"""One real vLLM with the plug-in and one proxy for the whole run, and on request a vLLM without the plug-in."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

import tokencake_langgraph
from tokencake_cli.processes import STOCK_ENV, Processes, engine_command, free_port, proxy_command, stock_command
from tokencake_langgraph import ChatTokencake

PATIENCE_S = 60
"""How long a test waits for an expected event; it only ends a hang."""
API_KEY = "secret-of-the-tests"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
FLAGS = (
    *("--served-model-name", "tiny", "--max-model-len", "4096", "--block-size", "32", "--max-num-seqs", "32"),
    *("--num-gpu-blocks-override", "400", "--enforce-eager", "--enable-prompt-tokens-details"),
    *("--gpu-memory-utilization", "0.1"),  # several engines share one GPU, where there is one
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    *("--additional-config", '{"tokencake": {"measure": {"steps": 5000}}}'),
    *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
)
ENV = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


@dataclass(frozen=True)
class Server:
    """A running engine and the proxy before it."""

    engine: str
    proxy: str
    processes: Processes

    def chat(self, **kwargs: object) -> ChatTokencake:
        options = {
            "model": "tiny",
            "base_url": f"{self.proxy}/v1",
            "api_key": API_KEY,
            "temperature": 0,
            "max_tokens": 100,
        }
        return ChatTokencake(**{**options, "max_retries": 0, **kwargs})

    def state(self, **query: object) -> dict:
        """The engine's state, all its pages in one, once every event sent so far has arrived."""
        assert tokencake_langgraph.flush(PATIENCE_S)
        pages: list[dict] = []
        while not pages or pages[-1]["next"] is not None:
            before = {"before": pages[-1]["next"]} if pages else {}
            params = {**query, "limit": 200, **before}
            answer = httpx.get(f"{self.engine}/v1/tokencake/state", params=params, headers=self.auth, timeout=30)
            answer.raise_for_status()
            pages.append(answer.json())
        whole = pages[-1]
        for page in reversed(pages[:-1]):
            parts = {part: {**whole[part], **page[part]} for part in ("apps", "sessions")}
            whole = {**page, **parts, "calls": whole["calls"] + page["calls"]}
        return whole

    def metric(self, line: str) -> float:
        """The value of one line of /metrics, 0 where it is not there yet."""
        text = httpx.get(f"{self.engine}/metrics", timeout=30).text
        values = [row.rsplit(" ", 1)[1] for row in text.splitlines() if row.startswith(f"{line} ")]
        return float(values[0]) if values else 0.0

    @property
    def auth(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {API_KEY}"}


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Look five times a second until `condition` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.2)


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    engine_port, proxy_port = free_port(), free_port()
    engine, proxy = f"http://127.0.0.1:{engine_port}", f"http://127.0.0.1:{proxy_port}"
    with Processes(tmp_path_factory.mktemp("logs")) as processes:
        flags = [*FLAGS, "--api-key", API_KEY]
        processes.start("engine", engine_command(str(tiny_model), engine_port, flags), ENV)
        processes.start("proxy", proxy_command(engine, "127.0.0.1", proxy_port))
        processes.wait_until_healthy("engine", f"{engine}/health", timeout_s=8 * PATIENCE_S)
        processes.wait_until_healthy("proxy", f"{proxy}/health", timeout_s=PATIENCE_S)
        yield Server(engine, proxy, processes)


@pytest.fixture(scope="module")
def stock_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """vLLM with no plug-in loaded, behind the proxy."""
    engine_port, proxy_port = free_port(), free_port()
    engine, proxy = f"http://127.0.0.1:{engine_port}", f"http://127.0.0.1:{proxy_port}"
    command = stock_command(str(tiny_model), engine_port, [*FLAGS, "--api-key", API_KEY])
    with Processes(tmp_path_factory.mktemp("stock-logs")) as processes:
        processes.start("engine", command, {**ENV, **STOCK_ENV})
        processes.start("proxy", proxy_command(engine, "127.0.0.1", proxy_port))
        processes.wait_until_healthy("engine", f"{engine}/health", timeout_s=8 * PATIENCE_S)
        processes.wait_until_healthy("proxy", f"{proxy}/health", timeout_s=PATIENCE_S)
        yield Server(engine, proxy, processes)
