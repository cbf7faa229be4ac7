"""The losses in plain PyTorch and autograd (--no-fused-losses): nothing shared with the kernels, to compare them with."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def two_token_loss(hidden: Tensor, row_a: Tensor, row_b: Tensor, target_b: Tensor) -> tuple[Tensor, Tensor]:
    """Label-smoothed loss over the two label tokens (paper, Eq. 6-8), at the label row of each sample.

    With margin D = Z_A - Z_B = hidden . (row_a - row_b) the loss is softplus(-D) + target_b * D: cross entropy of the
    two-token softmax with probability 1 - target_b on A.  target_b = eps gives Eq. 7 (A preferred), 1 - eps Eq. 8
    (B preferred), 1/2 a tie.

    Args:
        hidden: [samples, hidden], rows after the final norm.
        row_a, row_b: [hidden], the two label tokens' rows of the output weight.
        target_b: [samples], weight of label B.

    Returns:
        (loss, margin), each [samples], fp32 (float64 for float64 input).
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    margin = hidden.to(dtype) @ (row_a.to(dtype) - row_b.to(dtype))
    # -logsigmoid is softplus(-margin) without F.softplus's switch to a straight line at 20 (an error of 2e-9).
    return -F.logsigmoid(margin) + target_b.to(dtype) * margin, margin


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    chunk_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """-log softmax(hidden @ weight^T)[target] for each row, over the first `vocab_size` rows of the whole weight.

    Only `chunk_size` rows of logits exist at a time; the backward pass makes each chunk's logits again.

    Args:
        hidden: [rows, hidden], the same on every process of `group`.
        weight: [padded vocabulary / group size, hidden], this process's rows.
        targets: [rows] int64 token ids.
        vocab_size: rows of the whole weight that are real tokens; the rest is padding and gets no probability.
        chunk_size: rows whose logits exist at one time; None: 1,024.
        group: tensor-parallel group, or None for a whole weight.

    Returns:
        [rows] fp32 (float64 for float64 input).  The gradient of `hidden` holds this process's part only: the caller
        sums it over the group (copy_to_tensor_model_parallel_region).
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, vocab_size, chunk_size or 1024, group)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_size, chunk_size, group):
        rank = dist.get_rank(group) if group is not None else 0
        first = rank * weight.shape[0]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        log_normaliser = torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device)
        target_logit = torch.empty_like(log_normaliser)
        for rows in _chunks(hidden.shape[0], chunk_size):
            logits = _local_logits(hidden[rows], weight, vocab_size - first, dtype)
            top = logits.amax(dim=-1)
            _all_reduce(top, group, dist.ReduceOp.MAX)
            index, owned = _local_index(targets[rows], first, weight.shape[0])
            picked = logits.gather(1, index[:, None])[:, 0].masked_fill(~owned, 0.0)
            sums = torch.stack([logits.sub_(top[:, None]).exp_().sum(dim=-1), picked])
            _all_reduce(sums, group, dist.ReduceOp.SUM)
            log_normaliser[rows] = sums[0].log() + top
            target_logit[rows] = sums[1]
        ctx.save_for_backward(hidden, weight, targets, log_normaliser)
        ctx.first, ctx.valid, ctx.chunk_size = first, vocab_size - first, chunk_size
        return log_normaliser - target_logit

    @staticmethod
    def backward(ctx, grad_loss):
        hidden, weight, targets, log_normaliser = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=log_normaliser.dtype)
        for rows in _chunks(hidden.shape[0], ctx.chunk_size):
            logits = _local_logits(hidden[rows], weight, ctx.valid, log_normaliser.dtype)
            grad = logits.sub_(log_normaliser[rows, None]).exp_()
            index, owned = _local_index(targets[rows], ctx.first, weight.shape[0])
            grad.scatter_add_(1, index[:, None], -owned.to(grad.dtype)[:, None])
            grad *= grad_loss[rows, None]
            grad_hidden[rows] = grad.to(weight.dtype) @ weight
            grad_weight += (grad.to(hidden.dtype).t() @ hidden[rows]).to(grad_weight.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _chunks(rows: int, size: int):
    return (slice(start, start + size) for start in range(0, rows, size))


def _local_logits(hidden: Tensor, weight: Tensor, valid: int, dtype: torch.dtype) -> Tensor:
    logits = (hidden @ weight.t()).to(dtype)
    if valid < weight.shape[0]:
        logits[:, max(valid, 0) :] = float("-inf")
    return logits


def _local_index(targets: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    local = targets - first
    owned = (local >= 0) & (local < size)
    return local.clamp(0, size - 1), owned


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)
