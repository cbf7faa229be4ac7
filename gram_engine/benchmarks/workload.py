"""What the benchmarks run on: random models, preprocessed data of random tokens, and the demonstration data."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Iterator

import numpy as np
import torch

from gram_engine.config.parse import parse
from gram_engine.config.schema import Config, ModelConfig
from gram_engine.config.task import TASKS
from gram_engine.convert.jobs import in_files
from gram_engine.data import demo
from gram_engine.data.dataset import SAMPLE_DTYPE
from gram_engine.data.manifest import Manifest
from gram_engine.data.train_tokenizer import TokenizerConfig, train_tokenizer
from gram_engine.data.writer import Chunk, DatasetWriter
from gram_engine.errors import ConfigError
from gram_engine.hf.mapping import INDEX, SINGLE, rules
from gram_engine.hf.safetensors_file import SafetensorsWriter
from gram_engine.model.shapes import hf_config, resolve_shape
from gram_engine.training.session import session

# Tokens of (prompt, response A, response B) at even quantiles of 4,416 human comparisons (long-form answers and dialogues),
# tokenized by a BPE with 32,000 tokens that was trained on them.
LENGTHS = [
    (13, 8, 2), (21, 29, 5), (59, 5, 4), (56, 13, 15), (55, 19, 25), (33, 20, 62), (19, 81, 30), (60, 73, 12), (117, 37, 7),
    (90, 53, 32), (33, 115, 46), (133, 22, 58), (58, 15, 162), (89, 34, 136), (175, 109, 7), (176, 113, 37), (291, 40, 32),
    (333, 55, 4), (299, 76, 44), (274, 94, 80), (274, 94, 117), (303, 112, 121), (465, 66, 61), (560, 45, 34), (466, 51, 151),
    (560, 92, 37), (563, 73, 72), (628, 64, 33), (552, 72, 119), (569, 106, 80), (656, 40, 73), (642, 81, 59), (602, 81, 112),
    (555, 79, 175), (644, 122, 57), (664, 75, 98), (646, 118, 91), (706, 104, 66), (681, 122, 114), (578, 276, 246),
]  # fmt: skip
TEMPLATE, MARKER = 159, 12
"""Tokens of the judge's instruction (stage 2), and of each of the four markers around the responses."""
LABEL_IDS = (32, 33)


def write_workload(
    prefix: str | Path,
    objective: str,
    samples: int,
    seq_length: int,
    vocab_size: int,
    stretch: float = 1.0,
    equal_lengths: bool = False,
) -> None:
    """Write preprocessed data of `samples` samples of random tokens, as long as those of real preference pairs.

    Args:
        stretch: multiplies the lengths; prompts are cut so that no sample has more than `seq_length` tokens.
        equal_lengths: every sample has exactly `seq_length` tokens, and in stage 1 all but the first are targets.

    Raises:
        ConfigError: two responses and their markers do not fit into `seq_length`.
    """
    draw = np.random.default_rng(0)
    rows = np.zeros(samples, SAMPLE_DTYPE)
    lengths = []
    for number, row in enumerate(rows):
        prompt, a, b = (max(1, round(part * stretch)) for part in LENGTHS[draw.integers(len(LENGTHS))])
        prompt += TEMPLATE if TASKS[objective].has_label_tokens else 0
        marker = MARKER
        if equal_lengths:
            prompt, a, b, marker = 1, seq_length // 2, seq_length - seq_length // 2 - 1, 0
        prompt = min(prompt, seq_length - a - b - 4 * marker)
        if prompt < 1:
            raise ConfigError(f"--seq-length {seq_length} is too short for responses of {a} and {b} tokens.")
        a_start, middle = prompt + marker, prompt + a + 2 * marker
        row["pair"], row["preference"], row["weight"] = number, draw.integers(2), 1.0
        row["target_start"], row["a_start"], row["a_end"], row["middle"] = prompt, a_start, a_start + a, middle
        row["b_start"], row["b_end"] = middle + marker, middle + marker + b
        lengths.append(middle + b + 2 * marker)
    tokens = draw.integers(0, vocab_size, sum(lengths))
    with DatasetWriter(prefix, vocab_size) as writer:
        writer.add(Chunk(tokens, lengths, rows, samples, 0, 0))
        labels = list(LABEL_IDS) if TASKS[objective].has_label_tokens else None
        writer.finish(Manifest({}, labels, objective=objective, seq_length=seq_length, counts=writer.counts))


@contextlib.contextmanager
def random_session(config: Config, samples: int | None = None, **lengths) -> Iterator:
    """A session (training/session.py) on random data for a checked configuration without data; `lengths` as write_workload.

    Args:
        samples: in the data set; default: more than four global batches.
    """
    from gram_engine.training.initialise import PreparedData

    training, vocab_size = config.training, config.model.vocab_size
    samples = samples or 64 + 4 * training.global_batch_size
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder) / "data")
        write_workload(prefix, training.objective, samples, config.data.seq_length, vocab_size, **lengths)
        with session(config, PreparedData(prefix, None, vocab_size)) as trainer:
            yield trainer


def demonstration_data(folder: Path) -> list[str]:
    """Write the demonstration data and a tokenizer trained on it; returns the trainer's flags that name them."""
    data = demo.write(demo.DemoConfig(output_dir=str(folder / "data"), train_pairs=300, test_pairs=20))[0]
    tokenizer = str(folder / "tokenizer.model")
    train_tokenizer(TokenizerConfig(data=(str(data),), output=tokenizer, vocab_size=600))
    return ["--data", str(data), "--tokenizer-model", tokenizer, "--data-cache-path", str(folder / "cache")]


def model_of(flags: str) -> ModelConfig:
    """The shape that trainer flags give, such as "--model llama-3.2-3b"."""
    config = parse(flags.split())
    resolve_shape(config)
    return config.model


def write_random_folder(folder: Path, model: ModelConfig, dtype: torch.dtype) -> int:
    """Write a Hugging Face folder of random weights (normal; norms are 1), one tensor at a time; returns the weights' bytes."""
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
