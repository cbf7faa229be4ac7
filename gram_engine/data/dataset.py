"""Preprocessed data on disk: the tokens of each sample in Megatron's .bin/.idx, its labels and positions, and a manifest.

PREFIX.bin/.idx      tokens (megatron-core IndexedDataset), one entry per sample: a pair in one order; for bradley-terry a
                     pair, [x, y_a] and [x, y_b] end to end
PREFIX.samples.npy   structured array of SAMPLE_DTYPE, one row per sample
PREFIX.json          manifest: what the samples were made from and how, sizes and checksums (manifest.py); written last
"""

from __future__ import annotations

import warnings
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from gram_engine.data.integrity import AGAIN, check_files, check_index
from gram_engine.data.manifest import Manifest
from gram_engine.errors import DataError

SAMPLE_DTYPE = np.dtype(
    [
        ("pair", "<i8"),  # number of the pair in the source, the same for its two orders
        ("order", "i1"),  # 0: responses as given, 1: swapped
        ("preference", "<f4"),  # probability that the response shown as A is better; nan: unlabelled
        ("weight", "<f4"),
        ("margin", "<f4"),
        # Token positions in the sample, ascending; -1: unknown.  Stage 1: the target runs from target_start to the end, and
        # `middle` is the first token of B's opening marker.  Bradley-Terry: `middle` is the first token of [x, y_b].
        ("target_start", "<i4"),
        ("a_start", "<i4"),
        ("a_end", "<i4"),
        ("middle", "<i4"),
        ("b_start", "<i4"),
        ("b_end", "<i4"),
    ]
)
POSITIONS = ("target_start", "a_start", "a_end", "middle", "b_start", "b_end")


def indexed_dataset_module():
    """megatron-core's IndexedDataset module, without the warnings its import prints on machines without a GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


class PairDataset:
    """Samples with their tokens (memory-mapped) and labels.

    Args:
        whole: also check the checksum of the tokens, which reads all of .bin; sizes, index and rows are always checked.

    Raises:
        DataError: a file is missing, damaged, of another format version or of other data.
    """

    def __init__(self, prefix: str | Path, whole: bool = False) -> None:
        self.prefix = str(prefix)
        self.manifest = Manifest.read(self.prefix)
        try:
            check_files(self.prefix, self.manifest.files, whole)
            check_index(self.prefix, self.manifest.counts["samples"])
            self.samples: np.ndarray = np.load(self.prefix + ".samples.npy")
            self._sequences = indexed_dataset_module().IndexedDataset(self.prefix, mmap=True)
        except DataError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(f"{self.prefix}: cannot be opened ({error!r}). {AGAIN}") from None
        self._check_rows()

    def __len__(self) -> int:
        return len(self.samples)

    def tokens(self, index: int) -> np.ndarray:
        """Token ids of one sample, [length], int32 or uint16."""
        return self._sequences.get(int(index))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each sample, int64 [len(self)]."""
        return np.asarray(self._sequences.sequence_lengths, dtype=np.int64)

    @cached_property
    def parts(self) -> np.ndarray:
        """Lengths of the sequences in each sample, int64 [len(self), sequences_per_sample]."""
        if self.manifest.task.sequences_per_sample == 1:
            return self.lengths[:, None]
        middle = self.samples["middle"].astype(np.int64)
        return np.stack([middle, self.lengths - middle], axis=1)

    def _check_rows(self) -> None:
        path, rows = f"{self.prefix}.samples.npy", self.samples
        if rows.dtype != SAMPLE_DTYPE or rows.shape != self.lengths.shape:
            raise DataError(f"{path}: holds {rows.shape} rows of another kind, not {len(self.lengths)} of samples. {AGAIN}")
        wrong = ~np.isin(rows["order"], (0, 1)) | (rows["preference"] < 0) | (rows["preference"] > 1) | ~(rows["weight"] >= 0)
        for name in POSITIONS:
            wrong |= (rows[name] < -1) | (rows[name] > self.lengths)
        if self.manifest.task.text == "generate":
            wrong |= rows["target_start"] < 1
            for earlier, later in pairwise(POSITIONS):
                wrong |= (rows["middle"] >= 0) & (rows[earlier] > rows[later])
        if wrong.any():
            raise DataError(f"{path}: row {int(np.argmax(wrong))} has values that its sequence cannot have. {AGAIN}")
