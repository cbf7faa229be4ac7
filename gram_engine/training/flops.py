"""Model FLOPs of a step, counted honestly for packed data.

Per token and layer: 2 FLOPs per weight of the matrices.  Attention scores and values: causal, so half of the squared
length of each SAMPLE (not of the pack).  Output layer: only for rows that run it (all response tokens in stage 1, two
rows of the vocabulary at one position per sample in stage 2).  Backward = twice forward; recomputation is not counted.
"""

from __future__ import annotations

from gram_engine.config import Config
from gram_engine.data.loader import GlobalBatch


def step_flops(config: Config, batch: GlobalBatch) -> float:
    """Forward + backward FLOPs of one global batch over all processes."""
    model = config.model
    query = model.num_attention_heads * model.kv_channels
    key_value = 2 * model.num_query_groups * model.kv_channels
    weights = model.hidden_size * (2 * query + key_value + 3 * model.ffn_hidden_size)
    matrices = 2.0 * weights * batch.num_tokens
    attention = 2.0 * query * batch.squared_lengths  # QK^T and PV, 2 FLOPs each, half of the square
    vocabulary = model.vocab_size if config.training.objective == "response-lm" else 2
    head = 2.0 * model.hidden_size * vocabulary * batch.num_rows
    return 3.0 * (model.num_layers * (matrices + attention) + head)
