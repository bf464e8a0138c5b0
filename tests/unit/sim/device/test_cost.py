import pytest

from tokencake_sim.device.cost import StepCostModel, StepLoad
from tokencake_sim.device.profiles import PROFILES


@pytest.fixture
def cost():
    return StepCostModel(
        fixed_s=0.001,
        prefill_tokens_per_s=1_000,
        weight_bytes=10e9,
        memory_bytes_per_s=1e12,
        kv_bytes_per_token=100_000,
    )


def test_a_step_costs_its_fixed_part_its_prefill_the_weights_and_the_kv_it_reads(cost):
    assert cost.step_s(StepLoad(500, 2, 10_000)) == pytest.approx(0.001 + 0.5 + 0.01 + 0.001)


def test_a_step_without_tokens_costs_nothing(cost):
    assert cost.step_s(StepLoad(0, 0, 0)) == 0.0


def test_a_block_of_the_published_model_has_three_megabytes():
    assert PROFILES["a800-qwen2.5-14b"].block_bytes == 3_145_728


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_every_profile_can_hold_one_call_as_long_as_the_model_and_says_where_it_comes_from(profile):
    assert (profile.kv_blocks - 1) * profile.block_tokens >= profile.max_model_len
    assert len(profile.source) > 40
