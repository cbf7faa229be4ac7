"""Where rows come from: files, and data sets of the Hugging Face hub by name (`hf:NAME` or `hf:NAME:SPLIT`)."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Iterator

from gram_engine.errors import DataError
from gram_engine.files import sha256_of_file

HUB = "hf:"


def is_hub_name(source: str | Path) -> bool:
    """Whether a source is `hf:NAME`, not a file."""
    return str(source).startswith(HUB)


def source_is_there(source: str | Path) -> bool:
    """Whether a source can be opened; of the hub's data sets this shows only when they are read."""
    try:
        return is_hub_name(source) or Path(source).is_file()
    except OSError:  # a name too long
        return False


def absent(source: str | Path) -> str:
    """What to tell of a source that is not there."""
    if os.path.isdir(source):
        return f"{source}: a folder. Give the files in it, such as {source}/*.jsonl."
    return f"{source}: no such file. Check the path, and the working directory if it is relative."


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
    """(row number, row) of a hub data set, streamed; its split is `train` unless the name says another.

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
