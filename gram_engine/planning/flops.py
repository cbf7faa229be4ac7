"""Model FLOPs of a training step on packed data: only what the model needs, without padding and recomputation.

- Layers: 2 FLOPs per token and weight of the matrices.
- Attention scores and values: causal, so half of the squared length of each sample (not of the pack).
- The pruned last layer (model/label_rows.py): keys and values of every token, everything else for label rows only.
- Output layer: only the rows that run it.  Stage 1: all response tokens.  Stage 2: one position per sample, times the two
  label rows of the output weight or all of its rows.  bradley-terry: two positions times one row, or the chosen response's
  tokens times all rows.
- Backward pass: twice the forward pass; none through a frozen backbone.  LoRA: frozen weights have no gradient, so once the
  forward pass; the adapters' own products are not counted.
"""

from __future__ import annotations

from gram_engine.config.schema import Config
from gram_engine.data.loader import GlobalBatch


def step_flops(config: Config, batch: GlobalBatch) -> float:
    """Forward and backward FLOPs of one global batch, over all processes."""
    tokens, rows, squares = batch.num_tokens, batch.num_rows, batch.squared_lengths
    return passes(config) * forward_flops(config, tokens, rows, squares)


def forward_flops(config: Config, tokens: float, rows: float, squared_lengths: float) -> float:
    """Forward FLOPs of `tokens` tokens, `rows` of which run the output layer, in samples of these summed squared lengths."""
    layers = (config.model.num_layers - 1) * layer_flops(config, tokens, squared_lengths)
    return layers + last_layer_flops(config, tokens, rows, squared_lengths) + head_flops(config, rows)


def passes(config: Config) -> float:
    """FLOPs of forward and backward pass together, as a multiple of the forward pass."""
    if config.training.freeze == "backbone":
        return 1.0
    return 3.0 if config.model.lora_rank is None else 2.0


def layer_flops(config: Config, tokens: float, squared_lengths: float) -> float:
    """Forward FLOPs of one layer that computes every token."""
    query, key_value, mlp = _widths(config)
    attention = 2.0 * query * squared_lengths  # QK^T and PV, 2 FLOPs each, half of the square
    return 2.0 * config.model.hidden_size * (2 * query + key_value + mlp) * tokens + attention


def last_layer_flops(config: Config, tokens: float, rows: float, squared_lengths: float) -> float:
    """Forward FLOPs of the last layer, of whose outputs the head uses `rows`."""
    if not config.prunes_last_layer:
        return layer_flops(config, tokens, squared_lengths)
    query, key_value, mlp = _widths(config)
    attention = 4.0 * query * tokens  # one query for every sample
    return 2.0 * config.model.hidden_size * (key_value * tokens + (2 * query + mlp) * rows) + attention


def head_flops(config: Config, rows: float) -> float:
    """Forward FLOPs of the output layer, or of the scalar head."""
    training = config.training
    two_token = config.task.head == "labels" and training.label_softmax == "two-token"
    width = 2 if two_token else config.model.vocab_size if config.has_vocabulary_head else 1
    return 2.0 * config.model.hidden_size * width * rows


def _widths(config: Config) -> tuple[int, int, int]:
    """Output columns of the query projection, of key and value, and of the MLP's three matrices."""
    model = config.model
    query = model.num_attention_heads * model.kv_channels
    return query, 2 * model.num_query_groups * model.kv_channels, 3 * model.ffn_hidden_size
