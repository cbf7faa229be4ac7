"""The objectives of both stages in plain PyTorch and autograd (--no-fused-losses), to compare the fused losses with."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from torch import Tensor

from gram_engine.config.schema import Config
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

    def __init__(self, config: Config, label_ids: tuple[int, int], tp_group: dist.ProcessGroup):
        super().__init__(config, label_ids, tp_group)
        self.label_smoothing = config.training.label_smoothing

    def __call__(self, hidden_states: Tensor, output_weight: Tensor, context: PackedBatch) -> ObjectiveOutput:
        rows = self.label_rows(hidden_states, context)
        held = local_label_rows(output_weight, self.label_ids, self.tp_group)
        row_a, row_b = reduce_from_tensor_model_parallel_region(held, group=self.tp_group)
        target_b = self.label_smoothing + (1 - 2 * self.label_smoothing) * (1 - context.preference.double())
        losses, margins = two_token_loss(rows, row_a, row_b, target_b)
        return self.output((losses * context.weight).sum(), margins, context)


class PlainResponseLM(LanguageModelObjective):
    """Cross entropy of the response tokens (paper, Eq. 4)."""

    def __call__(self, hidden_states: Tensor, output_weight: Tensor, context: PackedBatch) -> ObjectiveOutput:
        rows = gather_rows(hidden_states, context.rows, self.tp_group, self.sequence_parallel)
        # Each vocabulary shard gives a part of the rows' gradient; this region adds the parts in the backward pass.
        rows = copy_to_tensor_model_parallel_region(rows, group=self.tp_group)
        losses = linear_cross_entropy(
            rows, output_weight, context.targets, self.vocab_size, self.chunk_size, self.tp_group
        )
        return self.output(losses.sum(), context)
