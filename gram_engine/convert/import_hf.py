"""Hugging Face folder -> the live model, at any layout; each process reads only the rows and columns it holds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gram_engine.config import ModelConfig
from gram_engine.convert.mapping import INDEX, OUTPUT, SINGLE, hf_shapes, rules
from gram_engine.errors import CheckpointError
from gram_engine.model.build import sharded_tensors


@torch.no_grad()
def load_hf_weights(chunks: list, folder: str | Path, model: ModelConfig) -> None:
    """Fill this process's parameters from `folder`, converted to their dtype; vocabulary padding becomes zero.

    Raises:
        CheckpointError: a tensor is missing, of another shape than config.json says, or has no place in the engine.
    """
    source = HuggingFaceFolder(folder)
    source.check(model)
    rule_of = {(rule.engine, layer): rule for rule, layer in rules(model)}
    for chunk in chunks:
        for tensor in sharded_tensors(chunk):
            stacked = tensor.prepend_axis_num
            layer = tensor.global_offset[0] if stacked else None
            rule = rule_of[tensor.key, layer]
            names = rule.hf_names(layer)
            offset = tensor.global_offset[stacked:]
            (start, end), *columns = [(begin, begin + size) for begin, size in zip(offset, tensor.local_shape)]
            row = 0
            for part, first, last in rule.pieces_of_rows(start, end, model):
                rows = source.read(names[part], (first, last), *columns)
                tensor.data[row : row + len(rows)].copy_(rows)
                row += len(rows)
            tensor.data[row:].zero_()


class HuggingFaceFolder:
    """Tensors of a safetensors folder by name, sharded or not; files are memory-mapped and stay open."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._open: dict[str, safe_open] = {}
        index = self.folder / INDEX
        if index.is_file():
            self.files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif (self.folder / SINGLE).is_file():
            self.files = dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        else:
            raise CheckpointError(f"{folder}: neither {INDEX} nor {SINGLE} is here. The weights must be safetensors.")

    def check(self, model: ModelConfig) -> None:
        """Compare names and shapes with what `model` needs, before any weight is read.

        Raises:
            CheckpointError: names every tensor that is missing or has no place, or the first of another shape.
        """
        wanted = hf_shapes(model)
        # Old conversions stored the rotary frequencies; with tied embeddings some folders repeat the output layer.
        extra = {
            name
            for name in self.files.keys() - wanted.keys()
            if not name.endswith("rotary_emb.inv_freq") and name not in OUTPUT.hf
        }
        if missing := wanted.keys() - self.files.keys():
            raise CheckpointError(f"{self.folder}: missing: {_some(missing)}. Download the folder again.")
        if extra:
            raise CheckpointError(f"{self.folder}: the engine has no place for {_some(extra)}. It reads LLaMA and Qwen3.")
        for name, shape in wanted.items():
            found = tuple(self._slice(name).get_shape())
            if found != shape:
                raise CheckpointError(
                    f"{self.folder}: {name} has shape {found}; config.json asks for {shape}. Use the config.json that belongs "
                    "to these weights."
                )

    def read(self, name: str, rows: tuple[int, int], columns: tuple[int, int] | None = None) -> Tensor:
        """Some rows, and columns of a matrix, of one tensor, in its stored dtype."""
        stored = self._slice(name)
        return stored[slice(*rows)] if columns is None else stored[slice(*rows), slice(*columns)]

    def _slice(self, name: str):
        try:
            return self._file(self.files[name]).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / self.files[name]}: {error}. Download the file again.") from error

    def _file(self, name: str):
        if name not in self._open:
            path = self.folder / name
            if not path.is_file():
                raise CheckpointError(f"{path}: no such file, but {INDEX} names it. Download the folder again.")
            try:
                self._open[name] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(f"{path}: not a whole safetensors file ({error}). Download it again.") from error
        return self._open[name]


def _some(names: set[str]) -> str:
    first = sorted(names)[:3]
    rest = f" and {len(names) - len(first)} more" if len(names) > len(first) else ""
    return ", ".join(first) + rest
