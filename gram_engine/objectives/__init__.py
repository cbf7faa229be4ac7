"""Training objectives, one file each; `build_objective` makes the one the configuration names."""

from __future__ import annotations

import torch
import torch.distributed as dist

from gram_engine.config.schema import Config
from gram_engine.kernels.dispatch import name_of
from gram_engine.objectives.base import Objective, ObjectiveOutput
from gram_engine.objectives.bradley_terry import BradleyTerry
from gram_engine.objectives.full_vocabulary import FullVocabularyPreference
from gram_engine.objectives.pair_preference import PairPreference
from gram_engine.objectives.plain import PlainPairPreference, PlainResponseLM
from gram_engine.objectives.response_lm import ResponseLM

__all__ = ["Objective", "ObjectiveOutput", "build_objective", "describe_losses"]


def describe_losses(config: Config, device: torch.device) -> str:
    """One line for the log: which losses, by which kernels.

    Raises:
        ConfigError: GRAM_KERNELS names kernels that cannot run here.
    """
    if not config.training.fused_losses:
        return "losses: plain PyTorch"
    layer = "pruned" if config.prunes_last_layer else "whole"
    if not config.has_vocabulary_head:
        return f"losses: Bradley-Terry of a scalar head, last layer {layer}"
    if not config.label_rows_only:
        return f"losses: fused, cross entropy by {name_of('cross_entropy_grad_', device)}"
    return f"losses: fused, pair loss by {name_of('pair_loss_forward', device)}, last layer {layer}"


def build_objective(config: Config, label_ids: tuple[int, int] | None, tp_group: dist.ProcessGroup) -> Objective:
    """The objective of this run; label_ids come from the data's manifest (None but for stage 2)."""
    model, training = config.model, config.training
    shared = dict(tp_group=tp_group, sequence_parallel=config.parallel.sequence_parallel)
    vocabulary = dict(vocab_size=model.vocab_size, chunk_size=training.logits_chunk_size)
    labels = dict(label_ids=label_ids, label_smoothing=training.label_smoothing)
    if training.objective == "response-lm":
        return (ResponseLM if training.fused_losses else PlainResponseLM)(**vocabulary, **shared)
    if training.objective == "bradley-terry":
        return BradleyTerry(
            pruned=config.prunes_last_layer,
            sft_loss_weight=training.sft_loss_weight,
            language=ResponseLM(**vocabulary, **shared),
            **shared,
        )
    if training.label_softmax == "full-vocabulary":
        return FullVocabularyPreference(pruned=config.prunes_last_layer, **labels, **vocabulary, **shared)
    if not training.fused_losses:
        return PlainPairPreference(**labels, **shared)
    return PairPreference(norm_eps=model.norm_epsilon, pruned=config.prunes_last_layer, **labels, **shared)
