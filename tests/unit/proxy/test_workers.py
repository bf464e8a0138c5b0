"""A large body is processed in a worker process and blocks no other request."""

from __future__ import annotations

import asyncio
import json
import operator
import os
import time
from pathlib import Path

import pytest

from tests.harness.tenancy import SECRET, TENANTS, prefix_of
from tokencake_proxy.errors import Refusal, UpstreamError
from tokencake_proxy.json_work import PacedLock
from tokencake_proxy.media import is_costly_json
from tokencake_proxy.tenants import TenantScope
from tokencake_proxy.upstream import ForwardedRequest
from tokencake_proxy.workers import WorkerProcesses

MEMORY_BYTES = 2**30
SCOPE = TenantScope(TENANTS)
DEEP = ForwardedRequest("POST", b"/v1/completions", [], b"[" * 100_000)


@pytest.fixture
def workers():
    return WorkerProcesses(MEMORY_BYTES, processes=2)


async def test_the_function_runs_in_another_process(workers):
    assert await workers.run(os.getpid) != os.getpid()


async def test_large_arguments_and_results_arrive_complete(workers):
    body = os.urandom(3 * 2**20)

    assert await workers.run(operator.mul, body, 2) == body * 2


async def test_the_event_loop_continues_meanwhile(workers, tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it to read blocks until it is opened to write
    work = asyncio.create_task(workers.run(Path.read_text, tmp_path / "pipe"))
    await asyncio.to_thread((tmp_path / "pipe").write_text, "from the event loop")

    assert await work == "from the event loop"


async def test_a_refusal_is_raised_as_in_the_same_process(workers):
    with pytest.raises(Refusal) as here:
        SCOPE.scoped(DEEP, "completions")
    with pytest.raises(Refusal) as there:
        await workers.run(SCOPE.scoped, DEEP, "completions")

    assert (there.value.status, there.value.body()) == (here.value.status, here.value.body())


@pytest.mark.parametrize(
    "refusal",
    [Refusal(401, "invalid_api_key", "words", [(b"a", b"b")]), UpstreamError(502, "upstream_bad_answer", "words")],
)
async def test_every_kind_of_refusal_can_be_pickled(workers, refusal):
    (found,) = await workers.run(list, (refusal,))

    assert (type(found), found.body(), found.headers) == (type(refusal), refusal.body(), refusal.headers)


async def test_work_over_the_memory_limit_is_refused():
    with pytest.raises(Refusal) as refused:
        await WorkerProcesses(MEMORY_BYTES, processes=2).run(operator.mul, b"x" * 2**20, 2_000)

    assert (refused.value.status, refused.value.code) == (413, "body_too_costly")


async def test_a_dead_process_is_a_refusal_and_the_next_call_succeeds(workers):
    with pytest.raises(Refusal):
        await workers.run(os._exit, 9)

    assert await workers.run(operator.add, 1, 1) == 2


async def test_cancelling_ends_the_process(workers, tmp_path):
    os.mkfifo(tmp_path / "never")
    os.mkfifo(tmp_path / "pid")
    work = asyncio.create_task(workers.run(exec, _TELL_AND_WAIT.format(folder=str(tmp_path))))
    pid = int(await asyncio.to_thread((tmp_path / "pid").read_text))
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work

    await asyncio.to_thread(_wait_until_gone, pid)


_TELL_AND_WAIT = """
import os, pathlib
pathlib.Path("{folder}/pid").write_text(str(os.getpid()))
pathlib.Path("{folder}/never").read_text()
"""


def _wait_until_gone(pid):
    deadline_s = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline_s


@pytest.mark.parametrize("size_bytes", [10, 100_000])
def test_a_body_is_scoped_the_same_in_each_process(engine, start_proxy, http, size_bytes):
    proxy = start_proxy(engine.url, tenant_secret=SECRET.encode(), json_inline_bytes=1_000)
    body = {"prompt": "x" * size_bytes, "vllm_xargs": {"tokencake": '{"session": "s"}'}}

    http.post(f"{proxy.url}/v1/completions", json=body, headers={"Authorization": "Bearer alice"})

    (received,) = engine.calls
    hint = json.loads(json.loads(received.body)["vllm_xargs"]["tokencake"])
    assert hint["session"] == prefix_of("alice") + "s"
    assert json.loads(received.body)["prompt"] == body["prompt"]


@pytest.mark.parametrize(
    "body",
    [
        {"features": {"mm_hashes": {"image": ["a"] * 10_000}}},
        {"features": {"mm_hashes": {"image": ["\\"] * 20_000}}},
        {"features": {"mm_hashes": {"image": [1] * 10_000}}},
        {"messages": [{"content": [{"uuid": "a"}]}] * 5_000},
        {"messages": [*[{}] * 10_000, {"uuid": "a"}]},
        {str(number): 1 for number in range(10_000)},
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_body_of_many_names_is_costly(body, encoding):
    assert is_costly_json(json.dumps(body).encode(encoding))


def test_escaped_names_are_costly_too():
    assert is_costly_json(b'{"messages": [' + b"{}," * 10_000 + b'{"\\u0075uid": "a"}]}')


@pytest.mark.parametrize("text", ["word " * 200_000, 'say "yes", or {"no": 1}, ' * 40_000])
def test_a_long_prompt_is_not_costly(text):
    assert not is_costly_json(json.dumps({"messages": [{"role": "user", "content": text}]}).encode())


async def test_other_work_runs_between_two_holders_and_a_cancelled_waiter_blocks_none():
    lock, events = PacedLock(), []

    async def hold(name):
        async with lock:
            events.append(name)
            asyncio.get_running_loop().call_soon(events.append, f"after {name}")

    first, second, third = (asyncio.create_task(hold(name)) for name in "abc")
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.gather(first, second, third, return_exceptions=True)
    await asyncio.sleep(0)

    assert events == ["a", "after a", "c", "after c"]
