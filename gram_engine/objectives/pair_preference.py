"""Stage 2 (paper, Eq. 6-8): predict the label token A or B, softmax over these two tokens, label smoothing eps."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from gram_engine.config.schema import Config
from gram_engine.data.loader import PackedBatch
from gram_engine.kernels import pair_loss
from gram_engine.kernels.dispatch import name_of
from gram_engine.objectives.base import ObjectiveOutput, PreferenceObjective, last_layer, local_rows
from gram_engine.objectives.full_vocabulary import FullVocabularyPreference
from gram_engine.objectives.label_head import LabelHead
from gram_engine.objectives.plain import PlainPairPreference


class PairPreference(PreferenceObjective):
    """Two-token label-smoothed loss at each sample's label row, fused with the final norm; needs no communication.

    --label-smoothing is the paper's eps, the weight of the wrong label: torch's cross entropy over the two tokens with
    label_smoothing = 2 eps is the same loss.  Ties (preference 1/2) train towards 1/2.
    """

    def __init__(self, config: Config, label_ids: tuple[int, int], tp_group: dist.ProcessGroup):
        super().__init__(config, label_ids, tp_group)
        self.label_smoothing = config.training.label_smoothing
        self.norm_eps = config.model.norm_epsilon  # of the final norm, which the model leaves to this objective
        self.parts_over_tp = self.sequence_parallel and not self.pruned
        self.head = LabelHead(label_ids, sum_over_tp=self.parts_over_tp)

    @classmethod
    def variant(cls, config: Config) -> type[PreferenceObjective]:
        if config.training.label_softmax == "full-vocabulary":
            return FullVocabularyPreference
        return cls if config.training.fused_losses else PlainPairPreference

    @classmethod
    def describe(cls, config: Config, device: torch.device) -> str:
        return f"fused, pair loss by {name_of('pair_loss_forward', device)}, last layer {last_layer(config)}"

    def start_pass(self, model: list) -> None:
        self.head.start_pass(model)

    def finish_gradients(self, num_labels: Tensor) -> None:
        self.head.finish_gradients(num_labels)

    def __call__(self, hidden_states: Tensor, output_weight: Tensor | None, context: PackedBatch) -> ObjectiveOutput:
        hidden = hidden_states.squeeze(1)
        rows = None if self.pruned else context.rows
        if self.parts_over_tp:
            rows = local_rows(context.rows, hidden, self.tp_group)
        losses, margins = pair_loss(
            hidden, self.head.direction(), context.preference, self.label_smoothing, self.norm_eps, rows
        )
        loss_sum = (losses * context.weight).sum()
        self.head.direct.announce_in_backward_of(loss_sum)
        return self.output(loss_sum, margins, context, here=rows >= 0 if self.parts_over_tp else None)
