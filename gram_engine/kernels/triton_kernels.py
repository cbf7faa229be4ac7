"""The kernels in Triton, for GPUs without a built CUDA library; arguments as in reference.py.

Loaded values are converted to the compute dtype immediately, because Triton's interpreter gets bf16 arithmetic wrong.  Sums
run in a fixed order and block sizes are fixed, so that the result is the same in every run.  Real numbers are constexpr,
because as parameters they would be fp32 in float64 kernels as well; they are settings of the run, so only a few kernels are
compiled.  With TRITON_INTERPRET=1 the kernels run on CPU tensors.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    raise ImportError("Triton needs a GPU (or TRITON_INTERPRET=1)")

COLUMNS = 1024
VOCABULARY = 4096
OPTIONS = {} if os.environ.get("TRITON_INTERPRET") == "1" else {"enable_fp_fusion": True}


@triton.jit
def _log1p(e):
    """log(1 + e) for e in [0, 1], accurate for tiny e (Kahan); libdevice's log1p is missing in the interpreter."""
    w = 1.0 + e
    correction = tl.where(w == 1.0, 1.0, w - 1.0)
    return tl.where(w == 1.0, e, tl.log(w) * (e / correction))


@triton.jit
def forward_kernel(
    hidden, stride, rows, direction, preference, losses, margins, rstds, dloss_dmargins, size,
    label_smoothing: tl.constexpr, norm_eps: tl.constexpr,
    has_rows: tl.constexpr, has_norm: tl.constexpr, dtype: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program per label."""
    label = tl.program_id(0).to(tl.int64)
    row = label
    if has_rows:
        row = tl.load(rows + label)
    here = row >= 0
    present = tl.where(here, size, 0)  # columns to read
    squares = tl.zeros((block,), dtype)
    products = tl.zeros((block,), dtype)
    for start in range(0, size, block):
        column = start + tl.arange(0, block)
        mask = column < present
        x = tl.load(hidden + row * stride + column, mask=mask, other=0.0).to(dtype)
        u = tl.load(direction + column, mask=mask, other=0.0)
        squares += x * x
        products += x * u
    rstd = tl.where(here, 1.0, 0.0).to(dtype)
    if has_norm:
        rstd = rstd / tl.sqrt(tl.sum(squares, 0) / size + norm_eps)
    margin = rstd * tl.sum(products, 0)
    wanted = tl.load(preference + label).to(dtype)
    sign = tl.where(wanted >= 0.5, 1.0, -1.0).to(dtype)
    certainty = tl.where(wanted >= 0.5, wanted, 1.0 - wanted)
    eps = label_smoothing + (1.0 - 2.0 * label_smoothing) * (1.0 - certainty)
    towards = sign * margin
    e = tl.exp(-tl.abs(towards))
    other = tl.where(towards >= 0.0, e, 1.0) / (1.0 + e)
    loss = _log1p(e) + tl.where(towards < 0.0, -towards, 0.0) + eps * towards
    tl.store(losses + label, tl.where(here, loss, 0.0))
    tl.store(margins + label, margin)
    tl.store(rstds + label, rstd)
    tl.store(dloss_dmargins + label, tl.where(here, sign * (eps - other), 0.0))


@triton.jit
def backward_rows_kernel(
    hidden, stride, rows, direction, margin, rstd, grad_margin, grad_rows, size,
    has_rows: tl.constexpr, has_norm: tl.constexpr, dtype: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program per label: the gradient of its row."""
    label = tl.program_id(0).to(tl.int64)
    row = label
    if has_rows:
        row = tl.load(rows + label)
    here = row >= 0
    present = tl.where(here, size, 0)
    r = tl.load(rstd + label)
    along = tl.where(here, tl.load(grad_margin + label) * r, 0.0)
    back = along * r * tl.load(margin + label) / size
    for start in range(0, size, block):
        column = start + tl.arange(0, block)
        mask = column < size
        grad = along * tl.load(direction + column, mask=mask, other=0.0)
        if has_norm:
            grad -= back * tl.load(hidden + row * stride + column, mask=column < present, other=0.0).to(dtype)
        tl.store(grad_rows + label * size + column, grad, mask=mask)


@triton.jit
def backward_direction_kernel(
    hidden, stride, rows, rstd, grad_margin, grad_direction, labels, size,
    has_rows: tl.constexpr, dtype: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program per block of columns: the gradient of direction, summed label by label."""
    column = tl.program_id(0) * block + tl.arange(0, block)
    mask = column < size
    total = tl.zeros((block,), dtype)
    for number in range(0, labels):
        label = tl.cast(number, tl.int64)
        row = label
        if has_rows:
            row = tl.load(rows + label)
        present = tl.where(row >= 0, size, 0)
        along = tl.where(row >= 0, tl.load(grad_margin + label) * tl.load(rstd + label), 0.0)
        total += along * tl.load(hidden + row * stride + column, mask=column < present, other=0.0).to(dtype)
    tl.store(grad_direction + column, total, mask=mask)


@triton.jit
def stats_kernel(logits, stride, targets, results, valid, dtype: tl.constexpr, block: tl.constexpr):
    """One program per row: largest logit, sum of exponentials (online, per lane), the target's logit, sum."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((block,), float("-inf"), dtype)
    exponentials = tl.zeros((block,), dtype)
    total = tl.zeros((block,), dtype)
    for start in range(0, valid, block):
        column = start + tl.arange(0, block)
        mask = column < valid
        z = tl.load(logits + row * stride + column, mask=mask, other=float("-inf")).to(dtype)
        # Not tl.maximum, which drops NaN.
        grown = tl.where((z > largest) | (z != z), z, largest)
        # A lane that has seen nothing yet holds -inf: exp(-inf - -inf) would be NaN.
        old = tl.where(largest == float("-inf"), 0.0, tl.exp(largest - grown))
        new = tl.where(z == float("-inf"), 0.0, tl.exp(z - grown))
        exponentials = exponentials * old + new
        largest = grown
        total += tl.where(mask, z, 0.0)
    top = tl.max(largest, 0)
    spread = tl.where(largest == float("-inf"), 0.0, tl.exp(largest - top))
    target = tl.load(targets + row)
    here = (target >= 0) & (target < valid)
    tl.store(results + 4 * row, top)
    tl.store(results + 4 * row + 1, tl.sum(exponentials * spread, 0))
    tl.store(results + 4 * row + 2, tl.load(logits + row * stride + target, mask=here, other=0.0).to(dtype))
    tl.store(results + 4 * row + 3, tl.sum(total, 0))


@triton.jit
def gradient_kernel(
    logits, stride, targets, lse, columns, valid,
    target_weight: tl.constexpr, other_weight: tl.constexpr, dtype: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program per block of a row: replaces the logits by their gradient."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    at = logits + row * stride + column
    z = tl.load(at, mask=column < valid, other=0.0).to(dtype)
    grad = tl.exp(z - tl.load(lse + row)) - other_weight
    grad = tl.where(column == tl.load(targets + row), grad - target_weight, grad)
    tl.store(at, tl.where(column < valid, grad, 0.0), mask=column < columns)


def pair_loss_forward(hidden, rows, direction, preference, label_smoothing, norm_eps, *outputs) -> None:
    size = hidden.shape[1]
    with _on_device(hidden):
        forward_kernel[(len(preference),)](
            hidden, hidden.stride(0), rows, direction, preference, *outputs, size, label_smoothing, norm_eps,
            has_rows=rows is not None, has_norm=norm_eps >= 0, dtype=_dtype(direction), block=_block(size), **OPTIONS,
        )  # fmt: skip


def pair_loss_backward(hidden, rows, direction, margin, rstd, grad_margin, has_norm, grad_rows, grad_direction) -> None:
    labels, size = grad_rows.shape
    fixed = dict(has_rows=rows is not None, dtype=_dtype(direction), block=_block(size), **OPTIONS)
    with _on_device(hidden):
        backward_rows_kernel[(labels,)](
            hidden, hidden.stride(0), rows, direction, margin, rstd, grad_margin, grad_rows, size, has_norm=has_norm, **fixed
        )
        backward_direction_kernel[(triton.cdiv(size, _block(size)),)](
            hidden, hidden.stride(0), rows, rstd, grad_margin, grad_direction, labels, size, **fixed
        )


def cross_entropy_stats(logits, targets, valid, stats) -> None:
    with _on_device(logits):
        stats_kernel[(len(logits),)](
            logits, logits.stride(0), targets, stats, valid, dtype=_dtype(stats), block=VOCABULARY, **OPTIONS
        )


def cross_entropy_grad_(logits, targets, lse, valid, target_weight, other_weight) -> None:
    rows, columns = logits.shape
    with _on_device(logits):
        gradient_kernel[(rows, triton.cdiv(columns, VOCABULARY))](
            logits, logits.stride(0), targets, lse, columns, valid, target_weight, other_weight,
            dtype=_dtype(lse), block=VOCABULARY, **OPTIONS,
        )  # fmt: skip


def _on_device(tensor: Tensor) -> torch.cuda.device:
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


def _dtype(tensor: Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def _block(size: int) -> int:
    return min(COLUMNS, triton.next_power_of_2(size))
