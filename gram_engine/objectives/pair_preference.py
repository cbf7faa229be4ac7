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
    """Two-token label-smoothed loss at each sample's label row, fused with the final norm; no communication of its own.

    `label_smoothing` is the paper's eps, the weight of the wrong label.  torch's cross entropy with
    label_smoothing = 2 eps over the two tokens is the same loss.  Ties (preference 1/2) train towards 1/2.

    Args:
        pruned: the model returns the label rows alone (model/label_rows.py), whole on every tensor-parallel process.
        norm_eps: epsilon of the final norm, which the model leaves to this objective.
    """

    def __init__(
        self,
        *,
        label_ids: tuple[int, int],
        label_smoothing: float,
        norm_eps: float,
        pruned: bool,
        tp_group: dist.ProcessGroup,
        sequence_parallel: bool,
    ):
        self.label_smoothing = label_smoothing
        self.norm_eps = norm_eps
        self.pruned = pruned
        self.tp_group = tp_group
        self.parts_over_tp = sequence_parallel and not pruned
        self.head = LabelHead(label_ids, sum_over_tp=self.parts_over_tp)

    @classmethod
    def build(cls, config: Config, label_ids: tuple[int, int] | None, tp_group: dist.ProcessGroup) -> PreferenceObjective:
        training = config.training
        labels = dict(label_ids=label_ids, label_smoothing=training.label_smoothing, tp_group=tp_group)
        labels["sequence_parallel"] = config.parallel.sequence_parallel
        if training.label_softmax == "full-vocabulary":
            vocabulary = dict(vocab_size=config.model.vocab_size, chunk_size=training.logits_chunk_size)
            return FullVocabularyPreference(pruned=config.prunes_last_layer, **vocabulary, **labels)
        if not training.fused_losses:
            return PlainPairPreference(**labels)
        return cls(norm_eps=config.model.norm_epsilon, pruned=config.prunes_last_layer, **labels)

    @classmethod
    def describe(cls, config: Config, device: torch.device) -> str:
        if not config.label_rows_only:
            return f"fused, cross entropy by {name_of('cross_entropy_grad_', device)}"
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
