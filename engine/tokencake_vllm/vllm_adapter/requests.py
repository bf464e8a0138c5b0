"""State of requests in vLLM's scheduler: which wait, which have blocks, what is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request, RequestStatus

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler

ADMISSIBLE: Final = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
"""States of a waiting request that may get blocks in the next step."""


def is_aborted(request: Request) -> bool:
    """Whether the request ended without an answer."""
    return request.status in (RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR)


def is_answered(request: Request) -> bool:
    """Whether the request ended with an answer that the next prompt may contain."""
    return request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


def is_paused(scheduler: Scheduler) -> bool:
    """Whether vLLM admits no request for the moment, as while weights are updated."""
    return scheduler.pause_state != PauseState.UNPAUSED


def admitted_requests(scheduler: Scheduler) -> list[Request]:
    """Requests that have blocks: those that run and those whose prefix is being loaded."""
    loading = (request for request in scheduler._inflight_prefills if request.status != RequestStatus.RUNNING)  # noqa: SLF001  # the only list of them
    return [*scheduler.running, *loading]


def has_admitted(scheduler: Scheduler) -> bool:
    """Whether any request has blocks."""
    return bool(scheduler.running or scheduler._inflight_prefills)  # noqa: SLF001  # as above


def has_prompt_computed(request: Request) -> bool:
    """Whether all of its prompt is computed."""
    return request.num_computed_tokens - request.num_in_flight_tokens >= request.num_prompt_tokens


def computed_blocks(scheduler: Scheduler, request: Request) -> tuple[list[bytes], list[KVCacheBlock]]:
    """Hashes and blocks of the full blocks that are surely computed: hashes exist as soon as a step is scheduled."""
    count = max(0, request.num_computed_tokens - request.num_in_flight_tokens) // scheduler.block_size
    held = scheduler.kv_cache_manager.coordinator.get_blocks(request.request_id)
    blocks = list(held[0][:count]) if held else []
    block_hashes: list[bytes] = list(request.block_hashes[: len(blocks)])
    return block_hashes, blocks[: len(block_hashes)]


def leaving_blocks(scheduler: Scheduler) -> Iterator[KVCacheBlock]:
    """Blocks of requests that have ended, which come free when the step under way is over."""
    for _, blocks in scheduler.deferred_frees:
        yield from blocks


def queued_requests(scheduler: Scheduler) -> Iterator[Request]:
    """Requests that wait for blocks, those that hold some first."""
    yield from scheduler.kv_holding_waiting
    yield from scheduler.waiting


def cached_tokens(request: Request) -> tuple[int, int]:
    """Prompt tokens that the request found on the device and on the host.

    vLLM sets them at the first scheduling and takes them away with the first output.
    """
    stats = request.prefill_stats
    return (stats.num_local_cached_tokens, stats.num_external_cached_tokens) if stats else (0, 0)


def first_slots(scheduler: Scheduler, output: SchedulerOutput) -> Iterator[tuple[str, int, int]]:
    """Requests scheduled for the first time in this step, each with its `cached_tokens`."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, *cached_tokens(scheduler.requests[new.req_id])


def started_requests(output: SchedulerOutput) -> list[str]:
    """Ids of the requests that got blocks in this step, for the first time or again."""
    return [new.req_id for new in output.scheduled_new_reqs] + list(output.scheduled_cached_reqs.resumed_req_ids)


def compute_loads_again(scheduler: Scheduler) -> None:
    """Let requests whose prefix is being loaded from the host compute it: what the host has is out of date."""
    for request in list(scheduler.kv_holding_waiting):
        if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
            request.num_computed_tokens = 0
            scheduler.failed_recving_kv_req_ids.add(request.request_id)
            if request.request_id in scheduler.finished_recving_kv_req_ids:
                scheduler._update_waiting_for_remote_kv(request)  # noqa: SLF001  # what vLLM does when a load fails
                request.status = RequestStatus.PREEMPTED if request.num_preemptions else RequestStatus.WAITING
