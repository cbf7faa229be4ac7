"""Two-token pair loss (paper, Eq. 6-8) in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pair_loss(hidden: Tensor, row_a: Tensor, row_b: Tensor, target_b: Tensor) -> tuple[Tensor, Tensor]:
    """Label-smoothed loss over the two label tokens, at the label row of each sample.

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
