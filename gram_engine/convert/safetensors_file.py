"""Safetensors files read and written a piece at a time, so that no tensor but the one in hand is in memory.

The safetensors package maps whole files on reading, and wants all tensors of a file at once on writing.  The format is
eight bytes of header length, a JSON header (name -> dtype, shape, data_offsets), then the tensors' bytes.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gram_engine.errors import CheckpointError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LONGEST_HEADER = 100 << 20
BLOCK_BYTES = 64 << 20
"""Bytes converted and written at a time."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Of its bytes in the file."""

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


class SafetensorsReader:
    """Reads tensors, or rows and columns of them, of one file.

    Raises:
        CheckpointError: the file is missing, cut off, or not safetensors; or holds a dtype that is no float.
    """

    def __init__(self, path: Path):
        self.path = path
        self.entries = dict(self._read_header())

    def read(self, name: str, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None) -> Tensor:
        """A tensor, some rows of it, or some columns of these rows of a matrix: half-open ranges, in memory of its own."""
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

    def _read_header(self):
        try:
            size = self.path.stat().st_size
            with open(self.path, "rb") as handle:
                length = int.from_bytes(handle.read(8), "little")
                if not 2 <= length <= min(LONGEST_HEADER, size - 8):
                    raise ValueError("its header is cut off or not one")
                header = json.loads(handle.read(length))
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: no such file. Download the folder again.") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: not a whole safetensors file ({error}). Download it again.") from error
        header.pop("__metadata__", None)
        for name, described in header.items():
            if described["dtype"] not in DTYPES:
                raise CheckpointError(f"{self.path}: {name} is {described['dtype']}; the engine reads {', '.join(DTYPES)}.")
            start, end = (8 + length + offset for offset in described["data_offsets"])
            entry = Entry(DTYPES[described["dtype"]], tuple(described["shape"]), start)
            if end > size or end - start != entry.nbytes:
                raise CheckpointError(f"{self.path}: not a whole safetensors file ({name} is cut off). Download it again.")
            yield name, entry


class SafetensorsWriter:
    """Writes one file; `shapes` names its tensors in the order in which `write` will get them.

    The file has its final name only after `close`, which syncs it.
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
        """Append a tensor, converted to the file's dtype."""
        wanted = self._left.pop(0)
        assert (name, tuple(tensor.shape)) == wanted, f"{name} {tuple(tensor.shape)}, not {wanted}"
        rows = max(BLOCK_BYTES * len(tensor) // max(tensor.nbytes, 1), 1)
        for block in tensor.split(rows):
            block.to(self.dtype).contiguous().view(torch.uint8).numpy().tofile(self._handle)

    def close(self) -> None:
        """All tensors are written: give the file its name."""
        assert not self._left, f"not written: {self._left}"
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._handle.close()
        os.replace(self._temporary, self.path)
