"""The discriminative baseline (paper, Eq. 1): -log sigma(r(x, y_chosen) - r(x, y_rejected)), r by a scalar head.

With --sft-loss-weight W the language-model loss of the chosen response is added (the paper's + Regularization, after Yang et
al. 2024, "Regularizing Hidden States Enables Learning Generalizable Reward Model for LLMs"):

    loss of a pair = -log sigma(r_chosen - r_rejected) - W log p(y_chosen | x)

log p is summed over the response's tokens and those that end its text; the loss is the mean over the pairs of a step.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gram_engine.config.schema import Config
from gram_engine.data.loader import PackedBatch
from gram_engine.model.reward_model import unwrap
from gram_engine.objectives.base import ObjectiveOutput, PreferenceObjective, last_layer
from gram_engine.objectives.direct_gradients import DirectGradients
from gram_engine.objectives.response_lm import ResponseLM, output_gradients


class BradleyTerry(PreferenceObjective):
    """Bradley-Terry loss of the rewards at the last tokens of [x, y_a] and [x, y_b], which are in the same pack.

    The loss of a tie (preference 1/2) is the mean over both directions, which trains the rewards towards equality.
    """

    def __init__(self, config: Config, label_ids: tuple[int, int] | None, tp_group: dist.ProcessGroup):
        super().__init__(config, label_ids, tp_group)
        self.sft_loss_weight = config.training.sft_loss_weight
        if self.sft_loss_weight:
            self.stat_names = (*PreferenceObjective.stat_names, "sft_sum")
            self.language = ResponseLM(config, label_ids, tp_group)

    @classmethod
    def describe(cls, config: Config, device: torch.device) -> str:
        if config.has_vocabulary_head:
            return ResponseLM.describe(config, device)
        return f"Bradley-Terry of a scalar head, last layer {last_layer(config)}"

    def start_pass(self, model: list) -> None:
        self.last = unwrap(model[-1])
        self.direct = output_gradients(model) if self.sft_loss_weight else DirectGradients(model[-1], [])

    def __call__(self, hidden_states: Tensor, output_weight: Tensor | None, context: PackedBatch) -> ObjectiveOutput:
        rewards = self.last.score(self.label_rows(hidden_states, context))
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
        del metrics["prefers_a"]  # the loss does not depend on which response is A
        if self.sft_loss_weight:
            metrics["sft_loss"] = stats["sft_sum"] / max(stats["labels"], 1)
        return metrics
