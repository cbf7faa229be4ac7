"""Preprocessed data on disk: token sequences in Megatron's .bin/.idx, one row of facts per sequence, and a manifest.

PREFIX.bin/.idx      tokens (megatron-core IndexedDataset), one sequence per (pair, order); for bradley-terry one per pair,
                     [x, y_a] and [x, y_b] end to end
PREFIX.samples.npy   structured array of SAMPLE_DTYPE, one row per sequence
PREFIX.json          manifest: what the tokens were made from and how; written last
"""

from __future__ import annotations

import json
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gram_engine.errors import DataError

FORMAT_VERSION = 1

SAMPLE_DTYPE = np.dtype(
    [
        ("pair", "<i8"),  # number of the comparison in the source, the same for its two orders
        ("order", "i1"),  # 0: responses as given, 1: exchanged
        ("preference", "<f4"),  # probability that the response shown as A is better; nan: unlabelled
        ("weight", "<f4"),
        ("margin", "<f4"),
        # Stage 1, in token positions (-1 where unknown): the target runs from target_start to the end of the sequence,
        # `middle` is the first token of B's opening marker.  Bradley-Terry: `middle` is the first token of [x, y_b].
        ("target_start", "<i4"),
        ("a_start", "<i4"),
        ("a_end", "<i4"),
        ("middle", "<i4"),
        ("b_start", "<i4"),
        ("b_end", "<i4"),
    ]
)


def indexed_dataset_module():
    """megatron-core's IndexedDataset module, without the warnings its import prints on machines without a GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


class PairDataset:
    """Sequences of tokens with their labels, memory-mapped.

    Raises:
        DataError: files are missing, of another format version, or do not fit together.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        for ending in (".json", ".samples.npy", ".idx", ".bin"):
            if not Path(self.prefix + ending).is_file():
                raise DataError(f"{self.prefix}{ending}: no such file. Preprocess the data again: tools/preprocess_data.py.")
        self.manifest: dict[str, Any] = read_manifest(self.prefix)
        self.samples: np.ndarray = np.load(self.prefix + ".samples.npy")
        indexed = indexed_dataset_module()
        self._sequences = indexed.IndexedDataset(self.prefix, mmap=True)
        self._check()

    def __len__(self) -> int:
        return len(self.samples)

    def tokens(self, index: int) -> np.ndarray:
        """Token ids of one sequence, [length]."""
        return self._sequences.get(int(index))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens in each sequence, [len(self)] int64."""
        return np.asarray(self._sequences.sequence_lengths, dtype=np.int64)

    @cached_property
    def parts(self) -> np.ndarray:
        """Tokens that see each other, [len(self), 1] int64; for bradley-terry [len(self), 2], the two texts of a pair."""
        if self.objective != "bradley-terry":
            return self.lengths[:, None]
        middle = self.samples["middle"].astype(np.int64)
        return np.stack([middle, self.lengths - middle], axis=1)

    @property
    def objective(self) -> str:
        """The objective the tokens were laid out for."""
        return self.manifest["objective"]

    def _check(self) -> None:
        size = Path(self.prefix + ".bin").stat().st_size
        expected = int(self.lengths.sum()) * np.dtype(self._sequences.index.dtype).itemsize
        counts = {len(self.samples), len(self.lengths), self.manifest["counts"]["samples"]}
        if self.samples.dtype != SAMPLE_DTYPE or len(counts) != 1 or size != expected:
            raise DataError(
                f"{self.prefix}: .bin, .idx, .samples.npy and .json do not belong together (sequences: {len(self.lengths)}, "
                f"rows: {len(self.samples)}, manifest: {self.manifest['counts']['samples']}; .bin has {size} of {expected} "
                "bytes). Preprocess the data again."
            )


def read_manifest(prefix: str | Path) -> dict[str, Any]:
    """The manifest of preprocessed data.

    Raises:
        DataError: it is missing, unreadable, or of another format version.
    """
    path = Path(f"{prefix}.json")
    if not path.is_file():
        raise DataError(f"{path}: no such file. Make it with: gram preprocess --data FILE --output-prefix {prefix}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: not a manifest of preprocessed data. Preprocess the data again.") from None
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: format version {version}, this engine reads {FORMAT_VERSION}. Preprocess the data again.")
    return manifest
