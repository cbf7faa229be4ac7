"""The output layer of stage 2: the final norm and two rows of the output weight, as one vector and one gradient vector.

The margin of a sample is Z_A - Z_B = norm(x) . (row_a - row_b) = rstd(x) x . direction with
direction = norm weight * (row_a - row_b).  Its gradient s, summed over all samples of a step, gives those of all parameters:

    d row_a = norm weight * s        d row_b = -d row_a        d norm weight = (row_a - row_b) * s

So a step needs the two rows at its start, from the processes that hold them, and one sum of s over processes at its end,
without communication in between.  A gradient of the whole output weight is never allocated.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from gram_engine.model.reward_model import unwrap
from gram_engine.objectives.base import local_label_rows
from gram_engine.objectives.direct_gradients import DirectGradients


class LabelHead:
    """The rows of the two label tokens and the final norm of a model, on its last pipeline stage.

    Args:
        label_ids: tokens A and B.
        sum_over_tp: whether tensor-parallel processes hold different label rows (sequence parallelism without pruning).
    """

    def __init__(self, label_ids: tuple[int, int], sum_over_tp: bool):
        self.label_ids = label_ids
        self.sum_over_tp = sum_over_tp
        self._direction: Tensor | None = None

    def start_pass(self, model: list) -> None:
        """Called before each pass with the model's chunks; with tied embeddings the first stage sends its rows to the last."""
        self.first, self.last = unwrap(model[0]), unwrap(model[-1])
        self._last_chunk, self._direction, self._rows = model[-1], None, None
        if self.first.borrows_label_rows and (self.first.pre_process or self.last.post_process):
            self._rows = self._exchange_rows(model[0])
        self.direct = None

    def direction(self) -> Tensor:
        """[hidden] fp32 (float64 for a float64 model): the leaf of the graph that collects the gradient s of the step."""
        if self._direction is None:
            norm = self._norm_weight()
            if self._rows is None:
                self._rows = self._whole_rows(self.last.output_weight())
            self._difference = self._rows[0] - self._rows[1]
            self._direction = (norm.detach().to(self._difference.dtype) * self._difference).requires_grad_()
            self.direct = DirectGradients(self._last_chunk, self._unreached_parameters())
        return self._direction

    @torch.no_grad()
    def finish_gradients(self, num_labels: Tensor) -> None:
        """Add the step's gradient, divided by `num_labels`, to main_grad of the norm weight and of the two rows."""
        row = None
        if self.last.post_process:
            # The same factor, rounded in the same way, as megatron-core's for all other gradients.
            total = self._sum_over_processes() * (1.0 / num_labels.clamp(min=1))
            norm = self._norm_weight()
            if norm.requires_grad:
                norm.main_grad += self._difference * total
            row = norm.to(total.dtype) * total
        weight = self._weight()
        if self.first.borrows_label_rows and (self.first.pre_process or self.last.post_process):
            row = self._from_last_to_first(row)
        if weight is not None and weight.requires_grad:
            self._add_to_rows(weight, row)

    def _unreached_parameters(self) -> list:
        """Parameters of the last stage that autograd does not reach (a tied embedding is reached at the model's input)."""
        weight = self.last.output_weight()
        unreached = [] if weight is None or self.last.share_embeddings_and_output_weights else [weight]
        return [self._norm_weight(), *unreached]

    def _norm_weight(self) -> Tensor:
        return self.last.decoder.final_layernorm.weight

    def _weight(self) -> Tensor | None:
        """The weight on this process that holds the label rows: the embedding, the output layer, or None."""
        if self.first.borrows_label_rows:
            return self.first.embedding.word_embeddings.weight if self.first.pre_process else None
        return self.last.output_weight() if self.last.post_process else None

    def _whole_rows(self, weight: Tensor) -> Tensor:
        """The label rows, [2, hidden] fp32 (float64 for a float64 model), the same on every tensor-parallel process."""
        group = parallel_state.get_tensor_model_parallel_group()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        rows = local_label_rows(weight.detach(), self.label_ids, group).to(dtype)
        if dist.get_world_size(group) > 1:
            dist.all_reduce(rows, group=group)
        return rows

    def _exchange_rows(self, chunk) -> Tensor:
        """The label rows [2, hidden]: the first stage sends them, the last stage receives them."""
        if self.first.pre_process:
            weight = self.first.embedding.word_embeddings.weight
            if weight.requires_grad and getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False):
                chunk.param_to_bucket_group[weight].finish_param_sync()
            rows = self._whole_rows(weight)
        else:
            norm = self._norm_weight()
            dtype = torch.promote_types(norm.dtype, torch.float32)
            rows = torch.empty(2, len(norm), dtype=dtype, device=norm.device)
        group = parallel_state.get_embedding_group()
        dist.broadcast(rows, parallel_state.get_pipeline_model_parallel_first_rank(), group=group)
        return rows

    def _from_last_to_first(self, row: Tensor | None) -> Tensor:
        if row is None:
            row = torch.empty_like(self._rows[0])
        group = parallel_state.get_embedding_group()
        dist.broadcast(row, parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
        return row

    def _sum_over_processes(self) -> Tensor:
        total = torch.zeros_like(self.direction()) if self.direction().grad is None else self.direction().grad
        if self.sum_over_tp:
            group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        else:
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(total, group=group)
        return total

    def _add_to_rows(self, weight: Tensor, row: Tensor) -> None:
        first = parallel_state.get_tensor_model_parallel_rank() * len(weight)
        for token, sign in zip(self.label_ids, (1, -1)):
            if 0 <= token - first < len(weight):
                weight.main_grad[token - first].add_(row, alpha=sign)

