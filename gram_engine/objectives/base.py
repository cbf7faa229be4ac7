"""What an objective is: hidden rows of a pack in, a summed loss with its count and statistics out.

How the loss is scaled.  An objective returns the SUM of its losses over the micro-batch and the number of labels.
megatron-core (`calculate_per_token_loss`) adds gradients over micro-batches and data-parallel processes without
averaging, adds the counts the same way, and divides the gradients by the total once per step.  So the loss is the mean
over all labels of the global batch, however it is cut into packs, ranks and stages; a pack without labels adds 0 to both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

from gram_engine.data.loader import PackedBatch


@dataclass
class ObjectiveOutput:
    """Result of one micro-batch on the last pipeline stage."""

    loss_sum: Tensor
    """Scalar fp32, part of the graph even when the pack holds no label."""
    count: Tensor
    """Scalar int32: labels (stage 2) or predicted tokens (stage 1)."""
    stats: Tensor
    """[len(stat_names)] detached fp32 sums; they add up over micro-batches and processes."""
    margins: Tensor | None = None
    """[samples] detached fp32: Z_A - Z_B of each sample of the pack, for objectives that rank."""


class Objective(Protocol):
    """Called as the model's output_processor; see RewardModel."""

    stat_names: tuple[str, ...]

    def __call__(self, hidden_states: Tensor, output_weight: Tensor, context: PackedBatch) -> ObjectiveOutput: ...

    def metrics(self, stats: dict[str, float]) -> dict[str, float]:
        """Figures to report from the summed statistics of a step; `loss` is always among them."""
        ...


def gather_rows(hidden_states: Tensor, rows: Tensor, tp_group: dist.ProcessGroup, sequence_parallel: bool) -> Tensor:
    """Rows of a pack on every tensor-parallel process. [tokens (/ TP), 1, hidden], [rows] -> [rows, hidden].

    Under sequence parallelism each process adds the rows it holds.  The backward pass hands each process the gradient
    of its own rows as it arrives, so the caller's gradient must be whole (not a vocabulary shard's part).
    """
    hidden = hidden_states.squeeze(1)
    if not sequence_parallel:
        return hidden[rows]
    local = rows - dist.get_rank(tp_group) * hidden.shape[0]
    owned = (local >= 0) & (local < hidden.shape[0])
    held = hidden[local.clamp(0, hidden.shape[0] - 1)] * owned.to(hidden.dtype)[:, None]
    return reduce_from_tensor_model_parallel_region(held, group=tp_group)


def stack_stats(*values: Tensor) -> Tensor:
    """Detached fp32 vector of scalar sums."""
    return torch.stack([value.detach().float() for value in values])
