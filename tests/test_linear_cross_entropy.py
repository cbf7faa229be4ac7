"""Chunked linear layer + cross entropy, against torch on all logits at once."""

import pytest
import torch
import torch.nn.functional as F

from gram_engine.kernels import linear_cross_entropy, plain

VOCABULARY = 37


def problem(rows=23, hidden=8, padding=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, hidden, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY + padding, hidden, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def by_torch(x, weight, targets, row_weight=None, label_smoothing=0.0):
    losses = F.cross_entropy(x @ weight[:VOCABULARY].t(), targets, reduction="none", label_smoothing=label_smoothing)
    return (losses if row_weight is None else losses * row_weight).sum()


@pytest.mark.parametrize("chunk", [1, 5, 23, 1000])
@pytest.mark.parametrize("padding", [0, 11])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_equals_torch_with_gradients(chunk, padding, label_smoothing):
    x, weight, targets = problem(padding=padding)
    row_weight = torch.linspace(0, 2, len(x), dtype=torch.float64)
    options = dict(row_weight=row_weight, label_smoothing=label_smoothing)
    expected = by_torch(x, weight, targets, **options)
    expected_grads = torch.autograd.grad(3 * expected, (x, weight))

    loss = linear_cross_entropy(x, weight, targets, VOCABULARY, chunk_size=chunk, **options)
    grads = torch.autograd.grad(3 * loss, (x, weight))

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(grads, expected_grads):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [5, None])
@pytest.mark.parametrize("padding", [0, 11])
def test_plain_losses_equal_torch(chunk, padding):
    x, weight, targets = problem(padding=padding)
    upstream = torch.linspace(0, 2, len(x), dtype=torch.float64)
    losses = plain.linear_cross_entropy(x, weight, targets, VOCABULARY, chunk)
    expected = F.cross_entropy(x @ weight[:VOCABULARY].t(), targets, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(*(torch.autograd.grad(part, (x, weight), upstream) for part in (losses, expected))):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_main_grad_receives_the_weights_gradient():
    x, weight, targets = problem()
    expected_grads = torch.autograd.grad(by_torch(x, weight, targets), (x, weight))
    main_grad = torch.ones_like(weight)
    loss = linear_cross_entropy(x, weight, targets, VOCABULARY, chunk_size=7, main_grad=main_grad)
    loss.backward()
    assert weight.grad is None
    torch.testing.assert_close(x.grad, expected_grads[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(main_grad - 1, expected_grads[1], rtol=1e-12, atol=1e-12)


def test_main_grad_refuses_a_scaled_loss():
    x, weight, targets = problem()
    loss = linear_cross_entropy(x, weight, targets, VOCABULARY, main_grad=torch.zeros_like(weight))
    with pytest.raises(RuntimeError, match="plain sum"):
        (2 * loss).backward()


def test_evaluation_leaves_main_grad_alone():
    x, weight, targets = problem()
    main_grad = torch.zeros_like(weight)
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, targets, VOCABULARY, chunk_size=7, main_grad=main_grad)
    torch.testing.assert_close(loss, by_torch(x, weight, targets).detach(), rtol=1e-12, atol=1e-12)
    assert (main_grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_errs_no_more_than_torch_does(dtype):
    x, weight, targets = problem(rows=300, hidden=64, dtype=dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    truth = torch.autograd.grad(by_torch(*exact, targets), exact)
    plain = torch.autograd.grad(by_torch(x, weight, targets), (x, weight))
    main_grad = torch.zeros_like(weight, dtype=torch.float32)
    linear_cross_entropy(x, weight, targets, VOCABULARY, chunk_size=64, main_grad=main_grad).backward()
    for found, wanted, torchs in zip((x.grad, main_grad), truth, plain):
        error, torch_error = ((value.double() - wanted).norm() for value in (found, torchs))
        assert error <= 2 * torch_error + 1e-6 * wanted.norm()


def test_no_rows_gives_a_zero_that_is_part_of_the_graph():
    x, weight, _ = problem()
    loss = linear_cross_entropy(x[:0], weight, torch.empty(0, dtype=torch.long), VOCABULARY)
    grads = torch.autograd.grad(loss, (x, weight))
    assert loss == 0 and all((grad == 0).all() for grad in grads)


def test_large_common_offset_cancels():
    x, weight, targets = problem()
    with torch.no_grad():
        x[:, 0], weight[:, 0] = 1e3, 1e3
    found = linear_cross_entropy(x, weight, targets, VOCABULARY, chunk_size=7)
    torch.testing.assert_close(found, by_torch(x, weight, targets), rtol=1e-9, atol=1e-9)


def test_memory_does_not_grow_with_rows_times_vocabulary():
    """No tensor of the graph or of a call is larger than weight, rows, or one chunk of logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(tensor.numel() for tensor in torch.utils._pytree.tree_leaves(out) if isinstance(tensor, torch.Tensor))
            return out

    x, weight, targets = problem(rows=2000)
    main_grad = torch.zeros_like(weight)
    with Sizes():
        linear_cross_entropy(x, weight, targets, VOCABULARY, chunk_size=16, main_grad=main_grad).backward()
    assert max(sizes) == x.numel() < 2000 * VOCABULARY
