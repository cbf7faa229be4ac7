"""The kernels in plain PyTorch: the fallback if no other implementation works, and what the others are tested against.

Arguments and outputs are described in pair_loss.py and cross_entropy.py.  All arithmetic is in fp32, or float64 for float64
input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pair_loss_forward(
    hidden: Tensor,
    rows: Tensor | None,
    direction: Tensor,
    preference: Tensor,
    label_smoothing: float,
    norm_eps: float,
    *outputs: Tensor,
) -> None:
    """Fill (loss, margin, rstd, dloss_dmargin)."""
    x, present = _label_rows(hidden, rows, direction.dtype)
    rstd = present if norm_eps < 0 else torch.rsqrt(x.square().mean(dim=1) + norm_eps) * present
    margin = rstd * (x @ direction)
    sign = torch.where(preference >= 0.5, 1.0, -1.0).to(margin.dtype)
    certainty = torch.maximum(preference, 1 - preference)
    eps = label_smoothing + (1 - 2 * label_smoothing) * (1 - certainty)
    towards = sign * margin  # Z of the preferred label minus Z of the other
    loss = (-F.logsigmoid(towards) + eps * towards) * present
    dloss_dmargin = sign * (eps - torch.sigmoid(-towards)) * present
    for output, value in zip(outputs, (loss, margin, rstd, dloss_dmargin), strict=True):
        output.copy_(value)


def pair_loss_backward(
    hidden: Tensor,
    rows: Tensor | None,
    direction: Tensor,
    margin: Tensor,
    rstd: Tensor,
    grad_margin: Tensor,
    has_norm: bool,
    grad_rows: Tensor,
    grad_direction: Tensor,
) -> None:
    """Fill the gradients of the label rows and of `direction`."""
    x, present = _label_rows(hidden, rows, direction.dtype)
    scale = grad_margin * rstd * present
    grad = scale[:, None] * direction
    if has_norm:
        grad = grad - (scale * rstd * margin / x.shape[1])[:, None] * x
    grad_rows.copy_(grad)
    grad_direction.copy_(scale @ x)


def _label_rows(hidden: Tensor, rows: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(label rows [labels, hidden], [labels] with 1 for a label and 0 where rows is -1)."""
    if rows is None:
        return hidden.to(dtype), torch.ones(len(hidden), dtype=dtype, device=hidden.device)
    present = (rows >= 0).to(dtype)
    return hidden[rows.clamp(min=0)].to(dtype) * present[:, None], present


def cross_entropy_stats(logits: Tensor, targets: Tensor, valid: int, stats: Tensor) -> None:
    """Fill stats [rows, 4]: largest logit, sum of exp(logit - largest), the target's logit, sum of logits."""
    z = logits[:, :valid].to(stats.dtype)
    if not valid:
        stats.copy_(z.new_tensor([float("-inf"), 0.0, 0.0, 0.0]))
        return
    top = z.amax(dim=1)
    target = z.gather(1, targets.clamp(min=0)[:, None])[:, 0].masked_fill(targets < 0, 0.0)
    stats.copy_(torch.stack([top, (z - top[:, None]).exp().sum(dim=1), target, z.sum(dim=1)], dim=1))


def cross_entropy_grad_(
    logits: Tensor, targets: Tensor, lse: Tensor, valid: int, target_weight: float, other_weight: float
) -> None:
    """Replace the logits by softmax - other_weight, less target_weight at the target; 0 in the padding columns."""
    grad = (logits[:, :valid].to(lse.dtype) - lse[:, None]).exp_().sub_(other_weight)
    if valid:
        grad.scatter_add_(1, targets.clamp(min=0)[:, None], (targets >= 0).to(grad.dtype)[:, None] * -target_weight)
    logits[:, :valid] = grad
    logits[:, valid:] = 0
