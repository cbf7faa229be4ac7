"""Weights that are not trained (--freeze), as in the paper's "+ Freeze" baselines.

A frozen weight has no gradient, no gradient buffer and no optimizer state: DDP and the optimizer ignore it.
"""

from __future__ import annotations

from gram_engine.config.schema import Config
from gram_engine.model.reward_model import RewardModel
from gram_engine.model.scalar_head import SCALAR_HEAD

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def freeze(chunks: list[RewardModel], config: Config) -> None:
    """Freeze what --freeze names. Call it before the chunks are wrapped for data parallelism."""
    if config.training.freeze is None:
        return
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if _is_frozen(name, chunk, config):
                parameter.requires_grad_(False)
        if config.training.freeze == "embeddings" and config.training.recompute_granularity and chunk.pre_process:
            # Recomputation computes gradients only for layers whose input requires one.
            chunk.embedding.register_forward_hook(lambda _module, _arguments, hidden: hidden.requires_grad_())


def _is_frozen(name: str, chunk: RewardModel, config: Config) -> bool:
    if config.training.freeze == "backbone":
        return name != SCALAR_HEAD
    tied_copy = chunk.share_embeddings_and_output_weights and name == OUTPUT  # on the last pipeline stage
    return name == EMBEDDING or tied_copy
