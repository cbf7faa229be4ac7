"""Rotary position embedding against transformers' own, and against megatron-core's angles."""

import pytest
import torch

from gram_engine.config.schema import ModelConfig
from gram_engine.model.rotary import cos_and_sin, inverse_frequencies, rotate

SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
POSITIONS = torch.tensor([0, 1, 2, 3, 0, 1, 4095, 8191])


@pytest.mark.parametrize("factor", [None, 8.0])
def test_equals_transformers(factor):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    parameters = {"rope_theta": 500_000.0, "rope_type": "default"}
    if factor:
        parameters |= {**SCALED, "factor": factor, "original_max_position_embeddings": 8192}
    theirs = LlamaRotaryEmbedding(LlamaConfig(hidden_size=512, num_attention_heads=8, rope_parameters=parameters))
    frequencies = inverse_frequencies(ModelConfig(kv_channels=64, rotary_base=500_000, rope_scaling_factor=factor))
    assert torch.equal(frequencies, theirs.inv_freq)
    heads = torch.randn(1, 3, len(POSITIONS), 64, generator=torch.Generator().manual_seed(0))
    expected, _ = apply_rotary_pos_emb(heads, heads, *theirs(heads, POSITIONS[None]))
    found = rotate(heads[0].transpose(0, 1), *cos_and_sin(POSITIONS, frequencies, torch.float32))
    torch.testing.assert_close(found.transpose(0, 1)[None], expected, rtol=0, atol=0)


def angles_of_megatron():
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    scaling = dict(rope_scaling=True, rope_scaling_factor=32.0)
    return RotaryEmbedding(64, 1.0, rotary_base=500_000, use_cpu_initialization=True, **scaling).inv_freq


def test_frequencies_equal_those_of_megatron_core(pool):
    ours = inverse_frequencies(ModelConfig(kv_channels=64, rotary_base=500_000, rope_scaling_factor=32.0))
    torch.testing.assert_close(ours, pool.run(angles_of_megatron, 1)[0], rtol=1e-6, atol=0)
