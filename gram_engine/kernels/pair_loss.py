"""Two-token pair loss (paper, Eq. 6-8) with the final norm, as one differentiable operator.

The loss depends on one number a sample, the margin D = Z_A - Z_B = norm(x) . (w_A - w_B), so one dot product with
`direction` = norm weight * (w_A - w_B) makes it, and the gradient of `direction` (one vector) holds those of both rows of
the output weight and of the norm weight.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from gram_engine.kernels.dispatch import implementation


def pair_loss(
    hidden: Tensor,
    direction: Tensor,
    preference: Tensor,
    label_smoothing: float,
    norm_eps: float | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softplus(-v) + eps v with v = +-D, the sign that of the preferred label; differentiable in hidden and direction.

    Args:
        hidden: [tokens, hidden] fp32, bf16, fp16 or float64; before the final RMSNorm where norm_eps is given.
        direction: [hidden] fp32 (float64 for float64 hidden).
        preference: [labels], probability that A is the better response: 1, 0, or between (1/2: a tie); eps moves with it.
        label_smoothing: eps of the paper, weight of the wrong label, in [0, 1/2).
        norm_eps: epsilon of the RMSNorm to apply to the rows; None: none.
        rows: [labels] int64, each label's row of `hidden`, -1 for none (its loss and margin are 0); None: all rows.

    Returns:
        (loss, margin), each [labels] in direction's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(hidden, direction, preference, label_smoothing, rows)
    return torch.ops.gram_engine.pair_loss(hidden, rows, direction, preference, label_smoothing, norm_eps)[:2]


def _check(hidden: Tensor, direction: Tensor, preference: Tensor, label_smoothing: float, rows: Tensor | None) -> None:
    labels = len(hidden) if rows is None else len(rows)
    wanted = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.ndim != 2 or direction.shape != hidden.shape[1:] or preference.shape != (labels,):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, direction {tuple(direction.shape)} and preference {tuple(preference.shape)} "
            f"do not fit: [tokens, hidden], [hidden] and [{labels}] are needed."
        )
    if direction.dtype != wanted:
        raise ValueError(f"direction is {direction.dtype}; for {hidden.dtype} rows it must be {wanted}.")
    if rows is not None and rows.dtype != torch.int64:
        raise ValueError(f"rows is {rows.dtype}; it must be int64.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing {label_smoothing} is the weight of the wrong label: it must be in [0, 0.5).")


@torch.library.custom_op("gram_engine::pair_loss", mutates_args=())
def _forward(
    hidden: Tensor,
    rows: Optional[Tensor],
    direction: Tensor,
    preference: Tensor,
    label_smoothing: float,
    norm_eps: Optional[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = implementation("pair_loss_forward", hidden.device)
    preference = preference.to(direction.dtype)
    return run(hidden, rows, direction, preference, label_smoothing, norm_eps)


@_forward.register_fake
def _(hidden, rows, direction, preference, label_smoothing, norm_eps):
    return tuple(direction.new_empty(preference.shape) for _ in range(4))


@torch.library.custom_op("gram_engine::pair_loss_backward", mutates_args=())
def _backward(
    hidden: Tensor,
    rows: Optional[Tensor],
    direction: Tensor,
    margin: Tensor,
    rstd: Tensor,
    grad_margin: Tensor,
    norm_eps: Optional[float],
) -> tuple[Tensor, Tensor]:
    run = implementation("pair_loss_backward", hidden.device)
    return run(hidden, rows, direction, margin, rstd, grad_margin, norm_eps)


@_backward.register_fake
def _(hidden, rows, direction, margin, rstd, grad_margin, norm_eps):
    return hidden.new_empty((len(margin), hidden.shape[1])), torch.empty_like(direction)


def _save(ctx, inputs, output) -> None:
    hidden, rows, direction, _, _, norm_eps = inputs
    _, margin, rstd, slope = output
    ctx.save_for_backward(hidden, rows, direction, margin, rstd, slope)
    ctx.mark_non_differentiable(rstd, slope)
    ctx.norm_eps = norm_eps


def _gradients(ctx, grad_loss, grad_margin, _grad_rstd, _grad_slope):
    hidden, rows, direction, margin, rstd, slope = ctx.saved_tensors
    total = grad_loss * slope + grad_margin
    grad_rows, grad_direction = torch.ops.gram_engine.pair_loss_backward(
        hidden, rows, direction, margin, rstd, total, ctx.norm_eps
    )
    if rows is None:
        return grad_rows, None, grad_direction, None, None, None
    grad_hidden = torch.zeros_like(hidden).index_add_(0, rows.clamp(min=0), grad_rows)
    return grad_hidden, None, grad_direction, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
