"""Hugging Face folder -> the model in memory, at any layout; each process reads only the rows and columns of its shards."""

from __future__ import annotations

from pathlib import Path

import torch

from gram_engine.config.schema import Config
from gram_engine.hf.folder import HuggingFaceFolder
from gram_engine.hf.mapping import SCORE, rules
from gram_engine.model.build import sharded_tensors
from gram_engine.model.lora import is_adapter


@torch.no_grad()
def load_hf_weights(chunks: list, folder: str | Path, config: Config) -> None:
    """Load this process's parameters from `folder`, converted to their dtype; padding rows of the vocabulary become 0.

    LoRA adapters keep their initial values.  A scalar head is loaded from a ...ForSequenceClassification folder; with the
    folder of a language model it keeps its initial value.

    Raises:
        CheckpointError: a tensor is missing or unknown, or its shape is not the one that config.json gives.
    """
    source, model = HuggingFaceFolder(folder), config.model
    scored = not config.has_vocabulary_head and SCORE.engine in source.files
    source.check(model, other_head=SCORE.engine if scored else None)
    rule_of = {(rule.engine, layer): rule for rule, layer in [*rules(model), (SCORE, None)]}
    for chunk in chunks:
        for tensor in sharded_tensors(chunk):
            if is_adapter(tensor.key) or (tensor.key == SCORE.engine and not scored):
                continue
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
