"""Writes the files that dataset.py describes, under temporary names until they are complete."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gram_engine.data.dataset import indexed_dataset_module
from gram_engine.data.integrity import ENDINGS, describe_files
from gram_engine.data.manifest import Manifest
from gram_engine.errors import DataError
from gram_engine.files import fsync, write_atomically


@dataclass
class Chunk:
    """Samples of some rows: tokens of all samples int32 [tokens], tokens of each, their facts SAMPLE_DTYPE [samples]."""

    tokens: np.ndarray
    lengths: list[int]
    samples: np.ndarray
    num_rows: int
    truncated: int
    dropped: int


class DatasetWriter:
    """Writes files under temporary names; `finish` renames them, and writes the manifest last."""

    def __init__(self, prefix: str | Path, vocab_size: int) -> None:
        self.prefix = Path(prefix)
        self.lengths: list[int] = []
        self.counts = {"samples": 0, "truncated": 0, "dropped": 0}
        self._samples: list[np.ndarray] = []
        self._vocab_size = vocab_size

    def __enter__(self) -> DatasetWriter:
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self.prefix.with_name(f".{self.prefix.name}.{os.getpid()}.tmp")
        indexed = indexed_dataset_module()
        self._dtype = indexed.DType.optimal_dtype(self._vocab_size)
        self._builder = indexed.IndexedDatasetBuilder(f"{self._temporary}.bin", dtype=self._dtype)
        return self

    def add(self, chunk: Chunk) -> None:
        """Append the samples of a chunk."""
        position = 0
        for length in chunk.lengths:
            self._builder.add_document(chunk.tokens[position : position + length], [length])
            position += length
        self.lengths += chunk.lengths
        self._samples.append(chunk.samples)
        for name, number in (("samples", len(chunk.lengths)), ("truncated", chunk.truncated), ("dropped", chunk.dropped)):
            self.counts[name] += number

    def finish(self, manifest: Manifest) -> None:
        """Add the files' checksums to the manifest, rename the files, and write the manifest."""
        self._builder.finalize(f"{self._temporary}.idx")
        with open(f"{self._temporary}.samples.npy", "wb") as handle:
            np.save(handle, np.concatenate(self._samples))
        manifest.files = describe_files(self._temporary)
        Path(f"{self.prefix}.json").unlink(missing_ok=True)
        for ending in ENDINGS:
            fsync(f"{self._temporary}{ending}")
            os.replace(f"{self._temporary}{ending}", f"{self.prefix}{ending}")
        manifest.write(f"{self.prefix}.json")

    def __exit__(self, *_: Any) -> None:
        self._builder.data_file.close()
        for ending in ENDINGS:
            Path(f"{self._temporary}{ending}").unlink(missing_ok=True)


class RejectsFile:
    """Counts bad rows and, with --skip-bad-rows, writes them as one JSON object per line."""

    def __init__(self, prefix: str | Path, enabled: bool) -> None:
        self.count = 0
        self._path = Path(f"{prefix}.rejects.jsonl")
        self._lines: list[str] = []
        self._enabled = enabled

    def __call__(self, error: DataError, row: Any) -> None:
        self.count += 1
        try:
            line = json.dumps({"error": str(error), "row": row}, ensure_ascii=False, default=str)
        except (RecursionError, TypeError, ValueError):  # nested too deeply, or of keys that JSON does not have
            line = json.dumps({"error": str(error), "row": None}, ensure_ascii=False)
        # Half of a surrogate pair cannot be encoded as UTF-8, but its escape can, and is JSON too.
        self._lines.append(line.encode("utf-8", "backslashreplace").decode("utf-8"))

    def ignore(self, error: DataError, row: Any) -> None:
        """Does nothing: the rows were recorded when they were read for the first time."""

    def close(self) -> None:
        if self._enabled:
            with write_atomically(self._path) as handle:
                handle.writelines(line + "\n" for line in self._lines)
