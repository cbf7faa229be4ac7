"""Stock megatron-core on CPU: every CUDA call of the modules the engine uses has an answer; an upgrade must keep it so."""

import ast
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import pytest

from gram_engine.platform import CudaOnCpu, TorchOnCpu

# Calls that never run on CPU, each with the reason; a call that is neither answered nor listed here fails the test.
NOT_REACHED = {
    **dict.fromkeys(("CUDAGraph", "graph", "graph_pool_handle", "set_stream"), "CUDA graphs are off"),
    **dict.fromkeys(("_lazy_call", "_lazy_init", "default_generators", "device"), "tensor_parallel.random: replaced"),
    **dict.fromkeys(("memory", "MemPool", "use_mem_pool", "memory_stats", "mem_get_info"), "memory pools of GPUs"),
    **dict.fromkeys(("memory_reserved", "max_memory_reserved"), "memory reports of GPUs"),
    **dict.fromkeys(("get_device_properties", "get_device_capability", "get_device_name"), "asked only of GPUs"),
    **dict.fromkeys(("temperature", "power_draw", "utilization", "clock_rate"), "straggler detection is off"),
    **dict.fromkeys(("FloatTensor", "HalfTensor", "BFloat16Tensor", "BoolTensor"), "names of types, no device needed"),
    "OutOfMemoryError": "a class to catch, the same everywhere",
    "amp": "decorators that do nothing without autocast",
    "random": "Megatron-FSDP is off",
}


def engine_modules():
    """Names of megatron.core modules that a training run has imported."""
    return sorted(name for name in sys.modules if name.startswith("megatron.core"))


def literal_cuda_devices(source: str):
    """Calls other than torch's factories that are given device="cuda" in so many letters."""
    for node in ast.walk(ast.parse(source)):
        for keyword in node.keywords if isinstance(node, ast.Call) else []:
            literal = keyword.arg == "device" and isinstance(keyword.value, ast.Constant) and keyword.value.value == "cuda"
            name = getattr(node.func, "attr", getattr(node.func, "id", "?"))
            if literal and name not in TorchOnCpu.FACTORIES and name not in CudaOnCpu.ANSWERS:
                yield name, node.lineno


def cuda_calls(source: str):
    """Attributes that a module takes from torch.cuda."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
            inner = node.value
            if inner.attr == "cuda" and isinstance(inner.value, ast.Name) and inner.value.id == "torch":
                yield node.attr, node.lineno


def modules_and_files(pool_modules):
    for name in pool_modules:
        spec = importlib.util.find_spec(name)
        if spec and spec.origin and spec.origin.endswith(".py"):
            yield name, Path(spec.origin)


def used_modules(prefix, tokenizer):
    """Run a training step, then list megatron.core's modules in this worker."""
    from tests.tiny import tiny_config, tiny_trainer, train_steps

    train_steps(tiny_trainer(tiny_config(prefix, tokenizer)), 1)
    return engine_modules()


def test_every_cuda_call_of_the_modules_we_use_is_answered(pool, tiny_data):
    used = pool.run(used_modules, 1, tiny_data["stage2"], tiny_data["tokenizer"])[0]
    assert len(used) > 80
    unanswered = {}
    for name, path in modules_and_files(used):
        for attribute, line in cuda_calls(path.read_text(encoding="utf-8")):
            if attribute not in CudaOnCpu.ANSWERS and attribute not in NOT_REACHED:
                unanswered.setdefault(attribute, f"{name}:{line}")
        for call, line in literal_cuda_devices(path.read_text(encoding="utf-8")):
            unanswered.setdefault(f"{call}(device='cuda')", f"{name}:{line}")
    version = importlib.metadata.version("megatron-core")
    assert not unanswered, f"megatron-core {version} calls torch.cuda functions without an answer: {unanswered}"


def proxy_holders():
    import torch

    from gram_engine import platform

    holders = [name for name in engine_modules() if getattr(sys.modules[name], "torch", None) is platform._PROXY]
    real = [name for name in engine_modules() if getattr(sys.modules[name], "torch", None) is torch]
    return holders, real, torch.cuda.is_available()


def test_all_megatron_modules_and_nothing_else_see_the_proxy(pool):
    holders, real, cuda = pool.run(proxy_holders, 1)[0]
    assert len(holders) > 80 and not real and not cuda


def outside_calls():
    import torch

    tensor = torch.zeros(2)
    try:
        tensor.cuda()
        refused = False
    except (RuntimeError, AssertionError):
        refused = True
    return tensor.type(), refused


def test_tensor_methods_are_untouched_outside_megatron(pool):
    assert pool.run(outside_calls, 1)[0] == ("torch.FloatTensor", True)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", 0])
def test_factories_make_cpu_tensors(device):
    proxy = TorchOnCpu()
    assert proxy.zeros(3, device=device, pin_memory=True).device.type == "cpu"
    assert proxy.cuda.current_device().type == "cpu"
    with proxy.cuda.stream(proxy.cuda.Stream()), proxy.cuda.nvtx.range("x"):
        proxy.cuda.current_stream().wait_stream(proxy.cuda.default_stream())
