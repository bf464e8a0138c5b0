"""A large body is read in another process, and stops no other call."""

from __future__ import annotations

import asyncio
import json
import operator
import os
import time
from pathlib import Path

import pytest

from tests.harness.tenancy import SECRET, TENANTS, prefix_of
from tokencake_proxy.apart import Apart, Turns
from tokencake_proxy.errors import Refusal, UpstreamError
from tokencake_proxy.media import is_costly
from tokencake_proxy.tenants import TenantScope
from tokencake_proxy.upstream import Call

MEMORY_BYTES = 2**30
SCOPE = TenantScope(TENANTS)
DEEP = Call("POST", b"/v1/completions", [], b"[" * 100_000)


@pytest.fixture
def apart():
    return Apart(MEMORY_BYTES, processes=2)


async def test_the_work_is_done_in_another_process(apart):
    assert await apart.run(os.getpid) != os.getpid()


async def test_large_arguments_and_answers_pass_whole(apart):
    body = os.urandom(3 * 2**20)

    assert await apart.run(operator.mul, body, 2) == body * 2


async def test_the_event_loop_goes_on_meanwhile(apart, tmp_path):
    os.mkfifo(tmp_path / "pipe")  # who opens it to read waits for who opens it to write
    work = asyncio.create_task(apart.run(Path.read_text, tmp_path / "pipe"))
    await asyncio.to_thread((tmp_path / "pipe").write_text, "from the event loop")

    assert await work == "from the event loop"


async def test_a_refusal_comes_back_as_it_was_raised(apart):
    with pytest.raises(Refusal) as here:
        SCOPE.scoped(DEEP, "completions")
    with pytest.raises(Refusal) as there:
        await apart.run(SCOPE.scoped, DEEP, "completions")

    assert (there.value.status, there.value.body) == (here.value.status, here.value.body)


@pytest.mark.parametrize(
    "refusal",
    [Refusal(401, "invalid_api_key", "words", [(b"a", b"b")]), UpstreamError(502, "upstream_bad_answer", "words")],
)
async def test_every_kind_of_refusal_passes_between_processes(apart, refusal):
    (found,) = await apart.run(list, (refusal,))

    assert (type(found), found.body, found.lines) == (type(refusal), refusal.body, refusal.lines)


async def test_work_that_takes_more_memory_than_it_may_is_refused():
    with pytest.raises(Refusal) as refused:
        await Apart(MEMORY_BYTES, processes=2).run(operator.mul, b"x" * 2**20, 2_000)

    assert (refused.value.status, refused.value.code) == (413, "body_too_costly")


async def test_a_process_that_dies_is_a_refusal_and_the_next_call_succeeds(apart):
    with pytest.raises(Refusal):
        await apart.run(os._exit, 9)

    assert await apart.run(operator.add, 1, 1) == 2


async def test_to_cancel_ends_the_process(apart, tmp_path):
    os.mkfifo(tmp_path / "never")
    os.mkfifo(tmp_path / "pid")
    work = asyncio.create_task(apart.run(exec, _TELL_AND_WAIT.format(folder=str(tmp_path))))
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
def test_a_body_is_scoped_the_same_wherever_it_is_read(engine, start_proxy, http, size_bytes):
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
def test_a_body_of_many_names_is_costly_whatever_its_size(body, encoding):
    assert is_costly(json.dumps(body).encode(encoding))


def test_names_in_escapes_are_as_costly():
    assert is_costly(b'{"messages": [' + b"{}," * 10_000 + b'{"\\u0075uid": "a"}]}')


@pytest.mark.parametrize("text", ["word " * 200_000, 'say "yes", or {"no": 1}, ' * 40_000])
def test_a_long_prompt_is_not_costly(text):
    assert not is_costly(json.dumps({"messages": [{"role": "user", "content": text}]}).encode())


async def test_other_calls_go_on_between_turns_and_one_that_is_given_up_blocks_none():
    turns, events = Turns(), []

    async def take_turn(name):
        async with turns:
            events.append(name)
            asyncio.get_running_loop().call_soon(events.append, f"after {name}")

    first, second, third = (asyncio.create_task(take_turn(name)) for name in "abc")
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.gather(first, second, third, return_exceptions=True)
    await asyncio.sleep(0)

    assert events == ["a", "after a", "c", "after c"]
