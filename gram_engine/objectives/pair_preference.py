"""Stage 2 (paper, Eq. 6-8): predict the label token A or B, softmax over these two tokens, label smoothing eps."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

from gram_engine.data.loader import PackedBatch
from gram_engine.kernels import pair_loss
from gram_engine.objectives.base import ObjectiveOutput, gather_rows, stack_stats


class PairPreference:
    """Two-token label-smoothed loss at each sample's label row.

    `label_smoothing` is the paper's eps, the weight of the wrong label.  torch's cross entropy with
    label_smoothing = 2 eps over the two tokens is the same loss.  Ties (preference 1/2) train towards 1/2.
    """

    stat_names = ("loss_sum", "labels", "decided", "correct", "margin_sum", "prefers_a")

    def __init__(
        self, *, label_ids: tuple[int, int], label_smoothing: float, tp_group: dist.ProcessGroup, sequence_parallel: bool
    ):
        self.label_ids = label_ids
        self.label_smoothing = label_smoothing
        self.tp_group = tp_group
        self.sequence_parallel = sequence_parallel

    def __call__(self, hidden_states: Tensor, output_weight: Tensor, context: PackedBatch) -> ObjectiveOutput:
        rows = gather_rows(hidden_states, context.rows, self.tp_group, self.sequence_parallel)
        row_a, row_b = self._label_rows(output_weight)
        preference = context.preference
        target_b = self.label_smoothing + (1 - 2 * self.label_smoothing) * (1 - preference)
        losses, margins = pair_loss(rows, row_a, row_b, target_b)
        loss_sum = (losses * context.weight).sum()
        count = torch.tensor(len(context.rows), dtype=torch.int32, device=loss_sum.device)
        return ObjectiveOutput(loss_sum, count, self._stats(loss_sum, count, margins, preference), margins.detach())

    def _label_rows(self, output_weight: Tensor) -> Tensor:
        """The two label tokens' rows [2, hidden] on every tensor-parallel process; gradients reach the owner only."""
        first = dist.get_rank(self.tp_group) * output_weight.shape[0]
        local = torch.tensor(self.label_ids, device=output_weight.device) - first
        owned = (local >= 0) & (local < output_weight.shape[0])
        held = output_weight[local.clamp(0, output_weight.shape[0] - 1)] * owned.to(output_weight.dtype)[:, None]
        return reduce_from_tensor_model_parallel_region(held, group=self.tp_group)

    def _stats(self, loss_sum: Tensor, count: Tensor, margins: Tensor, preference: Tensor) -> Tensor:
        sign = 2 * preference - 1
        towards_winner = margins * sign
        correct = (towards_winner > 0).sum()
        return stack_stats(
            loss_sum, count, (sign != 0).sum(), correct, towards_winner.sum(), (margins > 0).sum()
        )

    def metrics(self, stats: dict[str, float]) -> dict[str, float]:
        labels, decided = max(stats["labels"], 1), max(stats["decided"], 1)
        return {
            "loss": stats["loss_sum"] / labels,
            "accuracy": stats["correct"] / decided,
            "margin": stats["margin_sum"] / decided,
            "prefers_a": stats["prefers_a"] / labels,
        }
