"""What an objective is: hidden rows of a pack in, a summed loss with its count and statistics out.

How the loss is scaled.  An objective returns the SUM of its losses over the micro-batch and the number of labels.
megatron-core (`calculate_per_token_loss`) adds gradients over micro-batches and data-parallel processes without
averaging, adds the counts the same way, and divides the gradients by the total once per step.  So the loss is the mean
over all labels of the global batch, however it is cut into packs, ranks and stages; a pack without labels adds 0 to both.
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
    """Scalar fp32, part of the graph even when the pack holds no label."""
    count: Tensor
    """Scalar int32: labels (stage 2), predicted tokens (stage 1) or pairs (bradley-terry)."""
    stats: Tensor
    """[len(stat_names)] detached fp32 sums; they add up over micro-batches and processes."""
    margins: Tensor | None = None
    """[samples] detached fp32: Z_A - Z_B (or r_a - r_b) of each sample of the pack, for objectives that rank."""


class Objective:
    """Called as the model's output_processor (see RewardModel), between start_pass and finish_gradients."""

    stat_names: tuple[str, ...]
    parts_over_tp = False
    """Whether tensor-parallel processes hold parts of loss, stats and margins (else each holds the whole)."""
    depends_on_order = False
    """Whether a verdict may change with the order of the responses, so that evaluation needs both."""

    @classmethod
    def build(cls, config: Config, label_ids: tuple[int, int] | None, tp_group: dist.ProcessGroup) -> Objective:
        """The objective as `config` asks for it; `label_ids` are the tokens A and B of the data's template."""
        raise NotImplementedError

    @classmethod
    def describe(cls, config: Config, device: torch.device) -> str:
        """What the log says of the loss.

        Raises:
            ConfigError: GRAM_KERNELS names kernels that cannot run on `device`.
        """
        return f"{config.task.name}, last layer {last_layer(config)}"

    def __call__(self, hidden_states: Tensor, output_weight: Tensor | None, context: PackedBatch) -> ObjectiveOutput:
        raise NotImplementedError

    def start_pass(self, model: list) -> None:
        """Before each pass of the schedule, on every process; `model` are its chunks."""

    def finish_gradients(self, num_labels: Tensor) -> None:
        """After gradients were summed over processes and divided by `num_labels`, the step's total; on every process."""

    def metrics(self, stats: dict[str, float]) -> dict[str, float]:
        """Figures to report from the summed statistics of a step; `loss` is always among them."""
        raise NotImplementedError


class LanguageModelObjective(Objective):
    """Statistics of stage 1."""

    stat_names = ("loss_sum", "tokens")

    def output(self, loss_sum: Tensor, context: PackedBatch) -> ObjectiveOutput:
        """The micro-batch's result."""
        count = torch.full((), len(context.rows), dtype=torch.int32, device=loss_sum.device)
        return ObjectiveOutput(loss_sum, count, stack_stats(loss_sum, count))

    def metrics(self, stats: dict[str, float]) -> dict[str, float]:
        loss = stats["loss_sum"] / max(stats["tokens"], 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 50.0))}


class PreferenceObjective(Objective):
    """Statistics of stage 2, and of other losses of margins at label rows."""

    stat_names = ("loss_sum", "labels", "decided", "correct", "margin_sum", "prefers_a")
    depends_on_order = True

    def output(
        self, loss_sum: Tensor, margins: Tensor, context: PackedBatch, here: Tensor | None = None
    ) -> ObjectiveOutput:
        """The micro-batch's result; `here` [samples] tells the samples whose rows this process holds (None: all)."""
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
    """For the log."""
    return "pruned" if config.prunes_last_layer else "whole"


def gather_rows(hidden_states: Tensor, rows: Tensor, tp_group: dist.ProcessGroup, sequence_parallel: bool) -> Tensor:
    """A few rows of a pack on every tensor-parallel process. [tokens (/ TP), 1, hidden], [rows] -> [rows, hidden].

    Under sequence parallelism each process adds the rows it holds.  The backward pass hands each process the gradient
    of its own rows as it arrives, so the caller's gradient must be whole (not a vocabulary shard's part).
    """
    hidden = hidden_states.squeeze(1)
    if not sequence_parallel:
        return hidden[rows]
    local = local_rows(rows, hidden, tp_group)
    held = hidden[local.clamp(min=0)] * (local >= 0).to(hidden.dtype)[:, None]
    return reduce_from_tensor_model_parallel_region(held, group=tp_group)


def local_rows(rows: Tensor, hidden: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
    """Positions in a pack -> positions in this process's slice `hidden` [tokens / TP, hidden], -1 outside."""
    local = rows - dist.get_rank(tp_group) * len(hidden)
    return torch.where((local >= 0) & (local < len(hidden)), local, -1)


def local_label_rows(weight: Tensor, label_ids: tuple[int, int], tp_group: dist.ProcessGroup) -> Tensor:
    """The label tokens' rows [2, hidden] of a vocabulary-parallel weight; zeros where another process holds a row."""
    first = dist.get_rank(tp_group) * len(weight)
    held = [weight[token - first] if 0 <= token - first < len(weight) else weight[0] * 0 for token in label_ids]
    return torch.stack(held)


def stack_stats(*values: Tensor) -> Tensor:
    """Detached fp32 vector of scalar sums."""
    return torch.stack([value.detach().float() for value in values])
