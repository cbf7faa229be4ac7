"""Which implementation of a kernel runs: CUDA C++, Triton, CPU C++, or the plain PyTorch reference.

GRAM_KERNELS=cuda|triton|cpu|reference forces one; unset or `auto` takes the first that works for the tensor's device:
CUDA, then Triton, then the reference on a GPU; CPU C++, then the reference on a CPU.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Callable

import torch

from gram_engine.errors import ConfigError

MODULES = {
    "cuda": "gram_engine.kernels.cuda",
    "triton": "gram_engine.kernels.triton_kernels",
    "cpu": "gram_engine.kernels.cpu",
    "reference": "gram_engine.kernels.reference",
}
ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}


def implementation(operation: str, device: torch.device) -> Callable:
    """The function `operation` of the implementation that runs on `device`.

    Raises:
        ConfigError: GRAM_KERNELS names an unknown implementation, or one that cannot run here.
    """
    return _chosen(operation, device.type, os.environ.get("GRAM_KERNELS") or "auto")


def name_of(operation: str, device: torch.device) -> str:
    """Short name of what `implementation` gives, for logs and benchmarks."""
    module = implementation(operation, device).__module__
    return next(name for name, path in MODULES.items() if path == module)


@functools.cache
def _chosen(operation: str, device: str, wanted: str) -> Callable:
    if wanted != "auto" and wanted not in MODULES:
        raise ConfigError(f"GRAM_KERNELS={wanted}: unknown. Use auto, {', '.join(MODULES)}.")
    for name in ORDER.get(device, ("reference",)) if wanted == "auto" else (wanted,):
        module, reason = _load(name)
        if module is not None and hasattr(module, operation):
            return getattr(module, operation)
    if wanted != "auto":
        reason = reason or f"it has no {operation}"
        raise ConfigError(f"GRAM_KERNELS={wanted} cannot be used here: {reason}. Unset it, or install what it needs.")
    raise AssertionError(f"the reference lacks {operation}")


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    """(module, "") or (None, why it cannot be used)."""
    try:
        module = importlib.import_module(MODULES[name])
    except (ImportError, OSError) as error:
        return None, str(error)
    return module, ""
