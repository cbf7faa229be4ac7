"""integrity.json: size and CRC-32 of every file of a checkpoint, written with it and compared when it is read.

CRC-32 (zlib's) finds every burst of up to 32 wrong bits, and misses other damage once in 4e9 times; sizes find what is cut
off.  Of the checksums that Python brings along it is the cheapest (examples/docs/faults.md has the figures).  Shards are summed
while they are written; what is written beside them, and everything when it is read, is read once more.
"""

from __future__ import annotations

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Iterable

from gram_engine.errors import CheckpointError
from gram_engine.files import fsync, write_atomically

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

INTEGRITY = "integrity.json"
METADATA = ".metadata"
REQUIRED = (METADATA, "metadata.json", "common.pt")
BLOCK_BYTES = 1 << 22


class DamagedCheckpoint(CheckpointError):
    """Files of a checkpoint are missing, cut off or changed; another checkpoint may be whole."""


class SummedFile:
    """A file that is written front to back; `entry` is its entry in integrity.json, and it is on disk when it is closed."""

    def __init__(self, path: str | Path):
        self.handle: IO[bytes] = open(path, "wb")
        self.bytes = self.crc32 = 0
        self.failure: OSError | None = None

    def __enter__(self) -> SummedFile:
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
        except OSError as error:  # torch.save makes a RuntimeError of it that does not say what happened
            self.failure = error
            raise

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        self.handle.flush()

    @property
    def entry(self) -> dict:
        return _entry(self.bytes, self.crc32)


def entry_of(path: Path) -> dict:
    """Size and checksum of a file that is there."""
    size = checksum = 0
    with open(path, "rb", buffering=0) as handle:
        while block := handle.read(BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
            size += len(block)
    return _entry(size, checksum)


def _entry(size: int, checksum: int) -> dict:
    return {"bytes": size, "crc32": f"{checksum:08x}"}


def seal(folder: Path, known: dict[str, dict], threads: int = 1) -> None:
    """Write integrity.json and bring all that lies in `folder` to disk.

    Args:
        known: entries of files that were summed, and brought to disk, when they were written.
        threads: files to read at the same time.
    """
    others = sorted(set(_files(folder)) - set(known) - {INTEGRITY})
    with ThreadPoolExecutor(threads) as pool:
        entries = dict(zip(others, pool.map(lambda name: entry_of(folder / name), others)))
    for name in others:
        fsync(folder / name)
    files = dict(sorted((known | entries).items()))
    with write_atomically(folder / INTEGRITY) as handle:
        json.dump({"files": files, "crc32": _checksum_of(files)}, handle, indent=1)
    for place in (*(entry for entry in folder.rglob("*") if entry.is_dir()), folder):
        fsync(place)


def _files(folder: Path) -> Iterable[str]:
    return (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def verify(checkpoint: Path, part: int = 0, parts: int = 1, threads: int = 1) -> bool:
    """Compare a checkpoint's files with integrity.json.

    Args:
        part, parts: with several processes, each compares its share of the files.
        threads: files to read at the same time.

    Returns:
        False for a checkpoint from before there were checksums: only that its files are there was looked at.

    Raises:
        DamagedCheckpoint: with the names of missing, cut off and changed files.
    """
    if not checkpoint.is_dir():
        raise DamagedCheckpoint(f"{checkpoint}: the folder is missing.")
    absent = [name for name in REQUIRED if not (checkpoint / name).is_file()]
    if absent:
        raise DamagedCheckpoint(f"{checkpoint}: {', '.join(absent)} missing.")
    if not (checkpoint / INTEGRITY).is_file():
        return False
    entries = _read_entries(checkpoint / INTEGRITY)
    largest_first = sorted(entries, key=lambda name: (-entries[name]["bytes"], name))
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda name: _problem(checkpoint / name, entries[name]), largest_first[part::parts])
        problems = sorted(filter(None, found))
    if problems:
        raise DamagedCheckpoint(f"{checkpoint}: {', '.join(problems[:5])}{' ...' * (len(problems) > 5)}.")
    return True


def check_extents(checkpoint: Path, metadata: Metadata) -> None:
    """Of a checkpoint without checksums: that its shards are there and as long as its .metadata says.

    Raises:
        DamagedCheckpoint: with the name of a missing or cut off shard.
    """
    ends: dict[str, int] = {}
    for stored in metadata.storage_data.values():
        ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
    for name, end in sorted(ends.items()):
        if not (checkpoint / name).is_file():
            raise DamagedCheckpoint(f"{checkpoint}: {name} is missing.")
        size = (checkpoint / name).stat().st_size
        if size < end:
            raise DamagedCheckpoint(f"{checkpoint}: {name} has {size} bytes, not {end}.")


def _read_entries(path: Path) -> dict[str, dict]:
    try:
        content = json.loads(path.read_bytes())
        if content["crc32"] != _checksum_of(content["files"]):
            raise ValueError("its own checksum differs")
        return {str(name): _entry(int(entry["bytes"]), int(entry["crc32"], 16)) for name, entry in content["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({error!r}).") from None


def _checksum_of(files: dict) -> str:
    return f"{zlib.crc32(json.dumps(files, sort_keys=True).encode()):08x}"


def _problem(path: Path, expected: dict) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path.name} has {size} bytes, not {expected['bytes']}"
        if entry_of(path) != expected:
            return f"{path.name} was changed after it was written (its checksum differs)"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error})"
    return None
