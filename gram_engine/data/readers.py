"""Reads preference data as people have it: one checked `Pair` (or ready-made `Verbatim` row) after the other.

Files: JSONL, JSON, both also gzipped, and Parquet; and data sets of the Hugging Face hub by name (`sources.py`).
`fields.py` knows what the fields of a row are called.
"""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, Sequence, TypeVar

from gram_engine.config import DataConfig
from gram_engine.data.fields import BadRow, row_to_samples
from gram_engine.data.schema import Pair, Verbatim
from gram_engine.data.sources import hub_rows, is_hub_name, source_is_there
from gram_engine.errors import DataError

T = TypeVar("T")
OnReject = Callable[[DataError, Any], None]
"""Called with the error and the raw row (or line) of each bad row, instead of stopping."""


def read_rows(paths: Sequence[str | Path], data: DataConfig, on_reject: Optional[OnReject] = None) -> Iterator[Pair | Verbatim]:
    """All comparisons of the files, in order; a ranked list of K responses gives its K(K-1)/2 pairs. Raises as `read_items`."""
    return read_items(paths, partial(row_to_samples, data=data), on_reject)


def read_items(
    paths: Sequence[str | Path], convert: Callable[..., list[T]], on_reject: Optional[OnReject] = None
) -> Iterator[T]:
    """What `convert(row, place=)` makes of each row of the files, in order.

    Raises:
        DataError: a file is missing, empty or unreadable; or, without `on_reject`, a row is bad ("file:line: what; remedy").
    """
    for path in paths:
        if not source_is_there(path):
            raise DataError(f"{path}: no such file. Check the path, and the working directory if it is relative.")
    for path in paths:
        empty = True
        for line, row in hub_rows(path) if is_hub_name(path) else _raw_rows(Path(path)):
            empty = False
            place = f"{path}:{line}"
            try:
                if isinstance(row, BadRow):
                    raise row
                items = convert(row, place=place)
            except BadRow as problem:
                error = DataError(f"{place}: {problem}")
                if on_reject is None:
                    raise error from None
                on_reject(error, None if isinstance(row, BadRow) else row)
                continue
            yield from items
        if empty:
            raise DataError(f"{path}: no rows. Give a file with one row a line.")


def _raw_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, parsed row or the BadRow that says why there is none); Parquet rows count as lines."""
    name = path.name.removesuffix(".gz")
    if name.endswith((".parquet", ".pq")):
        yield from _parquet_rows(path)
        return
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as handle:
            if name.endswith(".json") and _first_byte(handle) == b"[":
                yield from _array_rows(path, handle.read())
            else:
                yield from _line_rows(handle)
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}). Copy or download it again.") from None


def _first_byte(handle) -> bytes:
    """First byte that is not white space (or a byte-order mark); the handle is back at its start afterwards."""
    head = handle.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    handle.seek(0)
    return head[:1]


def _line_rows(handle) -> Iterator[tuple[int, Any]]:
    for number, raw in enumerate(handle, start=1):
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if not raw.strip():
            continue
        try:
            yield number, json.loads(raw.decode("utf-8").rstrip())
        except UnicodeDecodeError as error:
            yield number, BadRow(f"not UTF-8 (byte {raw[error.start]:#04x} at column {error.start + 1}). Save it as UTF-8.")
        except json.JSONDecodeError as error:
            hint = " A JSON array must be in a file named .json." if number == 1 and raw.lstrip()[:1] == b"[" else ""
            yield number, BadRow(f"not valid JSON: {error.msg} at column {error.colno}. Write one JSON object a line.{hint}")


def _array_rows(path: Path, raw: bytes) -> Iterator[tuple[int, Any]]:
    """Rows of a JSON array, each with the line it begins on; the array is parsed piece by piece to know the lines."""
    try:
        text = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 (byte {raw[error.start]:#04x}). Save it as UTF-8.") from None
    decoder, line, counted = json.JSONDecoder(), 1, 0
    position = _skip_space(text, text.index("[") + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(_broken_array(path, error.msg, error.lineno, error.colno)) from None
        yield line, row
        position = _skip_space(text, end)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            error = json.JSONDecodeError("Expecting ',' or ']'", text, position)
            raise DataError(_broken_array(path, error.msg, error.lineno, error.colno))


def _broken_array(path: Path, message: str, line: int, column: int) -> str:
    return f"{path}:{line}: not valid JSON: {message} at column {column}. Mend the array, or write one JSON object a line."


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\n", "\r", "\t"):
        position += 1
    return position


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow. Install it: pip install pyarrow") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}).") from None
