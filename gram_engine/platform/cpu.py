"""Makes unmodified megatron-core run on a CPU.

megatron-core calls torch.cuda for devices, streams and random states.  Therefore the global name `torch` in megatron.core's
modules is replaced by a proxy, which implements these calls for the CPU and forwards everything else to torch.  Modules
outside megatron.core do not see the proxy.  tests/test_platform.py fails if a new release of megatron-core makes a CUDA call
that the proxy does not implement.
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
    """A stream or event.  Work on a CPU is done in order, so waiting and recording do nothing."""

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
    """`torch.cuda` as megatron-core sees it."""

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
    """`torch` as megatron-core sees it: factories create CPU tensors, `cuda` is CudaOnCpu, everything else is torch's."""

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


def _install_proxy(module: types.ModuleType) -> None:
    if getattr(module, "torch", None) is torch:
        module.torch = _PROXY
    if module.__name__ == "megatron.core.jit":
        module.disable_jit_fuser()  # torch.compile is not needed here, and would double the start-up time
    if module.__name__ == "megatron.core.tensor_parallel.random":
        # These two access torch's CUDA generators without calling torch.cuda.
        module._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
        module._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


class _ProxyFinder(importlib.abc.MetaPathFinder):
    """Installs the proxy in modules of megatron.core that are imported later."""

    def find_spec(self, name, path=None, target=None):
        if not name.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _install_proxy(module)

        spec.loader.exec_module = exec_module
        return spec


def _called_from_megatron() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.core")


def answer_cuda_calls() -> None:
    """Install the proxy in all modules of megatron-core, imported already or later.  Call it once per process."""
    sys.meta_path.insert(0, _ProxyFinder())
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core"):
            _install_proxy(module)

    to_cuda, type_of = torch.Tensor.cuda, torch.Tensor.type

    # The proxy does not cover methods of tensors.  For callers outside megatron-core these methods are torch's.
    def cuda(self, *args, **kwargs):
        return self if _called_from_megatron() else to_cuda(self, *args, **kwargs)

    def type_(self, *args, **kwargs):
        found = type_of(self, *args, **kwargs)
        if args or kwargs or not _called_from_megatron():
            return found
        return found.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.cuda = cuda
    torch.Tensor.type = type_
