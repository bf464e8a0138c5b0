"""Runs an app of `lazy_apps` twice, in a process that has created no model before.

A program: LangChain and LangGraph are imported once, this project is not. For each line of JSON on standard input,
`{"app": name, "moment": "start" or "inside", "base_url": url}`, a forked child plays the app and answers with one line:
`ok`, or the error. At the moment "start" the project is imported before the app begins, else by the first node.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback

import lazy_apps  # a program: its own folder is on the path


def play(order: dict[str, str]) -> None:
    lazy_apps.url = order["base_url"]
    assert "tokencake_langgraph" not in sys.modules
    if order["moment"] == "start":
        importlib.import_module("tokencake_langgraph")
    app = getattr(lazy_apps, order["app"])()
    app()
    app()
    importlib.import_module("tokencake_langgraph").flush()
    lifecycle = importlib.import_module("tokencake_langgraph.lifecycle").LIFECYCLE
    assert len(lifecycle._tree) == 0, f"{len(lifecycle._tree)} runs are left open"


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what an app prints is no answer
    for line in sys.stdin:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            play(json.loads(line))
            answers.write("ok\n")
        except BaseException:  # noqa: BLE001 - the test shows it
            answers.write(json.dumps(traceback.format_exc()) + "\n")
        answers.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
