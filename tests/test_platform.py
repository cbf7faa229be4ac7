"""The device, the two releases of megatron-core, and the proxy that implements megatron-core's CUDA calls on a CPU."""

import ast
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from gram_engine.errors import ConfigError
from gram_engine.platform import device as platform
from gram_engine.platform import stack
from gram_engine.platform.cpu import CudaOnCpu, TorchOnCpu
from gram_engine.platform.device import Platform

# Calls that a CPU never reaches, with the reason; a call that is neither implemented nor listed here fails the test.
NOT_REACHED = {
    **dict.fromkeys(("CUDAGraph", "graph", "graph_pool_handle", "set_stream", "_sleep"), "CUDA graphs are off"),
    **dict.fromkeys(("_lazy_call", "_lazy_init", "default_generators", "device"), "tensor_parallel.random: replaced"),
    **dict.fromkeys(("memory", "MemPool", "use_mem_pool", "memory_stats", "mem_get_info"), "memory pools of GPUs"),
    **dict.fromkeys(("memory_reserved", "max_memory_reserved"), "memory reports of GPUs"),
    **dict.fromkeys(("device_memory_used", "memory_snapshot"), "memory reports of inference, which is not used"),
    **dict.fromkeys(("get_device_properties", "get_device_capability", "get_device_name"), "called for GPUs only"),
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
    """Calls other than torch's factories that are given the literal device="cuda"."""
    for node in ast.walk(ast.parse(source)):
        for keyword in node.keywords if isinstance(node, ast.Call) else []:
            literal = keyword.arg == "device" and isinstance(keyword.value, ast.Constant) and keyword.value.value == "cuda"
            name = getattr(node.func, "attr", getattr(node.func, "id", "?"))
            if literal and name not in TorchOnCpu.FACTORIES and name not in CudaOnCpu.ANSWERS:
                yield name, node.lineno


def cuda_calls(source: str):
    """Attributes of torch.cuda that a module uses."""
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
    from tests.support.tiny import tiny_config, tiny_trainer, train_steps

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
    from gram_engine.platform import cpu

    holders = [name for name in engine_modules() if getattr(sys.modules[name], "torch", None) is cpu._PROXY]
    real = [name for name in engine_modules() if getattr(sys.modules[name], "torch", None) is torch]
    return holders, real, torch.cuda.is_available()


def test_all_megatron_modules_and_nothing_else_see_the_proxy(pool):
    holders, real, cuda = pool.run(proxy_holders, 1)[0]
    assert len(holders) > 80 and not real and not cuda


def outside_calls():
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


def install(package: str, version: str, folder: Path) -> None:
    """Create an empty package with metadata, as importlib sees an installed one."""
    module, metadata = folder / package.replace("-", "_"), folder / f"{package.replace('-', '_')}-{version}.dist-info"
    module.mkdir()
    metadata.mkdir()
    (module / "__init__.py").touch()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


@pytest.mark.parametrize("version, line", [("0.16.1", "0.16.1"), ("0.16.4", "0.16.1"), ("0.19.2", "0.19.2")])
def test_the_line_of_megatron_core_is_known(version, line, tmp_path, monkeypatch):
    install("megatron-core", version, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert stack.installed_stack().megatron_core == line


@pytest.mark.parametrize("version", ["0.15.3", "0.17.0", "0.20.0", "1.16.1"])
def test_another_line_of_megatron_core_is_refused(version, tmp_path, monkeypatch):
    install("megatron-core", version, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=rf"core {version} .* torch .* 0\.16\.1 or 0\.19\.2.*pip install megatron-core==0.1"):
        platform.initialise.__wrapped__("cpu")


@pytest.mark.parametrize(
    "core, engine, fits",
    [
        ("0.16.1", "2.8.0", False),
        ("0.16.1", "2.9.0", True),
        ("0.16.1", "2.11.0+c188b533", True),
        ("0.16.1", "2.12.0", False),
        ("0.19.2", "2.11.0", False),
        ("0.19.2", "2.17.1", True),
        ("0.19.2", "2.20.2", True),
    ],
)
def test_transformer_engine_must_belong_to_megatron_core(core, engine, fits, tmp_path, monkeypatch):
    from gram_engine.config.parse import parse
    from gram_engine.model.te_layers import uses_transformer_engine

    install("megatron-core", core, tmp_path)
    install("transformer-engine", engine, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    gpu = Platform(torch.device("cuda", 0), "nccl")
    local = parse(["--model", "tiny", "--transformer-impl", "local"])
    assert not uses_transformer_engine(local, gpu)
    if fits:
        assert uses_transformer_engine(parse(["--model", "tiny"]), gpu)
        return
    with pytest.raises(ConfigError) as refused:
        uses_transformer_engine(parse(["--model", "tiny"]), gpu)
    for part in (f"transformer-engine {engine}", f"megatron-core {core}", "pip install", "--transformer-impl local"):
        assert part in str(refused.value)


@pytest.mark.parametrize("chosen", [{}, {"PYTORCH_ALLOC_CONF": "pinned"}, {"PYTORCH_CUDA_ALLOC_CONF": "pinned"}])
def test_the_environment_is_set_before_the_driver_is_asked(chosen, monkeypatch):
    seen = {}
    monkeypatch.setattr(os, "environ", {"CUDA_VISIBLE_DEVICES": "", **chosen})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(seen.update(os.environ)))
    with pytest.raises(ConfigError, match="torch finds no GPU"):
        platform.initialise.__wrapped__("cuda")
    wanted = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} if not chosen else chosen
    assert seen == {"CUDA_VISIBLE_DEVICES": "", "CUDA_DEVICE_MAX_CONNECTIONS": "1", **wanted}


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_torch_without_cuda_beside_a_gpu_is_refused(device, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError) as refused:
        platform.initialise.__wrapped__(device)
    version = torch.__version__.partition("+")[0]
    for part in (f"--device {device}", f"torch {torch.__version__}", "pip install", f"torch=={version}", "--device cpu"):
        assert part in str(refused.value)


def names_with_strides():
    from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata

    properties = TensorProperties(dtype=torch.float32)
    properties.strides = (3, 1)  # as torch 2.15 stores it
    entry = TensorStorageMetadata(properties, torch.Size([2, 3]), chunks=[])
    metadata = Metadata(state_dict_metadata={"weight": entry})
    metadata.mcore_data = {"weight": {}}
    found = stack.load_strategy().load_tensors_metadata(Path("."), metadata)
    return {name: (tuple(tensor.global_shape), tensor.dtype) for name, tensor in found.items()}


def test_properties_that_torch_2_15_stores_are_ignored(pool):
    assert pool.run(names_with_strides, 1)[0] == {"weight": ((2, 3), torch.float32)}
