"""Work in processes of their own, side by side, such as vLLM engines with different settings."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch

from benchmarks.gpu.report import Report

Work: TypeAlias = Callable[[Report], Any]
LIMIT_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class _Child:
    name: str
    process: BaseProcess
    receiver: Connection
    log: Path


def run(report: Report, works: Mapping[str, Work], logs: Path) -> dict[str, Any]:
    """Run the works, each in a process of its own and all at once; their lines go to `report`.

    The processes are forked where this one has not touched CUDA, because importing vLLM takes many seconds. This one
    must not have computed with tensors either: OpenMP's threads do not survive a fork, a child that needs them hangs.

    Returns:
        What each work returned that came to its end; the others are faults in the report.
    """
    cuda: Any = torch.cuda
    context: Any = multiprocessing.get_context("spawn" if cuda.is_initialized() else "fork")
    children, results = list[_Child](), dict[str, Any]()
    for name, work in works.items():
        receiver, sender = context.Pipe(duplex=False)
        log = logs / f"{name.replace(' ', '-')}.log"
        process = context.Process(target=_body, args=(name, work, sender, log))
        process.start()
        sender.close()
        children.append(_Child(name, process, receiver, log))
    until_s = time.monotonic() + LIMIT_S
    while children:
        is_over = not wait(
            [end for c in children for end in (c.receiver, c.process.sentinel)], until_s - time.monotonic()
        )
        for child in list(children):
            is_dead = not child.process.is_alive()  # before the last look at what it has sent
            if _hear(child, report, results) or is_over or is_dead:
                if child.name not in results:
                    why = f"it took more than {LIMIT_S:.0f} s" if is_over else f"exit status {child.process.exitcode}"
                    report.tell(child.name, False, error=why, log=child.log.read_text(errors="replace")[-3000:])
                _end(child.process)
                children.remove(child)
    return results


def _hear(child: _Child, report: Report, results: dict[str, Any]) -> bool:
    """Take what the child has sent; returns whether it is through."""
    with suppress(EOFError):
        while child.receiver.poll():
            kind, content = child.receiver.recv()
            if kind == "line":
                report.add(json.loads(content))
            else:
                results[child.name] = content
                return True
    return False


def _end(process: BaseProcess) -> None:
    if process.pid is not None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.join()


def _body(name: str, work: Work, sender: Connection, log: Path) -> None:
    os.setsid()
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.dump_traceback_later(LIMIT_S - 5)
    report = Report(lambda line: sender.send(("line", line)))
    result = None
    try:
        result = work(report)
    except Exception as error:  # noqa: BLE001  # whatever it is, it is reported
        report.broke(name, error)
    sender.send(("result", result))
    os.killpg(0, signal.SIGKILL)  # the engine core too; vLLM's own way out takes seconds
