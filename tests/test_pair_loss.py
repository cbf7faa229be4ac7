"""The two-token loss: against the paper's equations in float64, for every implementation that runs here."""

import math

import pytest
import torch
import torch.nn.functional as F

from gram_engine.kernels import pair_loss
from gram_engine.kernels.plain import two_token_loss
from tests.support.cases import short_first
from tests.support.kernels import DEVICE, IMPLEMENTATIONS, NORM_EPS, draw, head_by_definition, use


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    use(request.param, monkeypatch)
    return request.param


def problem(labels=7, hidden=64, tokens=None, dtype=torch.float64, scale=1.0):
    """(hidden rows, row of each label or None for all, norm weight, rows of A and B, preferences (1, 0, 1, 0, 1/2 ...))."""
    x = draw(tokens or labels, hidden, scale=scale).to(dtype)
    rows = None if tokens is None else torch.randperm(tokens, generator=torch.Generator().manual_seed(3))[:labels].to(DEVICE)
    norm_weight = (1 + draw(hidden, seed=1, scale=0.1)).to(dtype)
    row_a, row_b = draw(2, hidden, seed=2, scale=hidden**-0.5).to(dtype)
    preference = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.5, 0.8, 1.0], device=DEVICE).repeat(labels // 7 + 1)[:labels]
    return x, rows, norm_weight, row_a, row_b, preference


def direction_of(norm_weight, row_a, row_b):
    dtype = torch.promote_types(row_a.dtype, torch.float32)
    return norm_weight.to(dtype) * (row_a.to(dtype) - row_b.to(dtype))


def relative_error(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("norm_eps", [None, NORM_EPS])
@pytest.mark.parametrize("eps", [0.0, 0.05, 0.49])
@pytest.mark.parametrize("hidden", short_first([100], [64, 100, 3072]))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_all_gradients_equal_the_definition(implementation, dtype, hidden, eps, norm_eps):
    x, rows, norm_weight, row_a, row_b, preference = problem(7, hidden, tokens=20, dtype=dtype)
    exact = [tensor.double().requires_grad_() for tensor in (x, norm_weight, row_a, row_b)]
    losses, margins = head_by_definition(exact[0][rows], *exact[1:], preference.double(), eps, norm_eps)
    upstream = torch.linspace(0.5, 2, len(losses), dtype=torch.float64, device=DEVICE)
    dx, d_norm, d_a, d_b = torch.autograd.grad((losses * upstream).sum(), exact, materialize_grads=True)

    x.requires_grad_()
    weight = norm_weight if norm_eps is not None else torch.ones_like(norm_weight)
    direction = direction_of(weight, row_a, row_b).requires_grad_()
    loss, margin = pair_loss(x, direction, preference, eps, norm_eps, rows)
    grad_x, s = torch.autograd.grad((loss * upstream.to(loss.dtype)).sum(), (x, direction))

    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert relative_error(loss, losses) < tolerance
    assert relative_error(margin, margins) < tolerance
    assert relative_error(grad_x, dx) < tolerance
    assert relative_error(weight * s, d_a) < tolerance and relative_error(-weight * s, d_b) < tolerance
    if norm_eps is not None:
        assert relative_error((row_a - row_b) * s, d_norm) < tolerance


@pytest.mark.parametrize("labels", [1, 2, 7, 32])
@pytest.mark.parametrize("hidden", short_first([100], [100, 4096, 5120]))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_torch_does(implementation, dtype, hidden, labels):
    x, _, norm_weight, row_a, row_b, preference = problem(labels, hidden, dtype=dtype)
    exact = [tensor.double().requires_grad_() for tensor in (x, norm_weight, row_a, row_b)]
    losses, _ = head_by_definition(*exact, preference.double(), 0.05, NORM_EPS)
    truth = [losses, *torch.autograd.grad(losses.sum(), exact[:1])]

    low = [tensor.clone().requires_grad_() for tensor in (x, norm_weight, row_a, row_b)]
    theirs, _ = head_by_definition(*low, preference.to(dtype), 0.05, NORM_EPS)
    torchs = [theirs, *torch.autograd.grad(theirs.sum(), low[:1])]

    x.requires_grad_()
    loss, _ = pair_loss(x, direction_of(norm_weight, row_a, row_b), preference, 0.05, NORM_EPS)
    ours = [loss, *torch.autograd.grad(loss.sum(), x)]
    for found, torch_found, wanted in zip(ours, torchs, truth):
        error, torch_error = ((value.double() - wanted).abs().max() for value in (found, torch_found))
        assert error <= 2 * torch_error + 1e-6


def test_gradcheck_in_float64(implementation):
    x, rows, norm_weight, row_a, row_b, preference = problem(3, 3, tokens=4)
    rows[1] = -1
    direction = direction_of(norm_weight, row_a, row_b).requires_grad_()
    x.requires_grad_()
    for norm_eps in (None, NORM_EPS):
        assert torch.autograd.gradcheck(lambda *args, e=norm_eps: pair_loss(*args, preference, 0.1, e, rows), (x, direction))


@pytest.mark.parametrize("margin", [0.0, 1e-8, 3.0, 80.0, 1e4])
@pytest.mark.parametrize("eps", [0.0, 0.05, 0.49])
def test_extreme_margins(implementation, eps, margin):
    values = torch.tensor([margin, -margin], dtype=torch.float64, device=DEVICE)
    x = values.float()[:, None].requires_grad_()
    loss, found = pair_loss(x, torch.ones(1, device=DEVICE), torch.ones(2, device=DEVICE), eps)
    expected = -F.logsigmoid(x.detach().double()[:, 0]) + eps * x.detach().double()[:, 0]
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-12)
    assert (found == x[:, 0]).all()
    (grad,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(grad[:, 0].double(), eps - torch.sigmoid(-x.detach().double()[:, 0]), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinity_and_nan_propagate(implementation, value):
    x = torch.tensor([[value, 1.0], [1.0, 1.0]], device=DEVICE)
    loss, margin = pair_loss(x, torch.ones(2, device=DEVICE), torch.ones(2, device=DEVICE), 0.1)
    assert not torch.isfinite(margin[0]) and not torch.isfinite(loss[0])
    assert torch.isfinite(loss[1])


def test_without_the_norm_the_margins_gradient_does_not_depend_on_the_row(implementation):
    x = torch.tensor([[math.inf, 1.0], [1.0, 1.0]], device=DEVICE, requires_grad=True)
    direction = torch.tensor([1.0, -2.0], device=DEVICE)
    _, margin = pair_loss(x, direction, torch.ones(2, device=DEVICE), 0.1)
    (grad,) = torch.autograd.grad(margin.sum(), x)
    assert torch.equal(grad, direction.expand(2, 2))


def test_swapping_a_and_b_mirrors_everything_bit_for_bit(implementation):
    x, _, norm_weight, row_a, row_b, preference = problem(7, 100, dtype=torch.float32)
    preference[5] = 0.75  # 1 - 0.75 is exact
    results = []
    for first, second, wanted in ((row_a, row_b, preference), (row_b, row_a, 1 - preference)):
        leaf = x.clone().requires_grad_()
        direction = direction_of(norm_weight, first, second).requires_grad_()
        loss, margin = pair_loss(leaf, direction, wanted, 0.07, NORM_EPS)
        results.append([loss, margin, *torch.autograd.grad(loss.sum(), (leaf, direction))])
    (loss, margin, grad_x, s), (other_loss, other_margin, other_grad_x, other_s) = results
    halves = preference == 0.5  # a tie has no side of its own: its derivative is the same up to rounding
    assert (loss == other_loss)[~halves].all() and (margin == -other_margin).all()
    assert (grad_x == other_grad_x)[~halves].all()
    torch.testing.assert_close(grad_x, other_grad_x)
    torch.testing.assert_close(s, -other_s)


@pytest.mark.parametrize("eps", [0.05, 0.1])
def test_minimum_is_the_entropy_of_eps_at_log_odds(implementation, eps):
    best = math.log((1 - eps) / eps)
    x = torch.linspace(-10, 10, 101, dtype=torch.float64, device=DEVICE)[:, None]
    one = torch.ones(1, dtype=torch.float64, device=DEVICE)
    entropy = -eps * math.log(eps) - (1 - eps) * math.log(1 - eps)
    loss, _ = pair_loss(x, one, torch.ones(101, device=DEVICE), eps)
    assert (loss >= entropy - 1e-6).all()
    at_best = torch.full((1, 1), best, dtype=torch.float64, device=DEVICE, requires_grad=True)
    loss, _ = pair_loss(at_best, one, torch.ones(1, device=DEVICE), eps)
    assert loss.item() == pytest.approx(entropy, abs=1e-6)
    assert torch.autograd.grad(loss.sum(), at_best)[0].abs().item() < 1e-7


def test_torch_label_smoothing_of_two_eps_is_the_same_loss(implementation):
    x, _, _, row_a, row_b, _ = problem(6, 16, dtype=torch.float32)
    labels = torch.arange(6, device=DEVICE) % 2
    expected = F.cross_entropy(torch.stack([x @ row_a, x @ row_b], 1), labels, label_smoothing=0.1, reduction="none")
    loss, _ = pair_loss(x, row_a - row_b, (labels == 0).float(), 0.05)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_rows_of_minus_one_are_padding(implementation):
    x, _, norm_weight, row_a, row_b, preference = problem(4, 100, dtype=torch.float32)
    direction = direction_of(norm_weight, row_a, row_b)
    results = []
    for rows, wanted in (([0, -1, 3, -1, 1], [1.0, 0.0, 0.0, 1.0, 0.5]), ([0, 3, 1], [1.0, 0.0, 0.5])):
        leaf, u = x.clone().requires_grad_(), direction.clone().requires_grad_()
        arguments = (torch.tensor(wanted, device=DEVICE), 0.1, NORM_EPS, torch.tensor(rows, device=DEVICE))
        loss, margin = pair_loss(leaf, u, *arguments)
        results.append((loss, margin, *torch.autograd.grad(loss.sum(), (leaf, u))))
    (loss, margin, grad, s), (plain_loss, plain_margin, plain_grad, plain_s) = results
    assert (loss[[1, 3]] == 0).all() and (margin[[1, 3]] == 0).all()
    assert (loss[[0, 2, 4]] == plain_loss).all() and (margin[[0, 2, 4]] == plain_margin).all()
    assert (grad == plain_grad).all() and (grad[2] == 0).all()
    torch.testing.assert_close(s, plain_s)


def test_no_labels(implementation):
    x = draw(5, 64).float().requires_grad_()
    direction = draw(64, seed=1).float().requires_grad_()
    empty = torch.empty(0, device=DEVICE)
    loss, margin = pair_loss(x, direction, empty, 0.1, NORM_EPS, torch.empty(0, dtype=torch.int64, device=DEVICE))
    assert loss.shape == margin.shape == (0,)
    grads = torch.autograd.grad(loss.sum(), (x, direction))
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("columns", [slice(100, 200), slice(0, 200, 2)], ids=["rows apart", "columns apart"])
def test_tensors_that_are_not_contiguous(implementation, columns):
    x, rows = draw(9, 200).float()[:, columns], torch.tensor([0, 5, 8, 5], device=DEVICE)[::2]
    direction, wanted = draw(200, seed=1).float()[columns], torch.tensor([1.0, 0.5, 0.0], device=DEVICE)[::2]
    assert not x.is_contiguous()
    results = []
    for leaf, u in ((x, direction), (x[rows].contiguous(), direction.contiguous())):
        leaf, u = leaf.detach().requires_grad_(), u.detach().requires_grad_()
        loss, margin = pair_loss(leaf, u, wanted, 0.1, NORM_EPS, rows if len(leaf) == 9 else None)
        grad, s = torch.autograd.grad(loss.sum(), (leaf, u))
        results.append((loss, margin, grad[rows] if len(leaf) == 9 else grad, s))
    assert all(torch.equal(*pair) for pair in zip(*results))


def test_a_row_given_twice_counts_twice(implementation):
    x, _, norm_weight, row_a, row_b, _ = problem(3, 100)
    leaf, wanted = x.requires_grad_(), torch.tensor([1.0, 0.0, 1.0], device=DEVICE)
    arguments = (direction_of(norm_weight, row_a, row_b), wanted, 0.1, NORM_EPS)
    twice = torch.tensor([2, 1, 2], device=DEVICE)
    found, expected = (torch.autograd.grad(loss.sum(), leaf)[0] for loss in (
        pair_loss(leaf, *arguments, twice)[0], pair_loss(leaf[twice], *arguments)[0]
    ))  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


def test_positions_beyond_two_to_the_31_elements(implementation):
    """Only the last row is accessed; memory that is never accessed is not allocated."""
    hidden = torch.empty(2**31 // 4096 + 2, 4096, dtype=torch.bfloat16, device=DEVICE)
    hidden[-1] = draw(4096).bfloat16()
    direction, wanted = draw(4096, seed=1).float(), torch.ones(1, device=DEVICE)
    found, _ = pair_loss(hidden, direction, wanted, 0.1, NORM_EPS, torch.tensor([len(hidden) - 1], device=DEVICE))
    expected, _ = pair_loss(hidden[-1:].clone(), direction, wanted, 0.1, NORM_EPS)
    assert (found == expected).all()


def test_gradients_add_up_over_any_split_into_micro_batches(implementation):
    x, _, norm_weight, row_a, row_b, preference = problem(32, 100)
    sums = []
    for pieces in (1, 4, 32):
        direction = direction_of(norm_weight, row_a, row_b).requires_grad_()
        for part, wanted in zip(x.chunk(pieces), preference.chunk(pieces)):
            pair_loss(part, direction, wanted, 0.05, NORM_EPS)[0].sum().backward()
        sums.append(direction.grad)
    torch.testing.assert_close(sums[1], sums[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums[2], sums[0], rtol=1e-12, atol=1e-12)


def test_two_runs_are_bitwise_equal(implementation):
    x, rows, norm_weight, row_a, row_b, preference = problem(7, 3072, tokens=20, dtype=torch.float32)
    runs = []
    for _ in range(2):
        leaf, direction = x.clone().requires_grad_(), direction_of(norm_weight, row_a, row_b).requires_grad_()
        loss, _ = pair_loss(leaf, direction, preference, 0.05, NORM_EPS, rows)
        runs.append([loss, *torch.autograd.grad(loss.sum(), (leaf, direction))])
    assert all(torch.equal(first, second) for first, second in zip(*runs))


def test_implementations_agree(monkeypatch):
    x, rows, norm_weight, row_a, row_b, preference = problem(7, 3072, tokens=20, dtype=torch.float32)
    found = {}
    for name in IMPLEMENTATIONS:
        use(name, monkeypatch)
        leaf, direction = x.clone().requires_grad_(), direction_of(norm_weight, row_a, row_b).requires_grad_()
        loss, _ = pair_loss(leaf, direction, preference, 0.05, NORM_EPS, rows)
        found[name] = [loss, *torch.autograd.grad(loss.sum(), (leaf, direction))]
    for name in IMPLEMENTATIONS[1:]:
        for one, other in zip(found[name], found["reference"]):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_plain_objectives_loss_is_the_same():
    x, _, _, row_a, row_b, preference = problem(7, 16)
    target_b = 0.1 + 0.8 * (1 - preference.double())
    loss, margin = two_token_loss(x, row_a, row_b, target_b)
    again, again_margin = pair_loss(x, row_a - row_b, preference.double(), 0.1)
    torch.testing.assert_close(loss, again, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(margin, again_margin, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(direction=torch.ones(3)), r"direction \(3,\)"),
        (dict(direction=torch.ones(4, dtype=torch.float64)), "direction is torch.float64; .* must be torch.float32"),
        (dict(preference=torch.ones(2)), r"preference \(2,\) do not fit"),
        (dict(label_smoothing=0.5), "label_smoothing 0.5 .* must be in"),
        (dict(rows=torch.zeros(5, dtype=torch.int32)), "rows is torch.int32; it must be int64"),
    ],
    ids=["shape", "dtype", "labels", "eps", "rows"],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = dict(hidden=torch.ones(5, 4), direction=torch.ones(4), preference=torch.ones(5), label_smoothing=0.1)
    with pytest.raises(ValueError, match=message):
        pair_loss(**{**arguments, **change})
