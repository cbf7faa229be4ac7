"""The two passes of the vocabulary-parallel cross entropy, for every implementation that has them."""

import pytest
import torch
import torch.nn.functional as F

from gram_engine.kernels.cross_entropy import cross_entropy_grad_, cross_entropy_stats
from tests.support.kernels import CUDA, DEVICE, draw, use

ROWS, VOCABULARY = 6, 9001  # odd, and more than one block of the Triton kernels


@pytest.fixture(params=["reference", "triton"] if CUDA else ["reference", "cpu", "triton"])
def implementation(request, monkeypatch):
    use(request.param, monkeypatch)
    return request.param


def problem(dtype=torch.float64, padding=0, scale=3.0):
    logits = draw(ROWS, VOCABULARY + padding, scale=scale).to(dtype)
    generator = torch.Generator().manual_seed(5)
    return logits, torch.randint(0, VOCABULARY, (ROWS,), generator=generator).to(DEVICE)


def loss_and_gradient(logits, targets, valid, smoothing=0.0, shards=1):
    """(loss, gradient) by the kernels, with the vocabulary split into `shards` as over tensor-parallel processes."""
    pieces = [piece.clone() for piece in logits.chunk(shards, dim=1)]
    stats, locals_ = [], []
    first = 0
    for piece in pieces:
        local = targets - first
        local = torch.where((local >= 0) & (local < piece.shape[1]), local, -1)
        locals_.append((local, min(valid - first, piece.shape[1])))
        stats.append(cross_entropy_stats(piece, *locals_[-1]))
        first += piece.shape[1]
    top, exponentials, target, total = torch.stack(stats).unbind(-1)
    largest = top.amax(dim=0)
    lse = largest + (exponentials * (top - largest).exp()).sum(dim=0).log()
    loss = lse - (1 - smoothing) * target.sum(dim=0) - smoothing / valid * total.sum(dim=0)
    for piece, (local, here) in zip(pieces, locals_):
        cross_entropy_grad_(piece, local, lse, here, 1 - smoothing, smoothing / valid)
    return loss, torch.cat(pieces, dim=1)


def by_torch(logits, targets, valid, smoothing=0.0):
    leaf = logits.double().requires_grad_()
    losses = F.cross_entropy(leaf[:, :valid], targets, reduction="none", label_smoothing=smoothing)
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("padding", [0, 23])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("shards", [1, 3])
def test_equals_torch_in_float64(implementation, dtype, padding, smoothing, shards):
    logits, targets = problem(dtype, padding)
    wanted_loss, wanted_grad = by_torch(logits, targets, VOCABULARY, smoothing)
    loss, grad = loss_and_gradient(logits, targets, VOCABULARY, smoothing, shards)
    exact = dtype == torch.float64
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=1e-12 if exact else 2e-6, atol=0)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=0, atol=1e-12 if exact else 2e-7)
    assert (grad[:, VOCABULARY:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(implementation, dtype):
    logits, targets = problem(dtype)
    wanted_loss, wanted_grad = by_torch(logits, targets, VOCABULARY)
    loss, grad = loss_and_gradient(logits, targets, VOCABULARY)
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=2e-6, atol=0)
    # One rounding: half a unit in the last place; Triton's interpreter truncates, a whole one. fp16 has a smallest number.
    unit = torch.finfo(dtype).eps * (1.01 if implementation == "triton" else 0.51)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=unit, atol=6e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradient_at_a_confident_target_keeps_its_digits(implementation, dtype):
    logits = torch.zeros(1, 64, dtype=dtype, device=DEVICE)
    logits[0, 7] = 12.0
    targets = torch.tensor([7], device=DEVICE)
    _, wanted = by_torch(logits, targets, 64)
    _, grad = loss_and_gradient(logits, targets, 64)
    assert grad[0, 7].item() == pytest.approx(wanted[0, 7].item(), rel=1e-2 if dtype == torch.bfloat16 else 1e-2)
    assert -1e-3 < grad[0, 7].item() < 0


def test_common_offset_cancels(implementation):
    logits, targets = problem(torch.float32)
    logits = (logits * 8).round() / 8  # so that the offset is exact
    loss, grad = loss_and_gradient(logits, targets, VOCABULARY)
    shifted_loss, shifted_grad = loss_and_gradient(logits + 4096, targets, VOCABULARY)
    torch.testing.assert_close(shifted_loss, loss, rtol=0, atol=2e-3)  # the loss itself is rounded at 4096 here
    torch.testing.assert_close(shifted_grad, grad, rtol=2e-3, atol=1e-7)


def test_shard_of_padding_alone(implementation):
    logits, targets = problem(torch.float32)
    nowhere = torch.full_like(targets, -1)
    for valid in (0, -5):
        stats = cross_entropy_stats(logits, nowhere, valid)
        assert (stats[:, 0] == float("-inf")).all() and (stats[:, 1:] == 0).all()
        grad = logits.clone()
        cross_entropy_grad_(grad, nowhere, torch.zeros(ROWS, device=DEVICE), valid, 1.0, 0.0)
        assert (grad == 0).all()


def test_rows_that_lie_apart(implementation):
    logits, targets = problem(torch.float32)
    wide = torch.empty(ROWS, VOCABULARY + 7, device=DEVICE)
    view = wide[:, :VOCABULARY].copy_(logits)
    wide[:, VOCABULARY:] = 5.0
    assert torch.equal(cross_entropy_stats(view, targets, VOCABULARY), cross_entropy_stats(logits, targets, VOCABULARY))
    zeros = torch.zeros(ROWS, device=DEVICE)
    cross_entropy_grad_(view, targets, zeros, VOCABULARY, 1.0, 0.0)
    cross_entropy_grad_(logits, targets, zeros, VOCABULARY, 1.0, 0.0)
    assert torch.equal(view, logits) and (wide[:, VOCABULARY:] == 5.0).all()


def test_nan_propagates(implementation):
    logits, targets = problem(torch.float32)
    logits[2, 4444] = float("nan")
    stats = cross_entropy_stats(logits, targets, VOCABULARY)
    lse = stats[:, 0] + stats[:, 1].log()
    assert lse.isnan().tolist() == [row == 2 for row in range(ROWS)]


def test_no_rows(implementation):
    logits, targets = problem(torch.float32)
    assert cross_entropy_stats(logits[:0], targets[:0], VOCABULARY).shape == (0, 4)
    cross_entropy_grad_(logits[:0], targets[:0], torch.empty(0, device=DEVICE), VOCABULARY, 1.0, 0.0)


@pytest.mark.skipif(CUDA, reason="threads of the CPU kernels")
def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    use("cpu", monkeypatch)
    logits, targets = problem(torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(loss_and_gradient(logits, targets, VOCABULARY, 0.1))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in found[1:]:
        assert torch.equal(loss, found[0][0]) and torch.equal(grad, found[0][1])


@pytest.mark.skipif(CUDA, reason="the CPU kernels")
def test_exponential_of_the_cpu_kernel_is_accurate(monkeypatch):
    use("cpu", monkeypatch)
    values = torch.cat([torch.linspace(-110, 0, 200_001), torch.tensor([-87.3, -87.4, -0.0])])
    logits = values[None].clone()
    cross_entropy_grad_(logits, torch.tensor([-1]), torch.zeros(1), len(values), 1.0, 0.0)
    wanted = values.double().exp()
    error = (logits[0].double() - wanted).abs() / wanted
    assert error[values > -87.3].max() < 2e-7
    assert (logits[0][values < -87.3] <= 1.3e-38).all()
