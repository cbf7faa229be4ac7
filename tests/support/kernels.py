"""Shared by the tests of the kernels: the implementations, random problems, and the definition of the loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gram_engine.kernels import dispatch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# Triton compiles on a machine with a GPU; elsewhere tests/conftest.py selects its interpreter.
IMPLEMENTATIONS = ["reference", "cuda", "triton"] if CUDA else ["reference", "cpu", "triton"]
NORM_EPS = 1e-5


def use(implementation: str, monkeypatch) -> None:
    """Force an implementation for this test, or skip the test if it cannot run here."""
    module, reason = dispatch._load(implementation)
    if module is None:
        pytest.skip(reason)
    monkeypatch.setenv("GRAM_KERNELS", implementation)


def draw(*shape, seed=0, scale=1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(DEVICE)


def head_by_definition(hidden, norm_weight, row_a, row_b, preference, eps, norm_eps):
    """(losses, margins): final norm, both logits, cross entropy with soft targets, as the paper and torch define them."""
    if norm_eps is not None:
        hidden = F.rms_norm(hidden, hidden.shape[-1:], norm_weight, norm_eps)
    logits = torch.stack([hidden @ row_a, hidden @ row_b], dim=1)
    on_a = (1 - eps) * preference + eps * (1 - preference)
    losses = -(on_a * F.log_softmax(logits, dim=1)[:, 0] + (1 - on_a) * F.log_softmax(logits, dim=1)[:, 1])
    return losses, logits[:, 0] - logits[:, 1]
