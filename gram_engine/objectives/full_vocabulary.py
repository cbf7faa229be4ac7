"""Stage 2 with softmax and label smoothing over the whole vocabulary instead of the two labels (paper, Table 5: "vanilla")."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor

from gram_engine.config.schema import Config
from gram_engine.data.loader import PackedBatch
from gram_engine.kernels import linear_cross_entropy
from gram_engine.objectives.base import ObjectiveOutput, PreferenceObjective, local_label_rows
from gram_engine.objectives.direct_gradients import main_grad_of
from gram_engine.objectives.response_lm import ResponseLM, output_gradients


class FullVocabularyPreference(PreferenceObjective):
    """Cross entropy of the label token among all tokens, `label_smoothing` spread evenly over the vocabulary.

    --label-smoothing has torch's meaning here; a tie trains both labels, each with half the weight.  The loss is equal at any
    tensor-parallel size, which megatron-core's own label smoothing is not.
    """

    def __init__(self, config: Config, label_ids: tuple[int, int], tp_group: dist.ProcessGroup):
        super().__init__(config, label_ids, tp_group)
        self.label_smoothing = config.training.label_smoothing

    @classmethod
    def describe(cls, config: Config, device: torch.device) -> str:
        return ResponseLM.describe(config, device)

    def start_pass(self, model: list) -> None:
        self.direct = output_gradients(model)

    def __call__(self, hidden_states: Tensor, output_weight: Tensor, context: PackedBatch) -> ObjectiveOutput:
        rows = self.label_rows(hidden_states, context)
        twice = copy_to_tensor_model_parallel_region(rows, group=self.tp_group).repeat(2, 1)
        targets = torch.cat([context.rows.new_full((len(rows),), label) for label in self.label_ids])
        weights = torch.cat([context.preference, 1 - context.preference]) * context.weight.repeat(2)
        loss_sum = linear_cross_entropy(
            twice,
            output_weight,
            targets,
            self.vocab_size,
            chunk_size=self.chunk_size,
            label_smoothing=self.label_smoothing,
            row_weight=weights,
            group=self.tp_group,
            main_grad=main_grad_of(output_weight),
        )
        self.direct.announce_in_backward_of(loss_sum)
        return self.output(loss_sum, self._margins(rows.detach(), output_weight.detach()), context)

    def _margins(self, rows: Tensor, output_weight: Tensor) -> Tensor:
        """Z_A - Z_B, [labels] fp32."""
        row_a, row_b = local_label_rows(output_weight, self.label_ids, self.tp_group).float()
        margins = rows.float() @ (row_a - row_b)
        dist.all_reduce(margins, group=self.tp_group)
        return margins
