"""An OpenAI-compatible server in this process that follows directives in the prompt and records its requests.

Directives in the system or user text: `CALL[a,b|c]` calls the tools a and b, then c; `HOLD` answers only after
`release()`; `FAIL` answers with status 400.
"""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tokencake.protocol import EVENTS_PATH, Hint, parse_event, parse_hint


@dataclass(frozen=True, slots=True)
class Request:
    """One chat completion as it arrived."""

    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def hint(self) -> Hint:
        return parse_hint(self.body["vllm_xargs"]["tokencake"])


class ScriptedEngine:
    """The server. `events_status` is what the events endpoint answers; `is_events_held` lets it hang."""

    def __init__(self) -> None:
        engine = self

        class Handler(_Handler):
            pass

        Handler.engine = engine
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._changed = threading.Condition()
        self._released = threading.Event()
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self.events_url = self.base_url.removesuffix("/v1") + EVENTS_PATH
        self.reset()
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def reset(self) -> None:
        self.requests: list[Request] = []
        self.events: list[dict[str, Any]] = []
        self.event_headers: list[dict[str, str]] = []
        self.events_status = 200
        self.is_events_held = False
        self.report: dict[str, Any] | None = None
        self.reasoning: str | None = None
        self.usage = _USAGE
        self.tool_call_id: Callable[[str], str] = lambda name: f"call_{uuid.uuid4().hex[:12]}"
        self._released.clear()

    def close(self) -> None:
        self.release()
        self._server.shutdown()
        self._server.server_close()

    def release(self) -> None:
        """Let all held requests continue."""
        self._released.set()

    def hold(self) -> None:
        self._released.wait(20)

    def record(self, what: list[Any], *items: Any) -> None:
        with self._changed:
            what.extend(items)
            self._changed.notify_all()

    def wait_for(self, is_there: Callable[[], bool]) -> None:
        """Wait until `is_there()`, which is called after each arrival."""
        with self._changed:
            assert self._changed.wait_for(is_there, 10), "it did not arrive within 10 s"

    # --- what the tests read ---

    @property
    def hints(self) -> list[Hint]:
        return [request.hint for request in self.requests]

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == kind]

    @property
    def sessions(self) -> set[str]:
        return {hint.session for hint in self.hints}

    @property
    def tool_story(self) -> list[tuple[str, str, str]]:
        """`(tool, call, status)` of every tool call that started and ended, in the order of their ends."""
        ends = self.of_type("tool_end")
        starts = {(event["call"], event["tool_call"]): event["tool"] for event in self.of_type("tool_start")}
        assert len(starts) == len(self.of_type("tool_start")) == len(ends)
        return [(starts[event["call"], event["tool_call"]], event["call"], event["status"]) for event in ends]


class _Handler(BaseHTTPRequestHandler):
    engine: ScriptedEngine
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        if self.path == EVENTS_PATH:
            self._take_events(body, headers)
        elif self.path == "/v1/chat/completions":
            self.engine.record(self.engine.requests, Request(body, headers))
            self._complete(body)
        else:
            self._answer(404, {"error": {"message": self.path}})

    def _take_events(self, body: dict[str, Any], headers: dict[str, str]) -> None:
        if self.engine.is_events_held:
            self.engine.hold()
        self.engine.record(self.engine.event_headers, headers)
        if self.engine.events_status == 200:
            for event in body["events"]:
                parse_event(event)
            self.engine.record(self.engine.events, *body["events"])
        self._answer(self.engine.events_status, {"v": 1})

    def _complete(self, body: dict[str, Any]) -> None:
        text = " ".join(_text(message) for message in body["messages"])
        if "HOLD" in text:
            self.engine.hold()
        if "FAIL" in text:
            self._answer(400, {"error": {"message": "as scripted", "type": "scripted"}})
            return
        reply = _reply(body, self.engine.tool_call_id)
        if self.engine.reasoning:
            reply["reasoning_content"] = self.engine.reasoning
        if body.get("stream"):
            self._stream(body, reply)
        else:
            choices = [
                {"index": index, "message": reply, "finish_reason": "tool_calls" if "tool_calls" in reply else "stop"}
                for index in range(body.get("n") or 1)
            ]
            answer = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"]}
            self._answer(200, {**answer, "choices": choices, "usage": self.engine.usage, **self._report()})

    def _report(self) -> dict[str, Any]:
        return {} if self.engine.report is None else {"kv_transfer_params": {"tokencake": self.engine.report}}

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:  # the client has disconnected
            self.close_connection = True

    def _stream(self, body: dict[str, Any], reply: dict[str, Any]) -> None:
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        reasoning = reply.get("reasoning_content") or ""
        deltas += [{"reasoning_content": part} for part in re.findall(r"\S+\s*", reasoning)]
        deltas += [{"tool_calls": [{"index": i, **call}]} for i, call in enumerate(reply.get("tool_calls") or ())]
        deltas += [{"content": part} for part in re.findall(r"\S+\s*", reply.get("content") or "")]
        chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
        chunks = [{**chunk, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
        reason = "tool_calls" if "tool_calls" in reply else "stop"
        last = {"index": 0, "delta": {}, "finish_reason": reason}
        chunks.append({**chunk, "choices": [last], **self._report()})
        if (body.get("stream_options") or {}).get("include_usage"):
            chunks.append({**chunk, "choices": [], "usage": self.engine.usage, **self._report()})
        self.close_connection = True
        try:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            for part in (*map(json.dumps, chunks), "[DONE]"):
                self.wfile.write(f"data: {part}\n\n".encode())
        except OSError:  # the client has disconnected
            pass


_USAGE = {
    "prompt_tokens": 10,
    "completion_tokens": 5,
    "total_tokens": 15,
    "prompt_tokens_details": {"cached_tokens": 4},
}


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return " ".join(part.get("text", "") for part in content)
    return content or ""


def _reply(body: dict[str, Any], tool_call_id: Callable[[str], str]) -> dict[str, Any]:
    functions = {tool["function"]["name"]: tool["function"] for tool in body.get("tools") or ()}
    names = _due_tools(body, functions)
    if names:
        calls = [
            {
                "id": tool_call_id(name),
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(_example(functions[name].get("parameters") or {}))},
            }
            for name in names
        ]
        return {"role": "assistant", "content": None, "tool_calls": calls}
    schema = ((body.get("response_format") or {}).get("json_schema") or {}).get("schema")
    content = json.dumps(_example(schema)) if schema else "all is well"
    return {"role": "assistant", "content": content}


def _due_tools(body: dict[str, Any], functions: dict[str, Any]) -> list[str]:
    choice = body.get("tool_choice")
    if isinstance(choice, dict):
        return [choice["function"]["name"]]
    called = [call["function"]["name"] for message in body["messages"] for call in message.get("tool_calls") or ()]
    for message in body["messages"]:
        if message["role"] not in ("system", "user"):
            continue
        for rounds in re.findall(r"CALL\[(.*?)\]", _text(message)):
            for names in rounds.split("|"):
                due = [name for name in names.split(",") if name in functions]
                if due and not all(name in called for name in due):
                    return due
    return []


def _example(schema: dict[str, Any]) -> Any:
    if schema.get("type") == "object" or "properties" in schema:
        return {name: _example(part) for name, part in schema.get("properties", {}).items()}
    return {"integer": 1, "number": 1.0, "boolean": True, "array": []}.get(schema.get("type", ""), "x")
