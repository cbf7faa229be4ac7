"""The discriminative baseline (paper, Eq. 1): -log sigma(r(x, y_chosen) - r(x, y_rejected)), r by a scalar head.

With sft_loss_weight W the chosen response is learnt too (the paper's + Regularization, after Yang et al. 2024,
"Regularizing Hidden States Enables Learning Generalizable Reward Model for LLMs"):

    loss of a pair = -log sigma(r_chosen - r_rejected) - W log p(y_chosen | x)

log p is the sum over the response's tokens and those that end its text; the loss is the mean over the pairs of a step.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gram_engine.config.schema import Config
from gram_engine.data.loader import PackedBatch
from gram_engine.kernels.dispatch import name_of
from gram_engine.model.reward_model import unwrap
from gram_engine.objectives.base import ObjectiveOutput, PreferenceObjective, gather_rows, last_layer
from gram_engine.objectives.direct_gradients import DirectGradients
from gram_engine.objectives.response_lm import ResponseLM, output_gradients


class BradleyTerry(PreferenceObjective):
    """Bradley-Terry loss of the rewards at the ends of [x, y_a] and [x, y_b], which lie in the same pack.

    A tie (preference 1/2) is the mean of the losses of both directions, which trains the rewards towards equality.

    Args:
        pruned: the model returns the rows of the ends alone (model/label_rows.py).
        language: cross entropy of rows that meet the output layer, for the chosen response; used where its weight is not 0.
    """

    depends_on_order = False

    def __init__(
        self,
        *,
        pruned: bool,
        sft_loss_weight: float,
        language: ResponseLM,
        tp_group: dist.ProcessGroup,
        sequence_parallel: bool,
    ):
        self.pruned = pruned
        self.sft_loss_weight = sft_loss_weight
        self.language = language
        self.tp_group = tp_group
        self.sequence_parallel = sequence_parallel
        if sft_loss_weight:
            self.stat_names = (*PreferenceObjective.stat_names, "sft_sum")

    @classmethod
    def build(cls, config: Config, label_ids: tuple[int, int] | None, tp_group: dist.ProcessGroup) -> BradleyTerry:
        model, training = config.model, config.training
        shared = dict(tp_group=tp_group, sequence_parallel=config.parallel.sequence_parallel)
        return cls(
            pruned=config.prunes_last_layer,
            sft_loss_weight=training.sft_loss_weight,
            language=ResponseLM(vocab_size=model.vocab_size, chunk_size=training.logits_chunk_size, **shared),
            **shared,
        )

    @classmethod
    def describe(cls, config: Config, device: torch.device) -> str:
        if config.has_vocabulary_head:
            return f"fused, cross entropy by {name_of('cross_entropy_grad_', device)}"
        return f"Bradley-Terry of a scalar head, last layer {last_layer(config)}"

    def start_pass(self, model: list) -> None:
        self.last = unwrap(model[-1])
        self.direct = output_gradients(model) if self.sft_loss_weight else DirectGradients(model[-1], [])

    def __call__(self, hidden_states: Tensor, output_weight: Tensor | None, context: PackedBatch) -> ObjectiveOutput:
        if self.pruned:
            rows = hidden_states.squeeze(1)
        else:
            rows = gather_rows(hidden_states, context.rows, self.tp_group, self.sequence_parallel)
        rewards = self.last.score(rows)
        margins = rewards[0::2] - rewards[1::2]
        losses = F.binary_cross_entropy_with_logits(margins, context.preference.to(margins), reduction="none")
        loss_sum = (losses * context.weight).sum()
        if not self.sft_loss_weight:
            return self.output(loss_sum, margins, context)
        weighted = self.language.cross_entropy(
            hidden_states, output_weight, context.sft_rows, context.sft_targets, self.sft_loss_weight * context.sft_weight
        )
        loss_sum = loss_sum + weighted
        self.direct.announce_in_backward_of(loss_sum)
        output = self.output(loss_sum, margins, context)
        sft_sum = weighted.detach() / self.sft_loss_weight
        output.stats = torch.cat([output.stats, sft_sum.to(output.stats)[None]])
        return output

    def metrics(self, stats: dict[str, float]) -> dict[str, float]:
        metrics = super().metrics(stats)
        del metrics["prefers_a"]  # which response stands first means nothing here
        if self.sft_loss_weight:
            metrics["sft_loss"] = stats["sft_sum"] / max(stats["labels"], 1)
        return metrics
