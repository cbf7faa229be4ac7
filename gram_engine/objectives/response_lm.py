"""Stage 1 (paper, Eq. 4): -log p([y_a, y_b] | x), the language-model loss of both responses."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor

from gram_engine.config.schema import Config
from gram_engine.data.loader import PackedBatch
from gram_engine.kernels import linear_cross_entropy
from gram_engine.kernels.dispatch import name_of
from gram_engine.model.reward_model import unwrap
from gram_engine.objectives.base import LanguageModelObjective, ObjectiveOutput
from gram_engine.objectives.direct_gradients import DirectGradients, main_grad_of
from gram_engine.objectives.plain import PlainResponseLM


class ResponseLM(LanguageModelObjective):
    """Mean cross entropy of the response tokens.

    The loader decides which tokens carry loss (both responses, or one: GRAM-v3, GRAM-v4): it lists them in the batch's `rows`
    and `targets`.  The output layer is computed for these rows alone.
    """

    @classmethod
    def variant(cls, config: Config) -> type[LanguageModelObjective]:
        return cls if config.training.fused_losses else PlainResponseLM

    @classmethod
    def describe(cls, config: Config, device: torch.device) -> str:
        return f"fused, cross entropy by {name_of('cross_entropy_grad_', device)}"

    def start_pass(self, model: list) -> None:
        self.direct = output_gradients(model)

    def __call__(self, hidden_states: Tensor, output_weight: Tensor, context: PackedBatch) -> ObjectiveOutput:
        loss_sum = self.cross_entropy(hidden_states, output_weight, context.rows, context.targets)
        self.direct.announce_in_backward_of(loss_sum)
        return self.output(loss_sum, context)

    def cross_entropy(
        self,
        hidden_states: Tensor,
        output_weight: Tensor,
        rows: Tensor,
        targets: Tensor,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        """Sum over `rows` of row_weight times the cross entropy of the row's target, a scalar in fp32.

        Args:
            hidden_states: [tokens (/ TP with sequence parallelism), 1, hidden].
            output_weight: [vocabulary / TP, hidden].
            rows, targets: int64 [rows], positions in the pack and the tokens that they predict.
            row_weight: fp32 [rows]; None: all 1.
        """
        # Each vocabulary shard gives a part of the rows' gradient; both regions add the parts in the backward pass.
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden_states, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden_states, group=self.tp_group)
        return linear_cross_entropy(
            hidden.squeeze(1)[rows],
            output_weight,
            targets,
            self.vocab_size,
            chunk_size=self.chunk_size,
            row_weight=row_weight,
            group=self.tp_group,
            main_grad=main_grad_of(output_weight),
        )


def output_gradients(model: list) -> DirectGradients:
    """DirectGradients of the output weight, for losses that write its whole gradient by hand.

    Nothing is to be announced if this process has no output layer, or if autograd reaches the weight as a tied embedding.
    """
    last = unwrap(model[-1])
    if not last.post_process or (last.pre_process and last.share_embeddings_and_output_weights):
        return DirectGradients(model[-1], [])
    return DirectGradients(model[-1], [last.output_weight()])
