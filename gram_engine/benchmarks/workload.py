"""Preprocessed data of random tokens whose lengths are those of real preference pairs: a benchmark without data."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gram_engine.data.dataset import FORMAT_VERSION, SAMPLE_DTYPE
from gram_engine.data.writer import Chunk, DatasetWriter
from gram_engine.errors import ConfigError

# Tokens of (prompt, response A, response B), at even quantiles of 4,416 human comparisons (long-form answers and dialogues)
# under a 32,000-token BPE trained on them.
LENGTHS = [
    (13, 8, 2), (21, 29, 5), (59, 5, 4), (56, 13, 15), (55, 19, 25), (33, 20, 62), (19, 81, 30), (60, 73, 12), (117, 37, 7),
    (90, 53, 32), (33, 115, 46), (133, 22, 58), (58, 15, 162), (89, 34, 136), (175, 109, 7), (176, 113, 37), (291, 40, 32),
    (333, 55, 4), (299, 76, 44), (274, 94, 80), (274, 94, 117), (303, 112, 121), (465, 66, 61), (560, 45, 34), (466, 51, 151),
    (560, 92, 37), (563, 73, 72), (628, 64, 33), (552, 72, 119), (569, 106, 80), (656, 40, 73), (642, 81, 59), (602, 81, 112),
    (555, 79, 175), (644, 122, 57), (664, 75, 98), (646, 118, 91), (706, 104, 66), (681, 122, 114), (578, 276, 246),
]  # fmt: skip
TEMPLATE, MARKER = 159, 12
"""Tokens of the judge's instruction (stage 2), and of each of the four lines around the responses."""
LABEL_IDS = (32, 33)


def write_workload(
    prefix: str | Path, objective: str, samples: int, seq_length: int, vocab_size: int, stretch: float = 1.0
) -> None:
    """Write `samples` random samples; `stretch` multiplies their lengths, and what exceeds seq_length is cut off the prompt.

    Raises:
        ConfigError: seq_length holds no two responses and their markers.
    """
    draw = np.random.default_rng(0)
    rows = np.zeros(samples, SAMPLE_DTYPE)
    lengths = []
    for number, row in enumerate(rows):
        prompt, a, b = (max(1, round(part * stretch)) for part in LENGTHS[draw.integers(len(LENGTHS))])
        prompt += TEMPLATE if objective == "pair-preference" else 0
        prompt = min(prompt, seq_length - a - b - 4 * MARKER)
        if prompt < 1:
            raise ConfigError(f"--seq-length {seq_length} is too short for responses of {a} and {b} tokens.")
        a_start, middle = prompt + MARKER, prompt + a + 2 * MARKER
        row["pair"], row["preference"], row["weight"] = number, draw.integers(2), 1.0
        row["target_start"], row["a_start"], row["a_end"], row["middle"] = prompt, a_start, a_start + a, middle
        row["b_start"], row["b_end"] = middle + MARKER, middle + MARKER + b
        lengths.append(middle + b + 2 * MARKER)
    tokens = draw.integers(0, vocab_size, sum(lengths))
    with DatasetWriter(prefix, vocab_size) as writer:
        writer.add(Chunk(tokens, lengths, rows, samples, 0, 0))
        labels = list(LABEL_IDS) if objective == "pair-preference" else None
        facts = {"objective": objective, "label_ids": labels, "seq_length": seq_length, "tokenizer": {}, "template": {}}
        manifest = {"format_version": FORMAT_VERSION, **facts, "counts": writer.counts}
        writer.finish(manifest)
