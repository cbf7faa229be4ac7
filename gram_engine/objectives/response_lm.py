"""Stage 1 (paper, Eq. 4): -log p([y_a, y_b] | x), the language-model loss of both responses."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor

from gram_engine.data.loader import PackedBatch
from gram_engine.kernels import linear_cross_entropy
from gram_engine.objectives.base import ObjectiveOutput, gather_rows, stack_stats


class ResponseLM:
    """Mean cross entropy of the response tokens; which tokens carry loss (both responses, or one: GRAM-v3, GRAM-v4)
    is decided by the loader, which lists them in the batch's `rows` and `targets`.
    """

    stat_names = ("loss_sum", "tokens")

    def __init__(self, *, vocab_size: int, chunk_size: int, tp_group: dist.ProcessGroup, sequence_parallel: bool):
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
        loss_sum = losses.sum()
        count = torch.tensor(len(context.rows), dtype=torch.int32, device=loss_sum.device)
        return ObjectiveOutput(loss_sum, count, stack_stats(loss_sum, count))

    def metrics(self, stats: dict[str, float]) -> dict[str, float]:
        loss = stats["loss_sum"] / max(stats["tokens"], 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 50.0))}
