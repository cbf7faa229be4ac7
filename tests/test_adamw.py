"""Our AdamW against torch's, and the layout of its state."""

import torch

from gram_engine.platform.adamw import AdamW


def test_equals_torch_adamw():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(5, 3, generator=generator, dtype=torch.float64), torch.randn(7, generator=generator).double()]
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in start] for _ in range(2))
    options = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-8, weight_decay=0.1)
    optimizers = AdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    for _ in range(20):
        for parameters, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            sum((parameter**4).sum() for parameter in parameters).backward()
            optimizer.step()
    for found, expected in zip(ours, theirs):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_step_is_in_the_group_and_only_moments_in_the_state():
    parameter = torch.ones(2, requires_grad=True)
    optimizer = AdamW([parameter])
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1
    assert set(optimizer.state[parameter]) == {"exp_avg", "exp_avg_sq"}


def test_parameters_without_gradient_do_not_change():
    parameter = torch.ones(2, requires_grad=True)
    AdamW([parameter], weight_decay=0.5).step()
    assert torch.equal(parameter, torch.ones(2))
