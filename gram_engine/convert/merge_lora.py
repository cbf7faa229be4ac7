"""LoRA's adapters (model/lora.py) merged into the weights they stand beside, as a checkpoint is exported."""

from __future__ import annotations

import torch
from torch import Tensor

from gram_engine.checkpoint.torch_dist import TorchDistCheckpoint
from gram_engine.config.schema import ModelConfig


def merged_tensor(checkpoint: TorchDistCheckpoint, key: str, layer: int | None, model: ModelConfig) -> Tensor:
    """A whole tensor of the engine (of one layer) with its adapter, where it has one: W + alpha / rank * B A, in fp32.

    Where B is zero the tensor is W itself, bit for bit.

    Raises:
        CheckpointError: it, or its adapter, is missing, or a file cannot be read.
    """
    weight = checkpoint.tensor(key, layer)
    module, _, kind = key.rpartition(".")
    adapted = model.lora_rank is not None and kind == "weight" and module.endswith(model.lora_modules)
    if not adapted:
        return weight
    into, out = (checkpoint.tensor(f"{module}.adapter.{name}.weight", layer).float() for name in ("linear_in", "linear_out"))
    if not out.any():
        return weight
    return torch.addmm(weight.float(), out, into, alpha=model.lora_alpha / model.lora_rank)
