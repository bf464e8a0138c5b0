"""Engine loop without a model: steps are scheduled ahead as in vLLM, and every request is answered with token 7."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any

from tests.harness.scheduler import BLOCK_TOKENS
from tests.harness.tenancy import marked
from tokencake import protocol

LIMIT = 3_000
"""Steps after which a test is taken to run for ever."""
ANSWER = 7
"""The token that every answer consists of."""


def hint(app: str, *, tenant: str = "", **fields: object) -> str:
    """A hint as its client sends it, or as the proxy passes it on for `tenant`."""
    parsed = protocol.Hint(session=f"{app}/session", app=app, **fields)
    return marked(parsed, tenant) if tenant else parsed.to_json()


def as_json(value: Any) -> Any:
    """The value as it arrives over JSON."""
    return json.loads(json.dumps(value))


class Batch:
    """A step under way: the requests that get a token, and the full blocks that each request fills."""

    def __init__(self, output: Any, scheduler: Any) -> None:
        self.output = output
        self.sampling = {n for n in output.num_scheduled_tokens if not scheduler.requests[n].is_prefill_chunk}
        self.spans: list[tuple[Any, list[int], int, int]] = []
        """Request, its block ids, and the first (inclusive) and last (exclusive) block that the step fills."""
        for name, count in output.num_scheduled_tokens.items():
            request = scheduler.requests[name]
            table = list(scheduler.kv_cache_manager.get_block_ids(name)[0])
            end = request.num_computed_tokens
            self.spans.append((request, table, (end - count) // BLOCK_TOKENS, min(end // BLOCK_TOKENS, len(table))))


class StepLoop:
    """Schedules the steps of a scheduler and answers them.

    Args:
        scheduler: of vLLM, or the plug-in's.
        depth: steps under way at a time, the one being scheduled included; by default as in vLLM.
    """

    def __init__(self, scheduler: Any, depth: int | None = None) -> None:
        self.scheduler = scheduler
        self.pool = scheduler.kv_cache_manager.block_pool
        self.depth = depth or (2 if scheduler.scheduler_config.async_scheduling else 1)
        self.under_way: deque[Batch] = deque()
        self.transfers: Any = None
        """What the worker reports with the next step that completes."""
        self.trace: list[dict[str, int]] = []
        """Tokens of each request in each step."""
        self.received: Counter[str] = Counter()
        """Tokens that reached the client of each request."""
        self.kv_params: dict[str, Any] = {}
        """`kv_transfer_params` that each finished request was answered with."""
        self.ends: dict[str, list[str]] = {}
        """Reasons for which each request, or turn, ended."""
        self.preempted: Counter[str] = Counter()
        self.new: Counter[str] = Counter()
        """Steps in which the worker got the request as a new one."""
        self.finished_ids: Counter[str] = Counter()

    def add(self, *requests: Any) -> None:
        for request in requests:
            self.scheduler.add_request(request)

    def step(self, **how: bool) -> Any:
        """Schedule a step, and complete the oldest one if vLLM would wait for it here (`how`: see `complete`)."""
        output = self.scheduler.schedule()
        self.trace.append(dict(output.num_scheduled_tokens))
        self.preempted.update(output.preempted_req_ids or ())
        self.new.update(request.req_id for request in output.scheduled_new_reqs)
        self.finished_ids.update(output.finished_req_ids)
        self.under_way.append(Batch(output, self.scheduler))
        has_more = output.total_num_scheduled_tokens or self.scheduler.has_requests()
        if len(self.under_way) >= self.depth or not has_more:
            self.complete(**how)
        return output

    def complete(self) -> None:
        """The device has finished the oldest step under way."""
        from vllm.v1.outputs import ModelRunnerOutput

        batch = self.under_way.popleft()
        names = list(batch.output.num_scheduled_tokens)
        groups = self.scheduler.update_from_output(
            batch.output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=[[ANSWER] if name in batch.sampling else [] for name in names],
                logprobs=None,
                prompt_logprobs_dict={},
                pooler_output=[],
                kv_connector_output=self.transfers,
            ),
        )
        for output in (output for group in groups.values() for output in group.outputs):
            self.received[output.request_id] += len(output.new_token_ids)
            if output.finish_reason is not None:
                self.ends.setdefault(output.request_id, []).append(str(output.finish_reason))
                self.kv_params[output.request_id] = output.kv_transfer_params

    def run(self, limit: int = LIMIT, *, until: Callable[[], bool] | None = None, **how: bool) -> None:
        """Step until nothing is left to do, or `until` holds (`how`: see `complete`)."""
        for _ in range(limit):
            if until is not None and until():
                return
            if self.scheduler.has_requests():
                self.step(**how)
            elif self.under_way:
                self.complete(**how)
            else:
                assert until is None, "every request ended before the condition held"
                return
        raise AssertionError(f"the engine is not idle after {limit} steps")

    def order(self) -> list[str]:
        """Requests in the order of their first steps."""
        return list(dict.fromkeys(name for tokens in self.trace for name in tokens))

    def computed(self, name: str) -> int:
        """Tokens computed for a request."""
        return sum(tokens.get(name, 0) for tokens in self.trace)

    @property
    def free_blocks(self) -> int:
        return int(self.pool.get_num_free_blocks())

    def check_empty(self) -> None:
        """Nothing is left of any request, in vLLM or in the plug-in."""
        while self.under_way:
            self.complete()
        self.step()  # with async scheduling blocks come free a step later
        scheduler = self.scheduler
        assert not scheduler.requests
        assert self.free_blocks == self.pool.num_gpu_blocks - 1
        assert not list(scheduler.waiting)
        assert not scheduler.running
        if hasattr(scheduler, "admission"):
            assert scheduler.admission.applications.calls == {}
            assert scheduler.registry.totals["live_calls"] == 0
            assert scheduler.registry.counts["errors",] == 0


def run_step(scheduler: Any) -> Any:
    """One step, completed before the next is scheduled; what was scheduled."""
    return StepLoop(scheduler, depth=1).step()


def run_all(scheduler: Any) -> list[dict[str, int]]:
    """Steps until no request is left, each completed before the next; the tokens of each request in each step."""
    loop = StepLoop(scheduler, depth=1)
    loop.run()
    return loop.trace


def tokens_by_step(trace: Iterable[dict[str, int]], name: str) -> list[int]:
    """Tokens that a request got in each step that it was in."""
    return [tokens[name] for tokens in trace if name in tokens]
