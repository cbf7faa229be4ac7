"""The rows of a recipe's data sets: selected, written once, and known by the hash of what they are made of."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any, Iterator

from gram_engine.config import DataConfig
from gram_engine.data.fields import row_to_samples
from gram_engine.data.readers import read_items
from gram_engine.data.schema import Pair
from gram_engine.data.sources import source_fingerprint, source_is_there
from gram_engine.data.template import JudgeTemplate
from gram_engine.errors import ConfigError
from gram_engine.fileio import write_atomically
from gram_engine.reproduce.recipe import DataSet


def content_hash(content: Any) -> str:
    """Twelve hexadecimal digits of anything JSON knows."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def fingerprint(data: DataSet, template: str) -> str:
    """Hash of the files' content and of how rows are taken from them.

    Raises:
        ConfigError: a file is missing.
    """
    for file in data.files:
        if not source_is_there(file):
            raise ConfigError(f"data.{data.name}: {file}: no such file. Check the path, or the variables given with --set.")
    files = [source_fingerprint(file) for file in data.files]
    layout = JudgeTemplate.load(template).sha256 if data.form == "responses" else None
    return content_hash([files, dict(data.where), data.rows, data.seed, data.form, layout])


def prepare(data: DataSet, template: str, file: Path) -> None:
    """Write the selected rows to `file`, one JSON object a line.

    A smaller selection with the same seed is part of a larger one.

    Raises:
        ConfigError: fewer rows than wanted, or none.
        DataError: a row cannot be used.
    """
    rows = [
        (place, row)
        for place, row in read_items(data.files, lambda row, place: [(place, row)])
        if all(isinstance(row, dict) and row.get(name) in values for name, values in data.where.items())
    ]
    if len(rows) < (data.rows or 1):
        raise ConfigError(f"data.{data.name}: {data.rows or 1} rows wanted, but {len(rows)} match {dict(data.where)}.")
    if data.rows is not None:
        drawn = random.Random(data.seed).sample(range(len(rows)), len(rows))[: data.rows]
        rows = [rows[number] for number in sorted(drawn)]
    with write_atomically(file) as handle:
        for place, row in rows:
            for made in [row] if data.form == "pairs" else _responses(row, place, JudgeTemplate.load(template)):
                handle.write(json.dumps(made, ensure_ascii=False) + "\n")


def _responses(row: Any, place: str, template: JudgeTemplate) -> Iterator[dict[str, str]]:
    for pair in row_to_samples(row, DataConfig(), place):
        if not isinstance(pair, Pair):
            raise ConfigError(f"{place}: form 'responses' needs prompt and two responses in fields of their own.")
        for response in (pair.response_a, pair.response_b):
            yield {"instruction": template.generate(pair.prompt), "output": response}
