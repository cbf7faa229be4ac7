"""The pair loss in CUDA C++ (csrc/pair_loss.cu), built by setup.py if nvcc is found; arguments as in reference.py.

Raises:
    RuntimeError: CUDA refused the launch.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).parent / "libgram_cuda.so"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

if not torch.cuda.is_available():
    raise ImportError("torch finds no GPU")
if not LIBRARY.is_file():
    raise ImportError(f"{LIBRARY.name} was not built (it needs nvcc; pip install --no-build-isolation -e . tells more)")

_library = ctypes.CDLL(str(LIBRARY))
_library.gram_cuda_error.restype = ctypes.c_char_p
_FORWARD = [c_int, c_void_p, c_int64, *[c_void_p] * 3, c_double, c_double, c_int64, c_int64, *[c_void_p] * 5]
_BACKWARD = [c_int, c_void_p, c_int64, *[c_void_p] * 5, c_int, c_int64, c_int64, *[c_void_p] * 3]
_library.gram_pair_loss_forward.argtypes = _FORWARD
_library.gram_pair_loss_backward.argtypes = _BACKWARD


def pair_loss_forward(hidden: Tensor, *arguments) -> None:
    _launch("gram_pair_loss_forward", hidden, arguments[:-4], arguments[-4:])


def pair_loss_backward(hidden: Tensor, *arguments) -> None:
    _launch("gram_pair_loss_backward", hidden, arguments[:-2], arguments[-2:])


def _launch(name: str, hidden: Tensor, inputs: tuple, outputs: tuple[Tensor, ...]) -> None:
    """Launch on hidden's device and its current stream; the first output has one row per label."""
    arguments = (*inputs, len(outputs[0]), hidden.shape[1], *outputs)
    pointers = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    with torch.cuda.device(hidden.device):
        stream = torch.cuda.current_stream().cuda_stream
        code = getattr(_library, name)(DTYPES[hidden.dtype], hidden.data_ptr(), hidden.stride(0), *pointers, stream)
    if code:
        raise RuntimeError(f"{name}: {_library.gram_cuda_error(code).decode()} (CUDA error {code})")
