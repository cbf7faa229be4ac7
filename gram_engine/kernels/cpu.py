"""The kernels in C++ for CPUs (csrc/cpu_ops.cpp), built by setup.py; signatures as in reference.py."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).parent / "libgram_cpu.so"

if not LIBRARY.is_file():
    raise ImportError(f"{LIBRARY.name} was not built (pip install --no-build-isolation -e . tells why)")
torch.ops.load_library(str(LIBRARY))
_ops = torch.ops.gram_engine_cpu


def pair_loss_forward(
    hidden: Tensor,
    rows: Tensor | None,
    direction: Tensor,
    preference: Tensor,
    label_smoothing: float,
    norm_eps: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, margin, rstd, slope), each [labels]."""
    results = tuple(torch.empty_like(preference) for _ in range(4))
    rows = None if rows is None else rows.contiguous()
    eps = -1.0 if norm_eps is None else norm_eps
    _ops.pair_loss_forward(
        _dense_rows(hidden), rows, direction.contiguous(), preference.contiguous(), label_smoothing, eps, *results
    )
    return results


def pair_loss_backward(
    hidden: Tensor,
    rows: Tensor | None,
    direction: Tensor,
    margin: Tensor,
    rstd: Tensor,
    grad_margin: Tensor,
    norm_eps: float | None,
) -> tuple[Tensor, Tensor]:
    """(gradient of the label rows [labels, hidden], gradient of `direction` [hidden])."""
    grad_rows = hidden.new_empty(len(margin), hidden.shape[1])
    grad_direction = torch.empty_like(direction, memory_format=torch.contiguous_format)
    rows = None if rows is None else rows.contiguous()
    vectors = [vector.contiguous() for vector in (direction, margin, rstd, grad_margin)]
    _ops.pair_loss_backward(_dense_rows(hidden), rows, *vectors, norm_eps is not None, grad_rows, grad_direction)
    return grad_rows, grad_direction


def cross_entropy_stats(logits: Tensor, targets: Tensor, valid: int) -> Tensor:
    """[rows, 4]: largest logit, sum of exp(logit - largest), the target's logit, sum of logits."""
    out = logits.new_empty(len(logits), 4, dtype=torch.promote_types(logits.dtype, torch.float32))
    _ops.cross_entropy_stats(_dense_rows(logits), targets.contiguous(), max(valid, 0), out)
    return out


def cross_entropy_grad_(
    logits: Tensor, targets: Tensor, log_normaliser: Tensor, valid: int, target_weight: float, other_weight: float
) -> None:
    """logits <- their gradient, in place; columns must lie next to each other."""
    assert logits.stride(1) == 1, "in place, so no copy can be made"
    _ops.cross_entropy_grad_(
        logits, targets.contiguous(), log_normaliser.contiguous(), max(valid, 0), target_weight, other_weight
    )


def _dense_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
