"""What the published policy reads of vLLM's queue, from values."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the plug-in's tests need vLLM")

from tests.unit.vllm.vllm_adapter.pools import Device
from tokencake.protocol import Hint
from tokencake.time_scheduler.policy import CHURN_STEPS, PaperInputs
from tokencake_vllm.time_scheduler.policy_inputs import RecentStores, paper_inputs, queue_positions
from tokencake_vllm.time_scheduler.uploads import QUEUE_SCAN
from tokencake_vllm.vllm_adapter.block_view import BlockView


def scheduler_of(tokens: list[int], blocks: int = 20) -> Any:
    waiting = [SimpleNamespace(request_id=f"r{number}", num_tokens=count) for number, count in enumerate(tokens)]
    held = [SimpleNamespace(request_id="held", num_tokens=1)]
    return SimpleNamespace(
        kv_cache_manager=Device(blocks).manager, block_size=16, waiting=waiting, kv_holding_waiting=held
    )


def inputs_of(scheduler: Any, hint: Hint | None, host_free: int, recent_stores: int) -> PaperInputs:
    view = BlockView(scheduler.kv_cache_manager, scheduler.block_size, counts_whole_prompts=True)
    return paper_inputs(scheduler, view, hint, host_free, recent_stores)


@pytest.mark.parametrize(
    ("tokens", "demand"),
    [
        ([], (0, 0)),
        ([1], (1, 1)),
        ([16, 17], (3, 3)),
        ([160, 161, 160], (31, 20)),
        ([16 * 21, 16], (22, 1)),
        ([16] * (QUEUE_SCAN + 5), (QUEUE_SCAN, 20)),
    ],
)
def test_demand_is_what_those_at_the_head_have_and_what_of_it_fits(tokens: list[int], demand: tuple[int, int]) -> None:
    inputs = inputs_of(scheduler_of(tokens), None, 7, 3)

    assert (inputs.waiting_blocks, inputs.fitting_blocks) == demand
    assert (inputs.host_free, inputs.recent_stores, inputs.importance, inputs.is_near_end) == (7, 3, 0.0, False)


@pytest.mark.parametrize(
    ("fields", "is_near_end"),
    [
        ({"max_depth": 3, "remaining": 0}, True),
        ({"max_depth": 3, "remaining": 1}, True),
        ({"max_depth": 3, "remaining": 2}, False),
        ({"max_depth": 3}, False),
        ({"max_depth": 0, "remaining": 1}, False),
        ({"remaining": 1}, False),
    ],
)
def test_the_last_node_of_a_graph_is_near_the_end(fields: dict[str, int], is_near_end: bool) -> None:
    inputs = inputs_of(scheduler_of([]), Hint(session="s", importance=4.0, **fields), 0, 0)

    assert (inputs.is_near_end, inputs.importance) == (is_near_end, 4.0)


def test_stores_count_for_some_steps() -> None:
    stores = RecentStores()
    for step in (1, 1, 3):
        stores.add(step)

    assert [stores.count(step) for step in (3, 1 + CHURN_STEPS, 2 + CHURN_STEPS, 3 + CHURN_STEPS, 4 + CHURN_STEPS)] == [
        3,
        3,
        1,
        1,
        0,
    ]


def test_requests_that_hold_blocks_come_before_the_queue() -> None:
    assert queue_positions(scheduler_of([1, 1])) == {"held": 0, "r0": 1, "r1": 2}
