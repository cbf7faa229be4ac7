"""The scalar head of a discriminative reward model (paper, section 2.1), applied to the last hidden state of a text."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SCALAR_HEAD = "score.weight"
"""Name of its weight in checkpoints and in Hugging Face's ...ForSequenceClassification."""


class ScalarHead(torch.nn.Module):
    """Linear layer without bias from hidden rows to one number; replicated on every tensor-parallel process.

    Args:
        dtype: of the weight [1, hidden]; the product is computed in float32 (float64 for a float64 model).
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(1, hidden_size, dtype=dtype))

    def forward(self, rows: Tensor) -> Tensor:
        """[rows, hidden] -> rewards [rows], float32 (float64 for a float64 model)."""
        dtype = torch.promote_types(rows.dtype, torch.float32)
        return F.linear(rows.to(dtype), self.weight.to(dtype)).squeeze(-1)
