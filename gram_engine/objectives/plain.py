"""Both stages' objectives in plain PyTorch and autograd (--no-fused-losses), to compare the fused ones with."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from torch import Tensor

from gram_engine.data.loader import PackedBatch
from gram_engine.kernels.plain import linear_cross_entropy, two_token_loss
from gram_engine.objectives.base import (
    LanguageModelObjective,
    ObjectiveOutput,
    PreferenceObjective,
    gather_rows,
    local_label_rows,
)


class PlainPairPreference(PreferenceObjective):
    """Two-token loss (paper, Eq. 6-8) at each sample's label row. Ties (preference 1/2) train towards 1/2."""

    def __init__(
        self, *, label_ids: tuple[int, int], label_smoothing: float, tp_group: dist.ProcessGroup, sequence_parallel: bool
    ):
        self.label_ids = label_ids
        self.label_smoothing = label_smoothing
        self.tp_group = tp_group
        self.sequence_parallel = sequence_parallel

    def __call__(self, hidden_states: Tensor, output_weight: Tensor, context: PackedBatch) -> ObjectiveOutput:
        rows = gather_rows(hidden_states, context.rows, self.tp_group, self.sequence_parallel)
        held = local_label_rows(output_weight, self.label_ids, self.tp_group)
        row_a, row_b = reduce_from_tensor_model_parallel_region(held, group=self.tp_group)
        target_b = self.label_smoothing + (1 - 2 * self.label_smoothing) * (1 - context.preference.double())
        losses, margins = two_token_loss(rows, row_a, row_b, target_b)
        return self.output((losses * context.weight).sum(), margins, context)


class PlainResponseLM(LanguageModelObjective):
    """Cross entropy of the response tokens (paper, Eq. 4)."""

    def __init__(self, *, vocab_size: int, chunk_size: int | None, tp_group: dist.ProcessGroup, sequence_parallel: bool):
        self.vocab_size = vocab_size
        self.chunk_size = chunk_size
        self.tp_group = tp_group
        self.sequence_parallel = sequence_parallel

    def __call__(self, hidden_states: Tensor, output_weight: Tensor, context: PackedBatch) -> ObjectiveOutput:
        rows = gather_rows(hidden_states, context.rows, self.tp_group, self.sequence_parallel)
        # Each vocabulary shard yields its part of the rows' gradient: add the parts.
        rows = copy_to_tensor_model_parallel_region(rows, group=self.tp_group)
        losses = linear_cross_entropy(
            rows, output_weight, context.targets, self.vocab_size, self.chunk_size, self.tp_group
        )
        return self.output(losses.sum(), context)
