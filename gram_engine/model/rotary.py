"""Rotary position embedding of each token's position in its sequence, in LLaMA's layout (pairs are (i, i + dim / 2))."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gram_engine.config.schema import ModelConfig
from gram_engine.model.shapes import ROPE_SCALING


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Inverse frequencies, [dim / 2] fp32, with LLaMA 3.1's scaling if the configuration has it.

    Long wavelengths are stretched by rope_scaling_factor, short ones are kept, and those in between are interpolated.
    """
    exponents = torch.arange(0, config.kv_channels, 2, dtype=torch.float32) / config.kv_channels
    frequencies = 1.0 / config.rotary_base**exponents
    if config.rope_scaling_factor is None:
        return frequencies
    # The order of operations is that of transformers, so that the angles agree to the last bit.
    low, high = ROPE_SCALING["low_freq_factor"], ROPE_SCALING["high_freq_factor"]
    turns = ROPE_SCALING["original_max_position_embeddings"] / (2 * math.pi / frequencies)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / config.rope_scaling_factor + kept * frequencies


def cos_and_sin(position_ids: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cosines, sines) of a pack's positions: int64 [tokens], fp32 [dim / 2] -> two tensors [tokens, 1, dim / 2] of `dtype`."""
    angles = position_ids[:, None].float() * frequencies
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys by their positions: [tokens, heads, dim], cos and sin [tokens, 1, dim / 2] -> as `heads`."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
