"""Lets stock megatron-core run on a CPU.

megatron-core asks torch for CUDA devices, streams and random states by name, so inside megatron.core's own modules the
global name `torch` becomes a proxy that answers these calls for the CPU and hands everything else to torch.  Nothing outside
megatron.core sees the proxy.  tests/test_platform.py fails when an upgrade brings a CUDA call that has no answer here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import sys
import types

import torch

CPU = torch.device("cpu")


def _is_cuda_device(device) -> bool:
    if isinstance(device, bool) or device is None:
        return False
    if isinstance(device, int):
        return True
    return torch.device(device).type == "cuda"


class _Stream:
    """A stream or event on a device that works in order: waiting and recording are no-ops."""

    def __init__(self, *_, **__):
        pass

    def __getattr__(self, name):
        return lambda *_, **__: None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def _nothing(*_, **__) -> None:
    return None


class CudaOnCpu(types.ModuleType):
    """What megatron-core sees as `torch.cuda`."""

    ANSWERS = {
        "is_available": lambda: False,
        "is_initialized": lambda: False,
        "current_device": lambda: CPU,
        "device_count": lambda: 1,
        "set_device": _nothing,
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": lambda *_: _Stream(),
        "default_stream": lambda *_: _Stream(),
        "stream": lambda *_: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": _nothing,
        "nvtx": types.SimpleNamespace(
            range_push=_nothing, range_pop=_nothing, range=lambda *_, **__: contextlib.nullcontext()
        ),
    }

    def __getattr__(self, name):
        if name in self.ANSWERS:
            return self.ANSWERS[name]
        return getattr(torch.cuda, name)


class TorchOnCpu(types.ModuleType):
    """What megatron-core sees as `torch`: factories make CPU tensors, `cuda` is CudaOnCpu, the rest is torch."""

    FACTORIES = frozenset(
        "zeros ones empty full tensor as_tensor arange rand randn randint eye linspace "
        "empty_like zeros_like ones_like full_like".split()
    )

    def __init__(self):
        super().__init__("torch")
        self.cuda = CudaOnCpu("torch.cuda")

    def __getattr__(self, name):
        value = getattr(torch, name)
        if name in self.FACTORIES:
            value = _factory_on_cpu(value)
            setattr(self, name, value)
        return value


def _factory_on_cpu(factory):
    @functools.wraps(factory)
    def make(*args, **kwargs):
        if _is_cuda_device(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


_PROXY = TorchOnCpu()


def _give_proxy(module: types.ModuleType) -> None:
    if getattr(module, "torch", None) is torch:
        module.torch = _PROXY
    if module.__name__ == "megatron.core.jit":
        module.disable_jit_fuser()  # torch.compile, of no use here, would double the time that every process takes to start
    if module.__name__ == "megatron.core.tensor_parallel.random":
        # These two reach into torch's CUDA generators instead of calling torch.cuda.
        module._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
        module._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


class _ProxyGivingFinder(importlib.abc.MetaPathFinder):
    """Gives the proxy to modules of megatron.core that are imported later."""

    def find_spec(self, name, path=None, target=None):
        if not name.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _give_proxy(module)

        spec.loader.exec_module = exec_module
        return spec


def _called_from_megatron() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.core")


def answer_cuda_calls() -> None:
    """Give the proxy to all of megatron-core, loaded or yet to be loaded. Once a process."""
    sys.meta_path.insert(0, _ProxyGivingFinder())
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core"):
            _give_proxy(module)

    to_cuda, type_of = torch.Tensor.cuda, torch.Tensor.type

    # Methods of tensors cannot be reached through the proxy; other callers still meet torch's own.
    def cuda(self, *args, **kwargs):
        return self if _called_from_megatron() else to_cuda(self, *args, **kwargs)

    def type_(self, *args, **kwargs):
        found = type_of(self, *args, **kwargs)
        if args or kwargs or not _called_from_megatron():
            return found
        return found.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.cuda = cuda
    torch.Tensor.type = type_
