"""Reads and writes safetensors files tensor by tensor, with only one tensor in memory.

The safetensors package maps whole files for reading, and needs all tensors of a file at once for writing.  The format: eight
bytes with the length of the header, a JSON header (name -> dtype, shape, data_offsets), and the bytes of the tensors.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import torch
from torch import Tensor

from gram_engine.errors import CheckpointError, one_line

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LONGEST_HEADER = 100 << 20
BLOCK_BYTES = 64 << 20
"""Size of the blocks that are converted and written."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class SafetensorsReader:
    """Reads tensors of one file, or rows and columns of them.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors (tensors overlap, leave gaps or end outside the
            file), or a tensor has a dtype other than DTYPES.
    """

    def __init__(self, path: Path):
        self.path = path
        self.entries = dict(self._read_header())

    def read(self, name: str, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None) -> Tensor:
        """A copy of a tensor, or of the half-open ranges `rows` and `columns` (of a matrix) of it."""
        entry = self.entries[name]
        first, end = rows or (0, entry.shape[0])
        width = entry.nbytes // max(entry.shape[0], 1)
        item = entry.dtype.itemsize
        if columns is None or columns == (0, entry.shape[-1]):
            count = (end - first) * width
            data = np.fromfile(self.path, dtype=np.uint8, count=count, offset=entry.start + first * width)
            shape = (end - first, *entry.shape[1:])
        else:
            mapped = np.memmap(self.path, np.uint8, "r", entry.start, (entry.shape[0], width))
            data = np.ascontiguousarray(mapped[first:end, columns[0] * item : columns[1] * item]).reshape(-1)
            shape = (end - first, columns[1] - columns[0])
        return torch.from_numpy(data).view(entry.dtype).view(shape) if data.size else torch.empty(shape, dtype=entry.dtype)

    def _read_header(self) -> Iterator[tuple[str, Entry]]:
        try:
            size = self.path.stat().st_size
            with open(self.path, "rb") as handle:
                length = int.from_bytes(handle.read(8), "little")
                if not 2 <= length <= min(LONGEST_HEADER, size - 8):
                    raise ValueError("its header is cut off or invalid")
                header = json.loads(handle.read(length))
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: no such file. Download the folder again.") from None
        except (OSError, ValueError, RecursionError) as error:
            raise self._damaged(str(error)) from None
        if not isinstance(header, dict):
            raise self._damaged("its header is no object")
        header.pop("__metadata__", None)
        found = [(name, *self._entry(name, described, 8 + length)) for name, described in header.items()]
        position = 8 + length
        for name, entry, end in sorted(found, key=lambda item: (item[1].start, item[2])):
            if entry.start != position:  # like the safetensors package: no gap, no overlap, no bytes after the last
                raise self._damaged(f"{name} does not begin where the tensor before it ends")
            position = end
        if position != size:
            raise self._damaged("it is cut off" if position > size else f"{size - position:,} bytes follow its last tensor")
        for name, entry, _ in found:
            yield name, entry

    def _entry(self, name: str, described: Any, first: int) -> tuple[Entry, int]:
        """(entry, offset of the end) of a tensor; `first` is the offset of the first tensor's first byte."""
        try:
            dtype, shape, (start, end) = described["dtype"], described["shape"], described["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise self._damaged(f"{name} has no dtype, shape and data_offsets") from None
        valid = isinstance(shape, list) and len(shape) <= 8
        if not valid or not all(type(number) is int and 0 <= number < 1 << 62 for number in (*shape, start, end)):
            raise self._damaged(f"{name} has no shape and offsets of whole numbers")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise CheckpointError(f"{self.path}: {name} is {dtype!r:.20}; the engine reads {', '.join(DTYPES)}.")
        entry = Entry(DTYPES[dtype], tuple(shape), first + start)
        if end - start != entry.nbytes:
            raise self._damaged(f"{name} has {end - start} bytes for the shape {shape}")
        return entry, first + end

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not a whole safetensors file ({one_line(what)}). Download it again.")


class SafetensorsWriter:
    """Writes one file; `shapes` gives its tensors in the order of the calls of `write`.

    The file gets its name in `close`, after fsync.
    """

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype):
        self.path, self.dtype = path, dtype
        self._left = list(shapes.items())
        header, position = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in shapes.items():
            size = Entry(dtype, shape, 0).nbytes
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
            position += size
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._handle = open(self._temporary, "wb")
        self._handle.write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor, converted to the file's dtype."""
        wanted = self._left.pop(0)
        assert (name, tuple(tensor.shape)) == wanted, f"{name} {tuple(tensor.shape)}, not {wanted}"
        rows = max(BLOCK_BYTES * len(tensor) // max(tensor.nbytes, 1), 1)
        for block in tensor.split(rows):
            block.to(self.dtype).contiguous().view(torch.uint8).numpy().tofile(self._handle)

    def close(self) -> None:
        """Finish the file after the last tensor, and give it its name."""
        assert not self._left, f"not written: {self._left}"
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._handle.close()
        os.replace(self._temporary, self.path)
