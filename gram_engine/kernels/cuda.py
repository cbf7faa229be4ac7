"""The pair loss in CUDA C++ (csrc/pair_loss.cu), built by setup.py where nvcc is; signatures as in reference.py."""

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


def pair_loss_forward(
    hidden: Tensor,
    rows: Tensor | None,
    direction: Tensor,
    preference: Tensor,
    label_smoothing: float,
    norm_eps: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, margin, rstd, slope), each [labels].

    Raises:
        RuntimeError: CUDA refused the launch.
    """
    results = tuple(torch.empty_like(preference) for _ in range(4))
    if len(preference):
        hidden, rows, direction, preference = _dense(hidden, rows, direction, preference)
        _call(
            "gram_pair_loss_forward", hidden, rows, direction, preference,
            label_smoothing, -1.0 if norm_eps is None else norm_eps, len(preference), hidden.shape[1], *results,
        )  # fmt: skip
    return results


def pair_loss_backward(
    hidden: Tensor,
    rows: Tensor | None,
    direction: Tensor,
    margin: Tensor,
    rstd: Tensor,
    grad_margin: Tensor,
    norm_eps: float | None,
) -> tuple[Tensor, Tensor]:
    """(gradient of the label rows [labels, hidden], gradient of `direction` [hidden]).

    Raises:
        RuntimeError: CUDA refused the launch.
    """
    labels, size = len(margin), hidden.shape[1]
    if not labels:
        return hidden.new_empty(0, size), torch.zeros_like(direction)
    grad_rows, grad_direction = hidden.new_empty(labels, size), direction.new_empty(size)
    hidden, rows, *vectors = _dense(hidden, rows, direction, margin, rstd, grad_margin)
    _call(
        "gram_pair_loss_backward", hidden, rows, *vectors, int(norm_eps is not None), labels, size, grad_rows, grad_direction
    )
    return grad_rows, grad_direction


def _dense(hidden: Tensor, rows: Tensor | None, *vectors: Tensor) -> list[Tensor | None]:
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    return [hidden, None if rows is None else rows.contiguous(), *(vector.contiguous() for vector in vectors)]


def _call(name: str, hidden: Tensor, *arguments) -> None:
    """Launch on hidden's device and current stream. Tensors become pointers; `hidden` is preceded by its dtype's code."""
    pointers = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    with torch.cuda.device(hidden.device):
        stream = torch.cuda.current_stream().cuda_stream
        code = getattr(_library, name)(DTYPES[hidden.dtype], hidden.data_ptr(), hidden.stride(0), *pointers, stream)
    if code:
        raise RuntimeError(f"{name}: {_library.gram_cuda_error(code).decode()} (CUDA error {code})")
