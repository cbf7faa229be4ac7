"""The table of megatron-core's checkpoint keys and Hugging Face's LLaMA and Qwen3 names, used in both directions.

The engine's side are the keys of an unsharded model in a torch_dist checkpoint.  Tensors of the layers are stacked along a
first axis; norms have the name of the linear layer that follows, as in Transformer Engine's fused modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterator

import torch
from torch import Tensor

from gram_engine.config.schema import ModelConfig
from gram_engine.model.scalar_head import SCALAR_HEAD

LAYER = "decoder.layers."
HF_LAYER = "model.layers.{layer}."
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

Piece = tuple[int, int, int]
"""(which Hugging Face tensor of the rule, its first row, end row)."""


@dataclass(frozen=True)
class Rule:
    """A tensor of the engine and the Hugging Face tensors that it consists of.

    `pieces(model)` lists ranges of rows in their order in the engine's tensor, with each row of each Hugging Face tensor
    once; `columns(model)` is the second dimension, None for a vector.  Conversion in either direction only moves rows, so a
    round trip is exact.
    """

    engine: str
    hf: tuple[str, ...]
    pieces: Callable[[ModelConfig], list[Piece]]
    columns: Callable[[ModelConfig], int | None]

    def hf_names(self, layer: int | None) -> list[str]:
        """The Hugging Face names in one layer."""
        return [name.format(layer=layer) for name in self.hf]

    def hf_shapes(self, model: ModelConfig) -> list[tuple[int, ...]]:
        """Shapes of the Hugging Face tensors."""
        rows, columns = [0] * len(self.hf), self.columns(model)
        for part, first, end in self.pieces(model):
            rows[part] += end - first
        return [(count,) if columns is None else (count, columns) for count in rows]

    def pieces_of_rows(self, start: int, end: int, model: ModelConfig) -> Iterator[Piece]:
        """The pieces of rows [start, end) of the engine's tensor; rows after the last piece are padding."""
        position = 0
        for part, first, last in self.pieces(model):
            low, high = max(start, position), min(end, position + last - first)
            if low < high:
                yield part, first + low - position, first + high - position
            position += last - first

    def split(self, tensor: Tensor, model: ModelConfig) -> list[Tensor]:
        """Split an unsharded engine tensor (of one layer) into the Hugging Face tensors; padding rows are dropped."""
        if len(self.hf) == 1:
            return [tensor[: self.hf_shapes(model)[0][0]]]
        parts = [tensor.new_empty(shape) for shape in self.hf_shapes(model)]
        position = 0
        for part, first, end in self.pieces(model):
            parts[part][first:end] = tensor[position : position + end - first]
            position += end - first
        return parts

    def join(self, parts: list[Tensor], model: ModelConfig) -> Tensor:
        """Join Hugging Face tensors to the engine tensor (of one layer, without padding): the inverse of `split`."""
        if len(self.hf) == 1:
            return parts[0]
        return torch.cat([parts[part][first:end] for part, first, end in self.pieces(model)])


def _hidden(model: ModelConfig) -> int:
    return model.hidden_size


def _ffn(model: ModelConfig) -> int:
    return model.ffn_hidden_size


def _head(model: ModelConfig) -> int:
    return model.kv_channels


def _one(model: ModelConfig) -> int:
    return 1


def _vector(model: ModelConfig) -> None:
    return None


def _all_heads(model: ModelConfig) -> int:
    return model.num_attention_heads * model.kv_channels


def _vocabulary(model: ModelConfig) -> int:
    return model.vocab_size


def _rows(count: Callable[[ModelConfig], int]) -> Callable[[ModelConfig], list[Piece]]:
    return lambda model: [(0, 0, count(model))]


def _qkv(model: ModelConfig) -> list[Piece]:
    """q, k, v -> per key/value group [its query heads; k; v], megatron-core's order."""
    dim, queries = model.kv_channels, _all_heads(model) // model.num_query_groups
    return [
        (part, group * rows, (group + 1) * rows)
        for group in range(model.num_query_groups)
        for part, rows in enumerate((queries, dim, dim))
    ]


def _gate_up(model: ModelConfig) -> list[Piece]:
    return [(0, 0, model.ffn_hidden_size), (1, 0, model.ffn_hidden_size)]


def _direct(engine: str, hf: str, rows: Callable, columns: Callable) -> Rule:
    return Rule(engine, (hf,), _rows(rows), columns)


LAYER_RULES = (
    Rule(
        LAYER + "self_attention.linear_qkv.weight",
        tuple(f"{HF_LAYER}self_attn.{name}_proj.weight" for name in "qkv"),
        _qkv,
        _hidden,
    ),
    _direct(LAYER + "self_attention.linear_qkv.layer_norm_weight", HF_LAYER + "input_layernorm.weight", _hidden, _vector),
    _direct(LAYER + "self_attention.linear_proj.weight", HF_LAYER + "self_attn.o_proj.weight", _hidden, _all_heads),
    _direct(LAYER + "mlp.linear_fc1.layer_norm_weight", HF_LAYER + "post_attention_layernorm.weight", _hidden, _vector),
    Rule(
        LAYER + "mlp.linear_fc1.weight",
        (HF_LAYER + "mlp.gate_proj.weight", HF_LAYER + "mlp.up_proj.weight"),
        _gate_up,
        _hidden,
    ),
    _direct(LAYER + "mlp.linear_fc2.weight", HF_LAYER + "mlp.down_proj.weight", _hidden, _ffn),
)

QK_NORM_RULES = tuple(
    _direct(f"{LAYER}self_attention.{part}_layernorm.weight", f"{HF_LAYER}self_attn.{part}_norm.weight", _head, _vector)
    for part in "qk"
)

EMBEDDING = _direct("embedding.word_embeddings.weight", "model.embed_tokens.weight", _vocabulary, _hidden)
OUTPUT = _direct("output_layer.weight", "lm_head.weight", _vocabulary, _hidden)
SCORE = _direct(SCALAR_HEAD, SCALAR_HEAD, _one, _hidden)
"""The scalar head; it replaces the output layer in Hugging Face's ...ForSequenceClassification."""
FINAL_NORM = _direct("decoder.final_layernorm.weight", "model.norm.weight", _hidden, _vector)


def rules(model: ModelConfig) -> list[tuple[Rule, int | None]]:
    """(rule, layer) of every tensor of the model in Hugging Face's order; layer is None outside the layers."""
    of_layer = LAYER_RULES + (QK_NORM_RULES if model.qk_layernorm else ())
    layers = [(rule, layer) for layer in range(model.num_layers) for rule in of_layer]
    head = [(OUTPUT, None)] if model.untie_embeddings_and_output_weights else []
    return [(EMBEDDING, None), *layers, (FINAL_NORM, None), *head]


def hf_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the model in a Hugging Face folder."""
    return {name: shape for rule, layer in rules(model) for name, shape in zip(rule.hf_names(layer), rule.hf_shapes(model))}
