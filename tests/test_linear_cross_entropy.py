"""Chunked linear + cross entropy against torch on whole logits."""

import pytest
import torch
import torch.nn.functional as F

from gram_engine.kernels import linear_cross_entropy


def problem(rows=23, hidden=8, vocabulary=37, padding=0):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, hidden, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocabulary + padding, hidden, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    return x, weight, targets


@pytest.mark.parametrize("chunk", [1, 5, 23, 1000])
@pytest.mark.parametrize("padding", [0, 11])
def test_equals_torch_with_gradients(chunk, padding):
    x, weight, targets = problem(padding=padding)
    upstream = torch.linspace(-1, 2, len(x), dtype=torch.float64)
    expected = F.cross_entropy(x @ weight[:37].t(), targets, reduction="none")
    expected_grads = torch.autograd.grad((expected * upstream).sum(), (x, weight))

    loss = linear_cross_entropy(x, weight, targets, 37, chunk)
    grads = torch.autograd.grad((loss * upstream).sum(), (x, weight))

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(grads, expected_grads):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_no_rows_gives_a_zero_that_is_part_of_the_graph():
    x, weight, _ = problem()
    loss = linear_cross_entropy(x[:0], weight, torch.empty(0, dtype=torch.long), 37, 4).sum()
    grads = torch.autograd.grad(loss, (x, weight))
    assert loss == 0 and all((grad == 0).all() for grad in grads)


def test_large_common_offset_cancels():
    x, weight, targets = problem()
    with torch.no_grad():
        x[:, 0], weight[:, 0] = 1e3, 1e3
    expected = F.cross_entropy(x @ weight.t(), targets, reduction="none")
    torch.testing.assert_close(linear_cross_entropy(x, weight, targets, 37, 7), expected, rtol=1e-9, atol=1e-9)
