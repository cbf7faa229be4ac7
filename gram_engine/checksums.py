"""CRC-32 checksums of files and of JSON, to check data sets (data/integrity.py) and checkpoints (checkpoint/integrity.py).

CRC-32 detects every burst of up to 32 wrong bits, and misses other damage once in 4e9 times; the size of a file, stored beside
it, shows what is cut off.  zlib computes it at about the speed of a disk (examples/docs/faults.md compares it with others) and
releases the interpreter lock meanwhile.  It is no protection against an attacker, who can change the stored checksum too.
"""

from __future__ import annotations

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

PIECE_BYTES = 1 << 20


def crc32_of_json(content: Any) -> str:
    """Checksum of a JSON value, whatever the order of its keys: eight hexadecimal digits, as below."""
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def crc32_of_blocks(path: str | Path, block_bytes: int) -> list[str]:
    """Checksum of each block of a file, computed by as many threads as there are cores (at most 8); [] for an empty file."""
    with open(path, "rb", buffering=0) as handle:
        descriptor, size = handle.fileno(), os.fstat(handle.fileno()).st_size
        blocks = [(start, min(start + block_bytes, size)) for start in range(0, size, block_bytes)]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(lambda block: _crc32_of_range(descriptor, *block), blocks))


def file_entry(path: str | Path) -> dict[str, Any]:
    """{"bytes": size, "crc32": checksum} of a whole file."""
    with open(path, "rb", buffering=0) as handle:
        size = os.fstat(handle.fileno()).st_size
        return {"bytes": size, "crc32": _crc32_of_range(handle.fileno(), 0, size)}


def _crc32_of_range(descriptor: int, start: int, end: int) -> str:
    checksum = 0
    while start < end:
        piece = os.pread(descriptor, min(PIECE_BYTES, end - start), start)
        if not piece:
            break  # the file has become shorter meanwhile, which the checksum shows
        checksum, start = zlib.crc32(piece, checksum), start + len(piece)
    return f"{checksum:08x}"


class ChecksummedFile:
    """A file written from front to back, whose checksum is computed meanwhile; closing it waits until it is on disk."""

    def __init__(self, path: str | Path):
        self.handle: IO[bytes] = open(path, "wb")
        self.bytes = self.crc32 = 0
        self.failure: OSError | None = None

    def __enter__(self) -> ChecksummedFile:
        return self

    def __exit__(self, error, *_) -> None:
        with self.handle:
            if self.failure:
                raise self.failure from None
            if error is None:
                self.handle.flush()
                os.fsync(self.handle.fileno())

    def write(self, data) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        self.bytes += memoryview(data).nbytes
        try:
            return self.handle.write(data)
        except OSError as error:  # torch.save would raise a RuntimeError instead, which does not name the cause
            self.failure = error
            raise

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        self.handle.flush()

    @property
    def entry(self) -> dict[str, Any]:
        """As `file_entry`, of what has been written."""
        return {"bytes": self.bytes, "crc32": f"{self.crc32:08x}"}
