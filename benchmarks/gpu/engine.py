"""A real vLLM, stock or with TokenCake, whose engine core runs in a process of its own, as under `vllm serve`."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, assert_never

from benchmarks.gpu.report import Report
from tests.harness.passive_connector import PASSIVE
from tokencake import protocol
from tokencake_vllm.plugin import register
from tokencake_vllm.serve import SCHEDULER, connector_config

Kind: TypeAlias = Literal["stock", "native", "ours"]
"""`stock` has a connector that does nothing, `native` vLLM's own offloading."""
Place: TypeAlias = Literal["on_device", "on_host"]
TOOL_S: Final = 600.0
"""What each tool is expected to take: the events say when it ends."""
POLL_S: Final = 0.01
QUIET_S: Final = 1.0
"""Copies that have not gone on for so long will not."""


@dataclass(frozen=True, slots=True)
class Answer:
    """To one call."""

    call: str
    tokens: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...]
    """Of the three likeliest tokens at each place."""
    cached: int
    took_s: float
    told: dict[str, Any]
    """What TokenCake says of it: the decision on its KV, and where its prefix was."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Of an engine: options of `LLM`, and of the Time Scheduler."""

    name: str
    kind: Kind
    model: Path
    options: dict[str, Any]
    time: dict[str, Any] = field(default_factory=dict)

    def connector(self) -> dict[str, Any]:
        """Further options of `LLM`."""
        match self.kind:
            case "stock":
                return {"kv_transfer_config": PASSIVE}
            case "native":
                return {"kv_offloading_size": self.time["host_kv_gib"]}
            case "ours":
                return {
                    "scheduler_cls": SCHEDULER,
                    "worker_extension_cls": "benchmarks.gpu.worker_extension.WorkerExtension",
                    "kv_transfer_config": connector_config(),
                    "additional_config": {"tokencake": {"time": self.time}},
                }
        assert_never(self.kind)


class Engine:
    """One per process; it ends with it."""

    def __init__(self, report: Report, setup: Setup) -> None:
        self.kind = setup.kind
        os.environ["VLLM_PLUGINS"] = "tokencake" if self.kind == "ours" else ""
        began_s = time.monotonic()
        if self.kind == "ours":
            register()  # from a bare checkout vLLM finds no plug-in; the engine core is forked from here
        options = {**setup.options, **setup.connector()}
        from vllm import LLM  # noqa: PLC0415  # after the environment is set

        self.llm: Any = LLM(str(setup.model), skip_tokenizer_init=True, seed=0, disable_log_stats=True, **options)
        self._core: Any = self.llm.llm_engine.engine_core
        config = self.llm.llm_engine.vllm_config
        report.tell(
            f"{setup.name}: engine",
            None,
            start_s=round(time.monotonic() - began_s, 1),
            async_scheduling=config.scheduler_config.async_scheduling,
            runner="V2" if config.use_v2_model_runner else "V1",
            attention=str(config.attention_config.backend),
            cuda_graphs=str(config.compilation_config.cudagraph_mode),
        )

    # --- calls --------------------------------------------------------------------------------------

    def ask(self, tokens: list[int], call: str, *, answer_tokens: int, is_last: bool = False) -> Answer:
        """One call, greedy; `call` is `session/number`. Unless it is the last of its session, a tool follows."""
        from vllm import SamplingParams  # noqa: PLC0415  # after the environment is set

        hint = protocol.Hint(
            session=call.split("/", maxsplit=1)[0],
            call=call,
            reuse="final" if is_last else "extends",
            expects_tools=None if is_last else {"build": TOOL_S},
        )
        params = SamplingParams(
            temperature=0,
            ignore_eos=True,
            max_tokens=answer_tokens,
            logprobs=3,
            detokenize=False,
            extra_args={protocol.HINT_KEY: hint.to_json()} if self.kind == "ours" else None,
        )
        began_s = time.monotonic()
        (answer,) = self.llm.generate([{"prompt_token_ids": tokens}], [params], use_tqdm=False)
        took_s = time.monotonic() - began_s
        logprobs = ({token: each.logprob for token, each in place.items()} for place in answer.outputs[0].logprobs)
        told = (answer.kv_transfer_params or {}).get("tokencake", {})
        return Answer(
            call, tuple(answer.outputs[0].token_ids), tuple(logprobs), answer.num_cached_tokens or 0, took_s, told
        )

    # --- what only ours knows -----------------------------------------------------------------------

    def rpc(self, method: str, *arguments: Any) -> Any:
        """A method of TokenCake's scheduler."""
        return self._core.call_utility("tokencake", method, arguments)

    def spoil_host_memory(self) -> None:
        """Change every byte of it."""
        self.llm.collective_rpc("spoil_host_memory")

    def kv(self, call: str) -> dict[str, Any]:
        """Where its blocks are."""
        session = call.split("/", maxsplit=1)[0]
        views: list[dict[str, Any]] = self.rpc("tokencake_state", session, None, 50)["sessions"][session]["kv"]
        return next(view for view in views if view["call"] == call)

    def settled(self, call: str, place: Place) -> int:
        """How many of its blocks are there, once all are, or once nothing more has come for `QUIET_S`."""
        seen, since_s = -1, time.monotonic()
        while True:
            view = self.kv(call)
            count = int(view[place])
            if count == view["blocks"]:
                return count
            if count != seen:
                seen, since_s = count, time.monotonic()
            elif time.monotonic() - since_s > QUIET_S:
                return count
            time.sleep(POLL_S)

    def tell(self, *events: protocol.Event) -> None:
        """As over HTTP."""
        self.rpc("tokencake_events", [protocol.to_wire(event) for event in events], time.time())

    def wipe(self) -> int:
        """Overwrite what no call holds on the device; returns how many blocks."""
        wiped = int(self.rpc("tokencake_wipe"))
        time.sleep(0.3)
        return wiped

    def counts(self) -> dict[str, float]:
        """Of the Time Scheduler, and errors."""
        counts = self.rpc("tokencake_metrics")["counts"]
        return {"/".join(key): count for key, count in counts if key[0].startswith(("kv_", "errors"))}


def gpu_options() -> dict[str, Any]:
    """Options of `LLM`: room for two engines on one device, and no warm-up for batches that never come."""
    from vllm.config import KernelConfig  # noqa: PLC0415  # after the environment is set

    warm_ups = ("enable_jit_warmup", "enable_flashinfer_autotune", "enable_cutedsl_warmup")
    known = {field.name for field in fields(KernelConfig)}
    return {"gpu_memory_utilization": 0.4, "kernel_config": {name: False for name in warm_ups if name in known}}


def prompt(seed: int, length: int) -> list[int]:
    """Tokens that depend on the seed from the first on."""
    return [(seed * 7_919 + place * 104_729 + place * place * seed) % 1_800 + 50 for place in range(length)]
