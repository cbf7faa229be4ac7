"""integrity.json: size and CRC-32 of every file of a checkpoint, written with it and compared before it is loaded.

The checksums of shards are computed while they are written; the other files, and everything on loading, are read once more.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Iterable

from gram_engine.checksums import crc32_of_json, file_entry
from gram_engine.errors import CheckpointError
from gram_engine.files import fsync, write_atomically

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

INTEGRITY = "integrity.json"
METADATA = ".metadata"
REQUIRED = (METADATA, "metadata.json", "common.pt")


class DamagedCheckpoint(CheckpointError):
    """Files of a checkpoint are missing, cut off or changed; another checkpoint of the run may be intact."""


def seal(folder: Path, known: dict[str, dict], threads: int = 1) -> None:
    """Write integrity.json, and wait until everything in `folder` is on disk.

    Args:
        known: entries of files whose checksums were computed while they were written, and which are on disk.
        threads: number of files to read at the same time.
    """
    others = sorted(set(_files(folder)) - set(known) - {INTEGRITY})
    with ThreadPoolExecutor(threads) as pool:
        entries = dict(zip(others, pool.map(lambda name: file_entry(folder / name), others)))
    for name in others:
        fsync(folder / name)
    files = dict(sorted((known | entries).items()))
    with write_atomically(folder / INTEGRITY) as handle:
        json.dump({"files": files, "crc32": crc32_of_json(files)}, handle, indent=1)
    for subfolder in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        fsync(subfolder)


def _files(folder: Path) -> Iterable[str]:
    return (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def verify(checkpoint: Path, part: int = 0, parts: int = 1, threads: int = 1) -> bool:
    """Compare a checkpoint's files with integrity.json.

    Args:
        part, parts: of several processes, each compares its share of the files.
        threads: number of files to read at the same time.

    Returns:
        False for a checkpoint without integrity.json, saved before there were checksums: only REQUIRED files were looked for.

    Raises:
        DamagedCheckpoint: names the missing, cut off and changed files.
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
    """Check a checkpoint without integrity.json: its shards exist and are as long as its .metadata requires.

    Raises:
        DamagedCheckpoint: names a missing or cut off shard.
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
        if content["crc32"] != crc32_of_json(content["files"]):
            raise ValueError("its own checksum differs")
        entries = content["files"].items()
        return {str(name): {"bytes": int(entry["bytes"]), "crc32": str(entry["crc32"])} for name, entry in entries}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({error!r}).") from None


def _problem(path: Path, expected: dict) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path.name} has {size} bytes, not {expected['bytes']}"
        if file_entry(path) != expected:
            return f"{path.name} was changed after it was written (its checksum differs)"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error})"
    return None
