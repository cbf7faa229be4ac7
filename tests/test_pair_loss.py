"""The two-token loss against the paper's equations and torch's cross entropy, in float64."""

import pytest
import torch
import torch.nn.functional as F

from gram_engine.kernels import pair_loss


def rows(samples=50, hidden=16, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return scale * draw(samples, hidden), draw(hidden), draw(hidden)


@pytest.mark.parametrize("eps", [0.0, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("label", ["A", "B"])
def test_equals_equations_6_7_and_8(eps, label):
    hidden, row_a, row_b = rows()
    z_a, z_b = hidden @ row_a, hidden @ row_b
    log_p = F.log_softmax(torch.stack([z_a, z_b], dim=1), dim=1)
    right, wrong = (0, 1) if label == "A" else (1, 0)
    equation_6 = -(1 - eps) * log_p[:, right] - eps * log_p[:, wrong]
    margin = z_a - z_b if label == "A" else z_b - z_a
    equation_7_or_8 = -F.logsigmoid(margin) + eps * margin

    target_b = torch.full((len(hidden),), eps if label == "A" else 1 - eps, dtype=torch.float64)
    loss, found_margin = pair_loss(hidden, row_a, row_b, target_b)

    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, equation_6, rtol=0, atol=1e-12)
    torch.testing.assert_close(loss, equation_7_or_8, rtol=0, atol=1e-12)
    torch.testing.assert_close(found_margin, z_a - z_b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("eps", [0.0, 0.05, 0.1])
def test_equals_torch_cross_entropy_with_twice_eps(eps):
    hidden, row_a, row_b = rows()
    labels = torch.arange(len(hidden)) % 2
    logits = torch.stack([hidden @ row_a, hidden @ row_b], dim=1)
    expected = F.cross_entropy(logits, labels, label_smoothing=2 * eps, reduction="none")
    target_b = torch.tensor([eps, 1 - eps], dtype=torch.float64)[labels]
    loss, _ = pair_loss(hidden, row_a, row_b, target_b)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)


def test_tie_trains_towards_one_half():
    hidden, row_a, row_b = rows()
    half = torch.full((len(hidden),), 0.5, dtype=torch.float64)
    loss, margin = pair_loss(hidden, row_a, row_b, half)
    exchanged, _ = pair_loss(hidden, row_b, row_a, half)
    torch.testing.assert_close(loss, exchanged, rtol=0, atol=1e-12)
    assert (loss >= torch.log(torch.tensor(2.0))).all()


def test_gradients():
    hidden, row_a, row_b = (tensor.requires_grad_() for tensor in rows(samples=5, hidden=4))
    target_b = torch.tensor([0.1, 0.9, 0.5, 0.1, 0.9], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *args: pair_loss(*args, target_b)[0], (hidden, row_a, row_b))


def test_extreme_margins_stay_finite():
    hidden = torch.tensor([[1e4], [-1e4]])
    loss, _ = pair_loss(hidden, torch.ones(1), torch.zeros(1), torch.tensor([0.05, 0.05]))
    torch.testing.assert_close(loss, torch.tensor([500.0, 9500.0]))
