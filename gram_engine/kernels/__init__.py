"""The losses as differentiable functions of hidden rows and output weight; dispatch.py chooses the implementation."""

from gram_engine.kernels.linear_cross_entropy import linear_cross_entropy
from gram_engine.kernels.pair_loss import pair_loss

__all__ = ["linear_cross_entropy", "pair_loss"]
