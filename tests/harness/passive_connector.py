"""A KV connector that does nothing: what a stock vLLM is to be compared with on a CPU.

That a connector is loaded at all changes the last digits of what vLLM computes there, and on a CPU with AMX the third
one. With this connector, stock vLLM computes exactly what it computes with any other that moves nothing.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, SupportsHMA

PASSIVE = {
    "kv_connector": "PassiveConnector",
    "kv_connector_module_path": "tests.harness.passive_connector",
    "kv_role": "kv_both",
}


class PassiveConnector(KVConnectorBase_V1, SupportsHMA):
    """Stores nothing and finds nothing."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pass

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        return False, None

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass
