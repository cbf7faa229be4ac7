"""The protocol of objectives: from the hidden states of a pack to the sum of its losses, their number, and statistics.

Scaling of the loss.  An objective returns the SUM of its losses over the micro-batch and the number of labels.
megatron-core (`calculate_per_token_loss`) adds gradients over micro-batches and data-parallel processes without
averaging, adds the counts the same way, and divides the gradients by the total once per step.  So the loss is the mean
over all labels of the global batch, however it is divided into packs, ranks and stages; a pack without labels adds 0 to both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

from gram_engine.config.schema import Config
from gram_engine.data.loader import PackedBatch


@dataclass
class ObjectiveOutput:
    """Result of one micro-batch on the last pipeline stage."""

    loss_sum: Tensor
    """Scalar fp32, part of the autograd graph even if the pack holds no label."""
    count: Tensor
    """Scalar int32: label rows (pair-preference), predicted tokens (response-lm) or pairs (bradley-terry)."""
    stats: Tensor
    """[len(stat_names)] fp32, detached: sums over the micro-batch, which are added up over micro-batches and processes."""
    margins: Tensor | None = None
    """[samples] fp32, detached: Z_A - Z_B (or r_a - r_b) of each sample of the pack; None for objectives without verdicts."""


class Objective:
    """Called as the model's output_processor (see RewardModel), between start_pass and finish_gradients.

    Args:
        label_ids: tokens A and B of the data's template; None if the task has no label tokens.
        tp_group: the tensor-parallel processes.
    """

    stat_names: tuple[str, ...]
    parts_over_tp = False
    """Whether each tensor-parallel process holds a part of loss, stats and margins; otherwise each holds the whole."""
    depends_on_order = False
    """Whether the verdict may change with the order of the responses, so that evaluation needs both orders."""

    def __init__(self, config: Config, label_ids: tuple[int, int] | None, tp_group: dist.ProcessGroup):
        self.label_ids = label_ids
        self.tp_group = tp_group
        self.sequence_parallel = config.parallel.sequence_parallel
        self.pruned = config.prunes_last_layer
        self.vocab_size = config.model.vocab_size
        self.chunk_size = config.training.logits_chunk_size

    @classmethod
    def variant(cls, config: Config) -> type[Objective]:
        """The class that computes this loss with the flags of `config`, such as --no-fused-losses."""
        return cls

    @classmethod
    def describe(cls, config: Config, device: torch.device) -> str:
        """The loss and its kernels, for the log.

        Raises:
            ConfigError: GRAM_KERNELS names kernels that cannot run on `device`.
        """
        return f"{config.task.name}, last layer {last_layer(config)}"

    def __call__(self, hidden_states: Tensor, output_weight: Tensor | None, context: PackedBatch) -> ObjectiveOutput:
        """The loss of a micro-batch, on the last pipeline stage.

        Args:
            hidden_states: [tokens (/ TP with sequence parallelism), 1, hidden], or [label rows, 1, hidden] if `pruned`.
            output_weight: [vocabulary / TP, hidden]; None if the model has no output layer on this process.
            context: the pack, whose `rows` are the positions that predict.
        """
        raise NotImplementedError

    def start_pass(self, model: list) -> None:
        """Called on every process before each pass of the schedule, with the model's chunks on this process."""

    def finish_gradients(self, num_labels: Tensor) -> None:
        """Called on every process after gradients are summed over processes and divided by the step's `num_labels`."""

    def metrics(self, stats: dict[str, float]) -> dict[str, float]:
        """What is reported of a step's summed statistics, by name; `loss` is always among it."""
        raise NotImplementedError


class LanguageModelObjective(Objective):
    """Count and statistics of losses at target tokens (stage 1)."""

    stat_names = ("loss_sum", "tokens")

    def output(self, loss_sum: Tensor, context: PackedBatch) -> ObjectiveOutput:
        """The micro-batch's result."""
        count = torch.full((), len(context.rows), dtype=torch.int32, device=loss_sum.device)
        return ObjectiveOutput(loss_sum, count, stack_stats(loss_sum, count))

    def metrics(self, stats: dict[str, float]) -> dict[str, float]:
        loss = stats["loss_sum"] / max(stats["tokens"], 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 50.0))}


class PreferenceObjective(Objective):
    """Count and statistics of losses of a margin between two responses (stage 2, Bradley-Terry)."""

    stat_names = ("loss_sum", "labels", "decided", "correct", "margin_sum", "prefers_a")

    def __init__(self, config: Config, label_ids: tuple[int, int] | None, tp_group: dist.ProcessGroup):
        super().__init__(config, label_ids, tp_group)
        self.depends_on_order = config.task.order_matters

    def label_rows(self, hidden_states: Tensor, context: PackedBatch) -> Tensor:
        """Hidden states of the label rows, [rows, hidden], the same on every tensor-parallel process."""
        if self.pruned:
            return hidden_states.squeeze(1)
        return gather_rows(hidden_states, context.rows, self.tp_group, self.sequence_parallel)

    def output(
        self, loss_sum: Tensor, margins: Tensor, context: PackedBatch, here: Tensor | None = None
    ) -> ObjectiveOutput:
        """The micro-batch's result.

        Args:
            margins: [samples] fp32, Z_A - Z_B; 0 where another process holds the sample's row.
            here: [samples] bool, whether this process holds the sample's row; None: it holds all.
        """
        count = torch.full((), len(context.sample_ids), dtype=torch.int32, device=loss_sum.device)
        sign = 2 * context.preference - 1
        if here is None:
            here = torch.ones_like(sign, dtype=torch.bool)
        towards_winner, decided = margins.detach() * sign, (sign != 0) & here
        stats = stack_stats(
            loss_sum,
            here.sum(),
            decided.sum(),
            (decided * (towards_winner.sign() + 1)).sum() / 2,  # an even margin counts half, as in metrics.correctness
            towards_winner.sum(),
            (margins > 0).sum(),
        )
        return ObjectiveOutput(loss_sum, count, stats, margins.detach())

    def metrics(self, stats: dict[str, float]) -> dict[str, float]:
        labels, decided = max(stats["labels"], 1), max(stats["decided"], 1)
        return {
            "loss": stats["loss_sum"] / labels,
            "accuracy": stats["correct"] / decided,
            "margin": stats["margin_sum"] / decided,
            "prefers_a": stats["prefers_a"] / labels,
        }


def last_layer(config: Config) -> str:
    """How the last layer is computed (model/label_rows.py), for the log."""
    return "pruned" if config.prunes_last_layer else "whole"


def gather_rows(hidden_states: Tensor, rows: Tensor, tp_group: dist.ProcessGroup, sequence_parallel: bool) -> Tensor:
    """The hidden states of `rows` on every tensor-parallel process: [tokens (/ TP), 1, hidden], [rows] -> [rows, hidden].

    With sequence parallelism each process contributes the rows that it holds.  The backward pass does not sum over processes:
    the caller's gradient must be that of the whole vocabulary, not of one shard.
    """
    hidden = hidden_states.squeeze(1)
    if not sequence_parallel:
        return hidden[rows]
    local = local_rows(rows, hidden, tp_group)
    held = hidden[local.clamp(min=0)] * (local >= 0).to(hidden.dtype)[:, None]
    return reduce_from_tensor_model_parallel_region(held, group=tp_group)


def local_rows(rows: Tensor, hidden: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
    """Positions in a pack as positions in this process's slice `hidden` [tokens / TP, hidden]; -1 outside of it."""
    local = rows - dist.get_rank(tp_group) * len(hidden)
    return torch.where((local >= 0) & (local < len(hidden)), local, -1)


def local_label_rows(weight: Tensor, label_ids: tuple[int, int], tp_group: dist.ProcessGroup) -> Tensor:
    """The label tokens' rows, [2, hidden], of a vocabulary-parallel weight; zeros if another process holds the row."""
    first = dist.get_rank(tp_group) * len(weight)
    held = [weight[token - first] if 0 <= token - first < len(weight) else weight[0] * 0 for token in label_ids]
    return torch.stack(held)


def stack_stats(*values: Tensor) -> Tensor:
    """Detached fp32 vector of scalar sums."""
    return torch.stack([value.detach().float() for value in values])
