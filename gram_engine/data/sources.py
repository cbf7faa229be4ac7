"""Sources of rows: files, and data sets of the Hugging Face hub by name (`hf:NAME` or `hf:NAME:SPLIT`)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Iterator

from gram_engine.errors import DataError
from gram_engine.files import HUB, is_hub_name, sha256_of_file


def source_fingerprint(source: str | Path) -> str:
    """SHA-256 of a file's content, or of a hub data set's name (its content may change at the hub).

    Raises:
        DataError: the file cannot be read.
    """
    if is_hub_name(source):
        return hashlib.sha256(str(source).encode()).hexdigest()
    try:
        return sha256_of_file(source)
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror}). Check its permissions and the disk.") from None


def hub_rows(source: str | Path) -> Iterator[tuple[int, Any]]:
    """(row number, row) of a hub data set, streamed; the split is `train` unless the name gives another.

    Raises:
        DataError: the datasets package is not installed, or the data set cannot be loaded.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(f"{source}: needs the datasets package. Install it: pip install 'gram_engine[hub]'") from None
    name, _, split = str(source).removeprefix(HUB).partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        yield from enumerate(rows, start=1)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source}: cannot be loaded: {error}. Check name, split and connection.") from error
