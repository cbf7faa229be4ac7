"""One table between megatron-core's checkpoint keys and Hugging Face's LLaMA names, read in both directions.

Engine side: keys of a whole (unsharded) model as a torch_dist checkpoint holds them.  Tensors of the layers are stacked
along a first axis; norms carry the name of the linear layer they precede, as in Transformer Engine's fused modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

from gram_engine.config import ModelConfig

LAYER = "decoder.layers."
HF_LAYER = "model.layers.{layer}."


@dataclass(frozen=True)
class Rule:
    """One engine tensor and the Hugging Face tensors it is made of.

    `merge(parts, model)` gives the engine's tensor from Hugging Face's, `split(tensor, model)` gives them back; both
    only move rows, so a round trip is exact.
    """

    engine: str
    hf: tuple[str, ...]
    merge: Callable[[list[Tensor], ModelConfig], Tensor]
    split: Callable[[Tensor, ModelConfig], list[Tensor]]


def _merge_qkv(parts: list[Tensor], model: ModelConfig) -> Tensor:
    """[q; k; v] rows -> per key/value group [its query heads; k; v], megatron-core's order."""
    groups, dim = model.num_query_groups, model.kv_channels
    grouped = [part.reshape(groups, -1, dim, part.shape[-1]) for part in parts]
    return torch.cat(grouped, dim=1).reshape(-1, parts[0].shape[-1])


def _split_qkv(tensor: Tensor, model: ModelConfig) -> list[Tensor]:
    per_group = model.num_attention_heads // model.num_query_groups
    grouped = tensor.reshape(model.num_query_groups, per_group + 2, model.kv_channels, tensor.shape[-1])
    return [part.reshape(-1, tensor.shape[-1]) for part in grouped.split([per_group, 1, 1], dim=1)]


def _direct(engine: str, hf: str) -> Rule:
    return Rule(engine, (hf,), lambda parts, _: parts[0], lambda tensor, _: [tensor])


def _vocabulary(engine: str, hf: str) -> Rule:
    """Rows beyond vocab_size are padding: not exported, zero when imported (the importer pads)."""
    return Rule(engine, (hf,), lambda parts, _: parts[0], lambda tensor, model: [tensor[: model.vocab_size]])


LAYER_RULES = (
    Rule(
        LAYER + "self_attention.linear_qkv.weight",
        tuple(f"{HF_LAYER}self_attn.{name}_proj.weight" for name in "qkv"),
        _merge_qkv,
        _split_qkv,
    ),
    _direct(LAYER + "self_attention.linear_qkv.layer_norm_weight", HF_LAYER + "input_layernorm.weight"),
    _direct(LAYER + "self_attention.linear_proj.weight", HF_LAYER + "self_attn.o_proj.weight"),
    _direct(LAYER + "mlp.linear_fc1.layer_norm_weight", HF_LAYER + "post_attention_layernorm.weight"),
    Rule(
        LAYER + "mlp.linear_fc1.weight",
        (HF_LAYER + "mlp.gate_proj.weight", HF_LAYER + "mlp.up_proj.weight"),
        lambda parts, _: torch.cat(parts),
        lambda tensor, _: list(tensor.chunk(2)),
    ),
    _direct(LAYER + "mlp.linear_fc2.weight", HF_LAYER + "mlp.down_proj.weight"),
)

EMBEDDING = _vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight")
OUTPUT = _vocabulary("output_layer.weight", "lm_head.weight")
FINAL_NORM = _direct("decoder.final_layernorm.weight", "model.norm.weight")


def rules(model: ModelConfig) -> list[tuple[Rule, int | None]]:
    """(rule, layer) of every tensor of the model in Hugging Face's order; layer is None outside the layers."""
    layers = [(rule, layer) for layer in range(model.num_layers) for rule in LAYER_RULES]
    head = [(OUTPUT, None)] if model.untie_embeddings_and_output_weights else []
    return [(EMBEDDING, None), *layers, (FINAL_NORM, None), *head]


def hf_names(rule: Rule, layer: int | None) -> list[str]:
    """The rule's Hugging Face names in one layer."""
    return [name.format(layer=layer) for name in rule.hf]
