"""The two passes of a vocabulary-parallel cross entropy over logits that exist once and are replaced by their gradient.

    stats = cross_entropy_stats(logits, targets, valid)      # of this process's columns; then combined over the processes
    cross_entropy_grad_(logits, targets, lse, valid, target_weight, other_weight)

An implementation (dispatch.py) gets contiguous arguments, 0 <= valid <= columns and at least one row:

    cross_entropy_stats(logits, targets, valid, stats)       # fills stats
    cross_entropy_grad_(logits, targets, lse, valid, target_weight, other_weight)
"""

from __future__ import annotations

import torch
from torch import Tensor

from gram_engine.kernels.dispatch import contiguous_rows, implementation


@torch.library.custom_op("gram_engine::cross_entropy_stats", mutates_args=())
def cross_entropy_stats(logits: Tensor, targets: Tensor, valid: int) -> Tensor:
    """Largest logit, sum of exp(logit - largest), the target's logit, and sum of the logits, of each row.

    Args:
        logits: [rows, columns] fp32, bf16, fp16 or float64.
        targets: [rows] int64, column of the target, or -1 if another process has it (its logit counts as 0).
        valid: number of columns that are real tokens; the columns after them are the vocabulary's padding.  It may be 0 or
            negative: then the largest logit is -inf and the sums are 0.

    Returns:
        [rows, 4] fp32 (float64 for float64 logits).

    Raises:
        ValueError: targets are not [rows] int64.
    """
    _check(logits, targets)
    stats = _empty_stats(logits)
    if len(logits):
        run = implementation("cross_entropy_stats", logits.device)
        run(contiguous_rows(logits), targets.contiguous(), max(valid, 0), stats)
    return stats


@cross_entropy_stats.register_fake
def _(logits, targets, valid):
    return _empty_stats(logits)


@torch.library.custom_op("gram_engine::cross_entropy_grad_", mutates_args=("logits",))
def cross_entropy_grad_(
    logits: Tensor, targets: Tensor, lse: Tensor, valid: int, target_weight: float, other_weight: float
) -> None:
    """Replace logits by d loss / d logits = exp(logit - lse) - other_weight - target_weight [at the target].

    The loss is lse - target_weight * (the target's logit) - other_weight * (sum of all valid logits), with target_weight +
    other_weight * (size of the whole vocabulary) = 1.  The gradient is computed in fp32 and rounded once; it is 0 in padding
    columns.

    Args:
        logits: as for cross_entropy_stats, column stride 1.
        targets, valid: as for cross_entropy_stats.
        lse: [rows] fp32 (float64 for float64 logits), log of the sum of exp(logit) over the whole vocabulary.

    Raises:
        ValueError: targets are not [rows] int64, or the logits' columns are not adjacent in memory.
    """
    _check(logits, targets)
    if logits.stride(1) != 1:
        raise ValueError(f"logits have column stride {logits.stride(1)}; they are replaced in place, so it must be 1.")
    if len(logits):
        run = implementation("cross_entropy_grad_", logits.device)
        run(logits, targets.contiguous(), lse.contiguous(), max(valid, 0), target_weight, other_weight)


def _check(logits: Tensor, targets: Tensor) -> None:
    if targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets are {tuple(targets.shape)} {targets.dtype}; [{len(logits)}] torch.int64 is needed.")


def _empty_stats(logits: Tensor) -> Tensor:
    return logits.new_empty((len(logits), 4), dtype=torch.promote_types(logits.dtype, torch.float32))
