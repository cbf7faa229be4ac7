"""The two passes of a vocabulary-parallel cross entropy over logits that lie in memory once and become their gradient.

    stats = cross_entropy_stats(logits, targets, valid)      # of this process's columns; combine over the processes
    cross_entropy_grad_(logits, targets, log_normaliser, valid, target_weight, other_weight)
"""

from __future__ import annotations

import torch
from torch import Tensor

from gram_engine.kernels.dispatch import implementation


@torch.library.custom_op("gram_engine::cross_entropy_stats", mutates_args=())
def cross_entropy_stats(logits: Tensor, targets: Tensor, valid: int) -> Tensor:
    """Largest logit, sum of exp(logit - largest), the target's logit, and sum of the logits, of each row.

    Args:
        logits: [rows, columns], fp32, bf16, fp16 or float64; row stride at least `columns`, column stride 1.
        targets: [rows] int64, column of the target, -1 where another process has it (its logit counts as 0).
        valid: columns that are real tokens; the rest is the vocabulary's padding.  May be 0 or negative: then the
            largest is -inf and the sums are 0.

    Returns:
        [rows, 4] fp32 (float64 for float64 logits).
    """
    return implementation("cross_entropy_stats", logits.device)(logits, targets, valid)


@cross_entropy_stats.register_fake
def _(logits, targets, valid):
    return logits.new_empty((len(logits), 4), dtype=torch.promote_types(logits.dtype, torch.float32))


@torch.library.custom_op("gram_engine::cross_entropy_grad_", mutates_args=("logits",))
def cross_entropy_grad_(
    logits: Tensor, targets: Tensor, log_normaliser: Tensor, valid: int, target_weight: float, other_weight: float
) -> None:
    """Replace logits by d loss / d logits = exp(logit - log_normaliser) - other_weight - target_weight [at the target].

    The loss is log_normaliser - target_weight * (target's logit) - other_weight * (sum of all valid logits), so target_weight
    + other_weight * (whole vocabulary) = 1.  Formed in fp32 and rounded once; padding columns become 0.

    Args:
        logits, targets, valid: as for cross_entropy_stats.
        log_normaliser: [rows] fp32 (float64), log of the sum of exp(logit) over the whole vocabulary.
    """
    run = implementation("cross_entropy_grad_", logits.device)
    run(logits, targets, log_normaliser, valid, target_weight, other_weight)
