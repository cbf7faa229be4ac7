"""The kernels in C++ for CPUs (csrc/cpu_ops.cpp), built by setup.py; their arguments are those of reference.py."""

from __future__ import annotations

from pathlib import Path

import torch

LIBRARY = Path(__file__).parent / "libgram_cpu.so"

if not LIBRARY.is_file():
    raise ImportError(f"{LIBRARY.name} was not built (pip install --no-build-isolation -e . tells why)")
torch.ops.load_library(str(LIBRARY))

pair_loss_forward = torch.ops.gram_engine_cpu.pair_loss_forward
pair_loss_backward = torch.ops.gram_engine_cpu.pair_loss_backward
cross_entropy_stats = torch.ops.gram_engine_cpu.cross_entropy_stats
cross_entropy_grad_ = torch.ops.gram_engine_cpu.cross_entropy_grad_
