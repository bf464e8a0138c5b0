"""All that the plug-in reads and changes of vLLM's internals: the block pool, its free list, and requests.

A new vLLM version is looked for here first. Besides these names the plug-in uses the methods of vLLM's scheduler that
`scheduler.py` overrides, the connector interface in `connector.py`, and the one patch in `plugin.py`.
"""

from typing import Final

INTERNAL_NAMES: Final = frozenset(
    {
        "_inflight_prefills",
        "_insert_block_hash",
        "_update_waiting_for_remote_kv",
        "cached_block_hash_to_block",
        "coordinator",
        "deferred_frees",
        "failed_recving_kv_req_ids",
        "fake_free_list_head",
        "fake_free_list_tail",
        "finished_recving_kv_req_ids",
        "free_block_queue",
        "get_one_block",
        "kv_holding_waiting",
        "next_free_block",
        "num_free_blocks",
        "num_in_flight_tokens",
        "pause_state",
        "prefill_stats",
        "prepend_n",
        "prev_free_block",
        "req_to_blocks",
        "single_type_managers",
    }
)
"""Attributes of vLLM that are part of no interface for plug-ins. A test holds that no other room uses them."""
