"""What tests of the kernels share: the implementations, and problems with an answer from the definition in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gram_engine.kernels import dispatch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# On a GPU machine Triton compiles; elsewhere tests/conftest.py has it interpret.
IMPLEMENTATIONS = ["reference", "cuda", "triton"] if CUDA else ["reference", "cpu", "triton"]
NORM_EPS = 1e-5


def use(implementation: str, monkeypatch) -> None:
    """Force an implementation for this test, or skip where it is not to be had."""
    module, reason = dispatch._load(implementation)
    if module is None:
        pytest.skip(reason)
    monkeypatch.setenv("GRAM_KERNELS", implementation)


def draw(*shape, seed=0, scale=1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(DEVICE)


def head_by_definition(hidden, norm_weight, row_a, row_b, preference, eps, norm_eps):
    """Final norm, both logits, cross entropy with soft targets; every step as the paper and torch define it."""
    if norm_eps is not None:
        hidden = F.rms_norm(hidden, hidden.shape[-1:], norm_weight, norm_eps)
    logits = torch.stack([hidden @ row_a, hidden @ row_b], dim=1)
    on_a = (1 - eps) * preference + eps * (1 - preference)
    losses = -(on_a * F.log_softmax(logits, dim=1)[:, 0] + (1 - on_a) * F.log_softmax(logits, dim=1)[:, 1])
    return losses, logits[:, 0] - logits[:, 1]
