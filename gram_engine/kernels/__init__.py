"""The losses' arithmetic: one function per loss, whatever implements it (dispatch.py)."""

from gram_engine.kernels.linear_cross_entropy import linear_cross_entropy
from gram_engine.kernels.pair_loss import pair_loss

__all__ = ["linear_cross_entropy", "pair_loss"]
