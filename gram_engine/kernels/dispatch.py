"""Which implementation of a kernel runs: CUDA C++, Triton, CPU C++, or the plain PyTorch reference.

GRAM_KERNELS=cuda|triton|cpu|reference forces one.  If it is unset or `auto`, the first one that works on the tensor's device
runs: CUDA, then Triton, then the reference on a GPU; CPU C++, then the reference on a CPU.

The operators (pair_loss.py, cross_entropy.py) check their arguments, make them contiguous and allocate the outputs; an
implementation only fills the outputs.  The arguments are listed in those two files.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Callable

import torch
from torch import Tensor

from gram_engine.errors import ConfigError

MODULES = {
    "cuda": "gram_engine.kernels.cuda",
    "triton": "gram_engine.kernels.triton_kernels",
    "cpu": "gram_engine.kernels.cpu",
    "reference": "gram_engine.kernels.reference",
}
ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}


def implementation(operation: str, device: torch.device) -> Callable[..., None]:
    """The function `operation` of the implementation that runs on `device`.

    Raises:
        ConfigError: GRAM_KERNELS names an unknown implementation, or one that cannot run on this machine.
    """
    return _choose(operation, device)[1]


def name_of(operation: str, device: torch.device) -> str:
    """The name of the implementation that `implementation` returns, for logs and benchmarks."""
    return _choose(operation, device)[0]


def contiguous_rows(matrix: Tensor) -> Tensor:
    """The matrix with column stride 1, copied only if necessary; the row stride may be anything."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _choose(operation: str, device: torch.device) -> tuple[str, Callable[..., None]]:
    return _chosen(operation, device.type, os.environ.get("GRAM_KERNELS") or "auto")


@functools.cache
def _chosen(operation: str, device: str, wanted: str) -> tuple[str, Callable[..., None]]:
    if wanted != "auto" and wanted not in MODULES:
        raise ConfigError(f"GRAM_KERNELS={wanted}: unknown. Use auto, {', '.join(MODULES)}.")
    for name in ORDER.get(device, ("reference",)) if wanted == "auto" else (wanted,):
        module, reason = _load(name)
        if module is not None and hasattr(module, operation):
            return name, getattr(module, operation)
    if wanted != "auto":
        reason = reason or f"it has no {operation}"
        raise ConfigError(f"GRAM_KERNELS={wanted} cannot be used here: {reason}. Unset it, or install what it needs.")
    raise AssertionError(f"the reference lacks {operation}")


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    """(module, "") or (None, the reason why it cannot be imported)."""
    try:
        module = importlib.import_module(MODULES[name])
    except (ImportError, OSError) as error:
        return None, str(error)
    return module, ""
