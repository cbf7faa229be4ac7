"""Two-token pair loss (paper, Eq. 6-8) with the final norm, as one differentiable operator.

The loss depends on one number per sample, the margin D = Z_A - Z_B = norm(x) . (w_A - w_B).  It is one dot product with
`direction` = norm weight * (w_A - w_B), and the gradient of this vector determines the gradients of both rows of the output
weight and of the norm weight.

An implementation (dispatch.py) fills the outputs behind the semicolon:

    pair_loss_forward(hidden, rows, direction, preference, label_smoothing, norm_eps; loss, margin, rstd, dloss_dmargin)
    pair_loss_backward(hidden, rows, direction, margin, rstd, grad_margin, has_norm; grad_rows, grad_direction)

hidden is [tokens, hidden] with column stride 1; everything else is contiguous: direction and grad_direction [hidden], rows
int64 [labels] or None, grad_rows [labels, hidden] in hidden's dtype, all others [labels] in direction's dtype.  There is at
least one label.  norm_eps < 0 stands for no norm.  rstd is 1 / sqrt(mean of x^2 + norm_eps), 1 without a norm, and 0 where
rows is -1; dloss_dmargin is d loss / d margin.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from gram_engine.kernels.dispatch import contiguous_rows, implementation


def pair_loss(
    hidden: Tensor,
    direction: Tensor,
    preference: Tensor,
    label_smoothing: float,
    norm_eps: float | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softplus(-v) + eps v, where v is D if A is preferred and -D if B is; differentiable in hidden and direction.

    Args:
        hidden: [tokens, hidden] fp32, bf16, fp16 or float64; the input of the final RMSNorm if norm_eps is given, its output
            otherwise.
        direction: [hidden] fp32 (float64 for float64 hidden).
        preference: [labels], probability that A is the better response: 1, 0, or between (1/2: a tie); eps moves with it.
        label_smoothing: eps of the paper, weight of the wrong label, in [0, 1/2).
        norm_eps: epsilon of the RMSNorm to apply to the rows; None: no norm.
        rows: [labels] int64, each label's row of `hidden`, or -1 for padding (its loss and margin are 0); None: all rows.

    Returns:
        (loss, margin), each [labels] in direction's dtype.

    Raises:
        ValueError: the shapes or dtypes do not fit.
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
    outputs = _empty_outputs(direction, preference)
    if len(preference):
        rows, direction, preference = _contiguous(rows, direction, preference.to(direction.dtype))
        eps = -1.0 if norm_eps is None else norm_eps
        run = implementation("pair_loss_forward", hidden.device)
        run(contiguous_rows(hidden), rows, direction, preference, label_smoothing, eps, *outputs)
    return outputs


@_forward.register_fake
def _(hidden, rows, direction, preference, label_smoothing, norm_eps):
    return _empty_outputs(direction, preference)


def _empty_outputs(direction: Tensor, preference: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(direction.new_empty(len(preference)) for _ in range(4))


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
    gradients = _empty_gradients(hidden, direction, margin)
    if len(margin):
        inputs = _contiguous(rows, direction, margin, rstd, grad_margin)
        run = implementation("pair_loss_backward", hidden.device)
        run(contiguous_rows(hidden), *inputs, norm_eps is not None, *gradients)
    else:
        gradients[1].zero_()
    return gradients


@_backward.register_fake
def _(hidden, rows, direction, margin, rstd, grad_margin, norm_eps):
    return _empty_gradients(hidden, direction, margin)


def _empty_gradients(hidden: Tensor, direction: Tensor, margin: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(len(margin), hidden.shape[1]), direction.new_empty(direction.shape)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _save(ctx, inputs, output) -> None:
    hidden, rows, direction, _, _, norm_eps = inputs
    _, margin, rstd, dloss_dmargin = output
    ctx.save_for_backward(hidden, rows, direction, margin, rstd, dloss_dmargin)
    ctx.mark_non_differentiable(rstd, dloss_dmargin)
    ctx.norm_eps = norm_eps


def _gradients(ctx, grad_loss, grad_margin, _grad_rstd, _grad_dloss_dmargin):
    hidden, rows, direction, margin, rstd, dloss_dmargin = ctx.saved_tensors
    total = grad_loss * dloss_dmargin + grad_margin
    grad_rows, grad_direction = torch.ops.gram_engine.pair_loss_backward(
        hidden, rows, direction, margin, rstd, total, ctx.norm_eps
    )
    if rows is None:
        return grad_rows, None, grad_direction, None, None, None
    grad_hidden = torch.zeros_like(hidden).index_add_(0, rows.clamp(min=0), grad_rows)
    return grad_hidden, None, grad_direction, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
