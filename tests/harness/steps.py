"""An engine without a model: steps are scheduled ahead as vLLM does, and every call says 7."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any

from tests.harness.tenancy import marked
from tokencake import protocol

LIMIT = 3_000


def hint(app: str, *, tenant: str = "", **fields: object) -> str:
    """As its client sends it, or as the proxy passes it on for `tenant`."""
    said = protocol.Hint(session=f"{app}/session", app=app, **fields)
    return marked(said, tenant) if tenant else said.to_json()


def with_settings(create: Callable[..., Any], space: dict[str, Any] | None = None, **scheduler: Any) -> Any:
    """The factory `create`, for an engine with this section `space` and these fields of the scheduler's config."""

    def make(**kwargs: Any) -> Any:
        config = kwargs["vllm_config"]
        if space is not None:
            config.additional_config = {"tokencake": {"space": space}}
        if (loras := scheduler.pop("max_loras", None)) is not None:
            from vllm.config.lora import LoRAConfig

            config.lora_config = LoRAConfig(max_loras=loras, max_cpu_loras=8)
        for name, value in scheduler.items():
            setattr(config.scheduler_config, name, value)
        return create(**kwargs)

    return make


class Steps:
    """Schedules a scheduler's steps, one ahead with async scheduling, and answers them."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.pool = scheduler.kv_cache_manager.block_pool
        self.depth = 2 if scheduler.scheduler_config.async_scheduling else 1
        self.under_way: deque[tuple[Any, set[str]]] = deque()
        self.trace: list[dict[str, int]] = []
        """Tokens of each call in each step."""
        self.told: Counter[str] = Counter()
        """Tokens that reached each client."""
        self.ends: dict[str, list[str]] = {}
        """Reasons for which each call, or turn, was said to be over."""
        self.preempted: Counter[str] = Counter()
        self.new: Counter[str] = Counter()
        """How often the worker was told of a call as of a new one."""
        self.finished_ids: Counter[str] = Counter()

    def add(self, *requests: Any) -> None:
        for request in requests:
            self.scheduler.add_request(request)

    def step(self) -> dict[str, int]:
        """One turn of the engine's loop; the tokens that were scheduled."""
        output = self.scheduler.schedule()
        tokens = dict(output.num_scheduled_tokens)
        self.trace.append(tokens)
        self.preempted.update(output.preempted_req_ids or ())
        self.new.update(request.req_id for request in output.scheduled_new_reqs)
        self.finished_ids.update(output.finished_req_ids)
        self.under_way.append((output, {n for n in tokens if not self.scheduler.requests[n].is_prefill_chunk}))
        while len(self.under_way) >= self.depth or (self.under_way and not tokens):
            self.complete()
        return tokens

    def complete(self) -> None:
        """The device is through with the oldest step under way."""
        from vllm.v1.outputs import ModelRunnerOutput

        output, sampling = self.under_way.popleft()
        ids = list(output.num_scheduled_tokens)
        answers = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={name: index for index, name in enumerate(ids)},
                sampled_token_ids=[[7] if name in sampling else [] for name in ids],
                logprobs=None,
                prompt_logprobs_dict={},
                pooler_output=[],
            ),
        )
        for answer in (answer for group in answers.values() for answer in group.outputs):
            self.told[answer.request_id] += len(answer.new_token_ids)
            if answer.finish_reason is not None:
                self.ends.setdefault(answer.request_id, []).append(str(answer.finish_reason))

    def run(self, *, until: Callable[[], bool] | None = None) -> None:
        """Step until nothing is left, or `until` holds."""
        for _ in range(LIMIT):
            if until is not None and until():
                return
            if not self.scheduler.has_unfinished_requests() and not self.under_way:
                assert until is None, "everything ended before it was so"
                return
            self.step()
        raise AssertionError("some call never ends")

    def order(self) -> list[str]:
        """Calls in the order of their first tokens."""
        return list(dict.fromkeys(name for tokens in self.trace for name in tokens))

    def computed(self, name: str) -> int:
        """Tokens computed for a call."""
        return sum(tokens.get(name, 0) for tokens in self.trace)

    @property
    def free_blocks(self) -> int:
        return int(self.pool.get_num_free_blocks())

    def check_empty(self) -> None:
        """Nothing is left of any call, in vLLM or in the plug-in."""
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


def in_steps(trace: Iterable[dict[str, int]], name: str) -> list[int]:
    """Tokens that a call got in each step that it was in."""
    return [tokens[name] for tokens in trace if name in tokens]
