"""Hugging Face LLaMA folder -> the live model, at any layout; each process reads the files for itself, memory-mapped."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from gram_engine.config import ModelConfig
from gram_engine.convert.mapping import Rule, hf_names, rules
from gram_engine.errors import CheckpointError
from gram_engine.model.build import sharded_tensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@torch.no_grad()
def load_hf_weights(chunks: list, folder: str | Path, model: ModelConfig) -> None:
    """Fill this process's parameters from `folder`. One tensor of one layer is in memory at a time.

    Raises:
        CheckpointError: a tensor is missing or of another shape than config.json says.
    """
    source = HuggingFaceFolder(folder)
    by_place = {(rule.engine, layer): rule for rule, layer in rules(model)}
    for chunk in chunks:
        for tensor in sharded_tensors(chunk):
            stacked = tensor.prepend_axis_num
            layer = tensor.global_offset[0] if stacked else None
            rule = by_place[tensor.key, layer]
            whole = source.engine_tensor(rule, layer, model)
            shape, offset = tensor.global_shape[stacked:], tensor.global_offset[stacked:]
            if len(shape) == 2:
                whole = F.pad(whole, (0, 0, 0, shape[0] - whole.shape[0]))
            if tuple(whole.shape) != tuple(shape):
                names = ", ".join(hf_names(rule, layer))
                raise CheckpointError(f"{folder}: {names} make {tuple(whole.shape)}, config.json asks for {tuple(shape)}.")
            part = tuple(slice(start, start + size) for start, size in zip(offset, tensor.local_shape))
            tensor.data.copy_(whole[part])


class HuggingFaceFolder:
    """Tensors of a safetensors folder by name, sharded or not."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = self.folder / INDEX
        if index.is_file():
            self.files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif (self.folder / SINGLE).is_file():
            with safe_open(self.folder / SINGLE, framework="pt") as handle:
                self.files = dict.fromkeys(handle.keys(), SINGLE)
        else:
            raise CheckpointError(f"{folder}: neither {INDEX} nor {SINGLE} is here. The weights must be safetensors.")

    def tensor(self, name: str) -> Tensor:
        """One tensor, in its stored dtype."""
        if name not in self.files:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing.")
        with safe_open(self.folder / self.files[name], framework="pt") as handle:
            return handle.get_tensor(name)

    def engine_tensor(self, rule: Rule, layer: int | None, model: ModelConfig) -> Tensor:
        """A rule's engine tensor of one layer, whole."""
        try:
            return rule.merge([self.tensor(name) for name in hf_names(rule, layer)], model)
        except RuntimeError as error:
            names = ", ".join(hf_names(rule, layer))
            raise CheckpointError(f"{self.folder}: {names} do not fit config.json: {error}") from error
