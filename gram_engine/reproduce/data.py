"""The rows of a recipe's data sets: selected, written once, and known by the hash of what they are made of."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from gram_engine.data.readers import read_items
from gram_engine.data.sources import source_fingerprint
from gram_engine.errors import ConfigError
from gram_engine.files import source_is_there, write_atomically
from gram_engine.reproduce.recipe import DataSet


def content_hash(content: Any) -> str:
    """Twelve hexadecimal digits of anything JSON knows."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def fingerprint(data: DataSet) -> str:
    """Hash of the files' content and of how rows are taken from them.

    Raises:
        ConfigError: a file is missing.
    """
    for file in data.files:
        if not source_is_there(file):
            raise ConfigError(f"data.{data.name}: {file}: no such file. Check the path, or the variables given with --set.")
    files = [source_fingerprint(file) for file in data.files]
    return content_hash([files, dict(data.where), data.rows, data.seed])


def prepare(data: DataSet, file: Path) -> None:
    """Write the selected rows to `file`, one JSON object a line.

    A smaller selection with the same seed is part of a larger one.

    Raises:
        ConfigError: fewer rows than wanted, or none.
        DataError: a row cannot be read.
    """
    rows = [
        row
        for row in read_items(data.files, lambda row, place: [row])
        if all(isinstance(row, dict) and row.get(name) in values for name, values in data.where.items())
    ]
    if len(rows) < (data.rows or 1):
        raise ConfigError(f"data.{data.name}: {data.rows or 1} rows wanted, but {len(rows)} match {dict(data.where)}.")
    if data.rows is not None:
        drawn = random.Random(data.seed).sample(range(len(rows)), len(rows))[: data.rows]
        rows = [rows[number] for number in sorted(drawn)]
    with write_atomically(file) as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
