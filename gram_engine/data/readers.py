"""Reads preference data from JSONL and JSON files (also gzipped), Parquet files and data sets of the Hugging Face hub.

Each row becomes checked pairs, or a preformatted row. fields.py knows the names of fields, sources.py the hub.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, Sequence, TypeVar

from gram_engine.config.schema import DataConfig
from gram_engine.data.fields import BadRow, row_to_samples
from gram_engine.data.schema import Pair, PreformattedRow
from gram_engine.data.sources import hub_rows
from gram_engine.errors import DataError, one_line
from gram_engine.files import is_hub_name, missing_source_message, source_is_there

T = TypeVar("T")
LONGEST_LINE = 64 << 20
"""Bytes. A longer line is not a row but a file without line breaks, or an attempt to exhaust the memory."""
OnReject = Callable[[DataError, Any], None]
"""Called with the error and the raw content of each bad row, instead of stopping."""


def read_rows(
    paths: Sequence[str | Path], data: DataConfig, on_reject: Optional[OnReject] = None
) -> Iterator[Pair | PreformattedRow]:
    """All pairs in the files, in order; a ranked list of K responses gives K(K-1)/2 pairs. Raises as `read_items`."""
    return read_items(paths, partial(row_to_samples, data=data), on_reject)


def read_items(
    paths: Sequence[str | Path], convert: Callable[..., list[T]], on_reject: Optional[OnReject] = None
) -> Iterator[T]:
    """The items that `convert(row, source_location)` returns for each row of the files, in order.

    Raises:
        DataError: a file is missing, empty or unreadable; or a row is bad ("file:line: what; remedy") and `on_reject` is None.
    """
    for path in paths:
        if not source_is_there(path):
            raise DataError(missing_source_message(path))
    for path in paths:
        empty = True
        for line, row in hub_rows(path) if is_hub_name(path) else _raw_rows(Path(path)):
            empty = False
            source_location = f"{path}:{line}"
            try:
                if isinstance(row, BadRow):
                    raise row
                items = convert(row, source_location)
            except BadRow as problem:
                error = DataError(f"{source_location}: {one_line(problem)}")
                if on_reject is None:
                    raise error from None
                on_reject(error, None if isinstance(row, BadRow) else row)
                continue
            yield from items
        if empty:
            raise DataError(f"{path}: no rows. Give a file with one row a line.")


def _raw_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, the parsed row, or the BadRow that tells why it cannot be parsed); a Parquet row counts as a line."""
    name = path.name.removesuffix(".gz")
    if name.endswith((".parquet", ".pq")):
        yield from _parquet_rows(path)
        return
    line = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as handle:
            is_array = name.endswith(".json") and _first_byte(handle) == b"["
            for line, row in _array_rows(path, handle.read()) if is_array else _line_rows(handle):
                yield line, row
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}:{line + 1}: not a whole gzip file ({error}). Copy or download it again.") from None
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path}:{line + 1}: cannot be read ({reason}). Check its permissions and the disk.") from None


def _first_byte(handle) -> bytes:
    """First byte after white space and byte-order mark; leaves the handle at the start of the file."""
    head = handle.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    handle.seek(0)
    return head[:1]


def _line_rows(handle) -> Iterator[tuple[int, Any]]:
    number = 0
    while raw := handle.readline(LONGEST_LINE + 1):
        number += 1
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if len(raw) > LONGEST_LINE:
            while not raw.endswith(b"\n") and (raw := handle.readline(LONGEST_LINE)):
                pass
            yield number, BadRow(f"longer than {LONGEST_LINE >> 20} MiB. Write one JSON object a line.")
        elif raw.strip():
            yield number, _row_of_line(raw, number)


def _row_of_line(raw: bytes, number: int) -> Any:
    try:
        return _DECODER.decode(raw.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 (byte {raw[error.start]:#04x} at column {error.start + 1}). Save it as UTF-8.")
    except json.JSONDecodeError as error:
        hint = " A JSON array must be in a file named .json." if number == 1 and raw.lstrip()[:1] == b"[" else ""
        return BadRow(f"not valid JSON: {error.msg} at column {error.colno}. Write one JSON object a line.{hint}")
    except BadRow as problem:
        return problem
    except (ValueError, RecursionError) as error:
        return BadRow(_beyond_json(error))


def _beyond_json(error: Exception) -> str:
    what = "nested too deeply" if isinstance(error, RecursionError) else "it holds a number of thousands of digits"
    return f"not JSON that can be read: {what}. Fix or remove the row."


def _unique_names(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a name that occurs twice is refused, because parsers differ in which of the two they keep."""
    row = dict(fields)
    if len(row) < len(fields):
        (name, _), *_ = Counter(name for name, _ in fields).most_common(1)
        raise BadRow(f"field '{name}' is given more than once. Keep the one that counts.")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_names)


def _array_rows(path: Path, raw: bytes) -> Iterator[tuple[int, Any]]:
    """Rows of a JSON array with the lines they begin on, which is why the array is parsed row by row.

    A row that is not JSON cannot be skipped, because its end is unknown.
    """
    try:
        text = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 (byte {raw[error.start]:#04x}). Save it as UTF-8.") from None
    line, counted = 1, 0
    position = _skip_space(text, text.index("[") + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, end = _element(text, position)
        except json.JSONDecodeError as error:
            raise _broken_array(path, text, error.msg, error.pos) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: {_beyond_json(error)}") from None
        yield line, row
        position = _skip_space(text, end)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            raise _broken_array(path, text, "Expecting ',' or ']'", position)
    position = _skip_space(text, position + 1)
    if position < len(text):
        raise _broken_array(path, text, "Expecting nothing after the array", position)


def _element(text: str, position: int) -> tuple[Any, int]:
    """(the row, or the BadRow that tells why it cannot be used although it is JSON; the position after it)."""
    try:
        return _DECODER.raw_decode(text, position)
    except BadRow as problem:
        return problem, json.JSONDecoder().raw_decode(text, position)[1]


def _broken_array(path: Path, text: str, message: str, position: int) -> DataError:
    error = json.JSONDecodeError(message, text, position)
    where = f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}."
    return DataError(f"{where} Fix the array, or write one JSON object a line.")


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
    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
        if number != file.metadata.num_rows:
            raise ValueError(f"{number} of {file.metadata.num_rows} rows found")
    # For a damaged file pyarrow raises nearly anything, such as MemoryError for a wrong length.
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError) as error:
        raise DataError(f"{path}:{number + 1}: not a readable Parquet file ({error}). Download it again.") from None
