"""The kernels in plain PyTorch: what the others are tested against, and the fallback where none was built.

All arithmetic is fp32, or float64 for float64 input.
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
    norm_eps: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, margin, rstd, slope), each [labels]; see kernels/pair_loss.py. slope is d loss / d margin."""
    x, present = _label_rows(hidden, rows, direction.dtype)
    rstd = present if norm_eps is None else torch.rsqrt(x.square().mean(dim=1) + norm_eps) * present
    margin = rstd * (x @ direction)
    sign = torch.where(preference >= 0.5, 1.0, -1.0).to(margin.dtype)
    certainty = torch.maximum(preference, 1 - preference).to(margin.dtype)
    eps = label_smoothing + (1 - 2 * label_smoothing) * (1 - certainty)
    towards = sign * margin  # Z of the preferred label minus Z of the other
    loss = (-F.logsigmoid(towards) + eps * towards) * present
    slope = sign * (eps - torch.sigmoid(-towards)) * present
    return loss, margin, rstd, slope


def pair_loss_backward(
    hidden: Tensor,
    rows: Tensor | None,
    direction: Tensor,
    margin: Tensor,
    rstd: Tensor,
    grad_margin: Tensor,
    norm_eps: float | None,
) -> tuple[Tensor, Tensor]:
    """(gradient of the label rows [labels, hidden] in hidden's dtype, gradient of `direction` [hidden])."""
    x, present = _label_rows(hidden, rows, direction.dtype)
    scale = grad_margin * rstd * present
    grad = scale[:, None] * direction
    if norm_eps is not None:
        grad = grad - (scale * rstd * margin / x.shape[1])[:, None] * x
    return grad.to(hidden.dtype), scale @ x


def _label_rows(hidden: Tensor, rows: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(label rows, 1 where there is a label and 0 where rows is -1)."""
    if rows is None:
        return hidden.to(dtype), torch.ones(len(hidden), dtype=dtype, device=hidden.device)
    present = (rows >= 0).to(dtype)
    return hidden[rows.clamp(min=0)].to(dtype) * present[:, None], present


def cross_entropy_stats(logits: Tensor, targets: Tensor, valid: int) -> Tensor:
    """[rows, 4]: largest logit, sum of exp(logit - largest), the target's logit, sum of logits; see cross_entropy.py."""
    z = logits[:, :valid].to(torch.promote_types(logits.dtype, torch.float32))
    if valid <= 0:
        return z.new_tensor([float("-inf"), 0.0, 0.0, 0.0]).repeat(len(z), 1)
    top = z.amax(dim=1)
    target = z.gather(1, targets.clamp(min=0)[:, None])[:, 0].masked_fill(targets < 0, 0.0)
    return torch.stack([top, (z - top[:, None]).exp().sum(dim=1), target, z.sum(dim=1)], dim=1)


def cross_entropy_grad_(
    logits: Tensor, targets: Tensor, log_normaliser: Tensor, valid: int, target_weight: float, other_weight: float
) -> None:
    """logits <- softmax - other_weight - target_weight at the target; 0 at padding columns. In place."""
    valid = max(valid, 0)
    grad = (logits[:, :valid].to(log_normaliser.dtype) - log_normaliser[:, None]).exp_().sub_(other_weight)
    if valid > 0:
        grad.scatter_add_(1, targets.clamp(min=0)[:, None], (targets >= 0).to(grad.dtype)[:, None] * -target_weight)
    logits[:, :valid] = grad
    logits[:, valid:] = 0
