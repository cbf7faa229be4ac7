"""Hugging Face folders of random weights, written without the model in memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from gram_engine.config.parse import parse
from gram_engine.config.schema import ModelConfig
from gram_engine.convert.jobs import in_files
from gram_engine.hf.mapping import INDEX, SINGLE, rules
from gram_engine.hf.safetensors_file import SafetensorsWriter
from gram_engine.model.shapes import hf_config, resolve_shape


def model_of(flags: str) -> ModelConfig:
    """The shape that trainer flags describe, such as "--model llama-3.2-3b"."""
    config = parse(flags.split())
    resolve_shape(config)
    return config.model


def write_random_folder(folder: Path, model: ModelConfig, dtype: torch.dtype) -> int:
    """Write config.json and weights (normal, norms 1); returns the bytes of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(model, str(dtype).removeprefix("torch."), 1, 2)))
    files = in_files(rules(model), model, dtype)
    rule_of = {(rule.engine, layer): rule for rule, layer in rules(model)}
    generator, weight_map, total = torch.Generator().manual_seed(0), {}, 0
    for number, keys in enumerate(files, 1):
        name = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        shapes = {}
        for key in keys:
            shapes.update(zip(rule_of[key].hf_names(key[1]), rule_of[key].hf_shapes(model), strict=True))
        writer = SafetensorsWriter(folder / name, shapes, dtype)
        for tensor_name, shape in shapes.items():
            tensor = torch.ones(shape, dtype=dtype) if len(shape) == 1 else torch.empty(shape, dtype=dtype)
            if len(shape) > 1:
                tensor.normal_(std=model.init_method_std, generator=generator)
            writer.write(tensor_name, tensor)
            total += tensor.nbytes
        writer.close()
        weight_map.update(dict.fromkeys(shapes, name))
    if len(files) > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total
