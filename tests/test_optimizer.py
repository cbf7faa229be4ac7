"""The gradient norm and clipping without Transformer Engine or apex; parameter groups of a resumed run."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gram_engine.platform.stack import l2_norm, scale_in_place
from tests.support.resume import resumed, uninterrupted
from tests.support.tiny import tiny_config, tiny_trainer, train_steps

SHAPES = ((64, 32), (7,), (), (0,), (3, 5, 2), (1,))


def tensors(dtype: torch.dtype, shapes=SHAPES) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]


class HostReads(TorchDispatchMode):
    """Counts reads of tensor values on the host, each of which would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def both_norms(lists: list):
    """The norm as the engine has megatron-core compute it, and by megatron-core's fallback."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    implementations = clip_grads.l2_norm_impl, utils.local_multi_tensor_l2_norm
    assert implementations[0] is l2_norm
    flag = torch.zeros(1, dtype=torch.int)
    return [clip_grads.multi_tensor_applier(implementation, flag, lists, False) for implementation in implementations]


@pytest.mark.parametrize(
    "dtype, rounding", [(torch.float32, 3e-7), (torch.float64, 3e-7), (torch.bfloat16, 2**-7)], ids=["fp32", "fp64", "bf16"]
)
def test_norm_equals_the_fallback(dtype, rounding, pool):
    for lists in ([tensors(dtype)], [tensors(dtype), tensors(dtype)[::-1]]):
        found, expected = pool.run(both_norms, 1, lists)[0]
        assert found[1] is expected[1] is None and found[0].dtype == expected[0].dtype == torch.float32
        torch.testing.assert_close(found[0], expected[0], rtol=rounding, atol=0)


def test_norm_of_a_large_tensor_is_exact():
    """As large as a vocabulary's gradient, with few large values: torch's own norm on a CPU is off by 1e-4 here."""
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(1 << 22, generator=draw) * torch.rand(1 << 22, generator=draw) ** 8
    found, _ = l2_norm(2048, torch.zeros(1, dtype=torch.int), [[values.view(1 << 11, -1)]])
    assert found.item() == pytest.approx(values.double().norm().item(), rel=1e-5)


def test_norm_of_nothing_is_zero(pool):
    found, expected = pool.run(both_norms, 1, [[]])[0]
    assert found[0].tolist() == expected[0].tolist() == [0.0]


def test_norm_and_scale_read_no_value():
    """Tensors without values are enough for them; megatron-core's norm needs each one's value on the host."""
    from megatron.core import utils

    values = [torch.empty(shape, device="meta") for shape in SHAPES]
    arguments = 2048, torch.zeros(1, dtype=torch.int, device="meta"), [values, values]
    assert l2_norm(*arguments, False)[0].is_meta
    scale_in_place(*arguments, 0.5)
    with pytest.raises(RuntimeError, match="item"):
        utils.local_multi_tensor_l2_norm(*arguments, False)


def clipped(gradients: list):
    """([gradients clipped with our functions, with megatron-core's fallback], whether in place)"""
    from unittest import mock

    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    results, same_memory = [], True
    assert clip_grads.multi_tensor_scale_impl is scale_in_place
    for scale in (scale_in_place, utils.local_multi_tensor_scale):
        parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient.clone()
        places = [parameter.grad.data_ptr() for parameter in parameters]
        with mock.patch.object(clip_grads, "multi_tensor_scale_impl", scale):
            clip_grads.clip_grad_by_total_norm_fp32(parameters, max_norm=0.25, total_norm=1.75)
        same_memory = same_memory and places == [parameter.grad.data_ptr() for parameter in parameters]
        results.append([parameter.grad for parameter in parameters])
    return results, same_memory


@pytest.mark.parametrize("shapes", [SHAPES, ()], ids=["tensors", "none"])
def test_clipping_scales_in_place_as_the_fallback(shapes, pool):
    gradients = tensors(torch.float32, shapes)
    (found, expected), same_memory = pool.run(clipped, 1, gradients)[0]
    assert same_memory
    for ours, theirs, before in zip(found, expected, gradients, strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, before * (0.25 / 1.750001))


def both_scaled(values: list):
    from megatron.core import utils

    results = [[value.clone() for value in values] for _ in range(2)]
    for scale, result in zip((scale_in_place, utils.local_multi_tensor_scale), results):
        scale(2048, torch.zeros(1, dtype=torch.int), [result, result], 0.3)
    return results


@pytest.mark.parametrize("dtype, rounding", [(torch.float64, 0), (torch.bfloat16, 2**-7)], ids=["fp64", "bf16"])
def test_scaling_of_other_dtypes_equals_the_fallback(dtype, rounding, pool):
    found, expected = pool.run(both_scaled, 1, tensors(dtype))[0]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=0)


def reads_of_a_step(prefix, tokenizer, flags):
    """(number of host reads between gradients and new weights, number of parameters)"""
    from gram_engine.training.optimizer import step_unless_nonfinite
    from gram_engine.training.step import run_schedule

    trainer = tiny_trainer(tiny_config(prefix, tokenizer, flags))
    train_steps(trainer, 1)
    for chunk in trainer.model:
        chunk.zero_grad_buffer()
    run_schedule(trainer.model, trainer.loader.batch(8), trainer.objective, trainer.platform.device)
    with HostReads() as reads:
        norm = step_unless_nonfinite(trainer.optimizer, lambda norm: norm > 0)
    assert norm > trainer.config.training.clip_grad
    return reads.count, len(list(trainer.model[0].parameters()))


@pytest.mark.parametrize("flags", ["--clip-grad 1e-3", "--clip-grad 1e-3 --bf16 --use-distributed-optimizer"])
def test_a_step_of_the_optimizer_reads_the_norm_alone(flags, pool, tiny_data):
    reads, parameters = pool.run(reads_of_a_step, 1, tiny_data["stage2"], tiny_data["tokenizer"], flags)[0]
    assert reads == 1 and parameters > 10


@pytest.mark.parametrize("distributed", ["", "--use-distributed-optimizer"], ids=["plain", "distributed-optimizer"])
def test_a_run_may_resume_with_another_learning_rate(distributed, pool, tiny_data, tmp_path):
    """The schedule of the checkpoint is used, as in Megatron-LM."""
    data = (tiny_data["stage2"], tiny_data["tokenizer"])
    expected = pool.run(uninterrupted, 1, *data, f"{distributed} --lr 3e-3", str(tmp_path))[0]
    assert pool.run(resumed, 1, *data, f"{distributed} --lr 1e-3", str(tmp_path))[0] == expected
