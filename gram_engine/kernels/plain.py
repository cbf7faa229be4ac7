"""The losses in plain PyTorch and autograd (--no-fused-losses).  Nothing is shared with the kernels, which are tested against
them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def two_token_loss(hidden: Tensor, row_a: Tensor, row_b: Tensor, target_b: Tensor) -> tuple[Tensor, Tensor]:
    """Label-smoothed loss over the two label tokens (paper, Eq. 6-8), at the label row of each sample.

    With the margin D = Z_A - Z_B = hidden . (row_a - row_b) the loss is softplus(-D) + target_b * D: the cross entropy of the
    two-token softmax with probability 1 - target_b on A.  target_b = eps gives Eq. 7 (A preferred), 1 - eps gives Eq. 8
    (B preferred), 1/2 is a tie.

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

    Only `chunk_size` rows of logits exist at a time; the backward pass recomputes the logits of each chunk.

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
    first = 0 if group is None else dist.get_rank(group) * len(weight)
    # The gradients that the chunks give to the weight are added in fp32, and rounded to the weight's dtype once.
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    chunks = (part.split(chunk_size or 1024) for part in (hidden, targets - first))
    losses = [
        checkpoint(_losses, *chunk, weight, vocab_size - first, group, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(*chunks)
    ]
    return torch.cat(losses)


def _losses(hidden: Tensor, targets: Tensor, weight: Tensor, valid: int, group: dist.ProcessGroup | None) -> Tensor:
    """Losses [rows]; `targets` and `valid` are relative to this process's first row of the weight."""
    logits = (hidden @ weight.to(hidden.dtype).t()).to(weight.dtype)
    if valid < len(weight):
        logits[:, max(valid, 0) :] = float("-inf")
    top = logits.detach().amax(dim=1)
    if group is not None:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    exponentials = (logits - top[:, None]).exp_().sum(dim=1)
    owned = (targets >= 0) & (targets < len(weight))
    target_logits = logits.gather(1, targets.clamp(0, len(weight) - 1)[:, None])[:, 0].masked_fill(~owned, 0.0)
    sums = torch.stack([exponentials, target_logits])
    if group is not None:
        sums = reduce_from_tensor_model_parallel_region(sums, group=group)
    return sums[0].log() + top - sums[1]
