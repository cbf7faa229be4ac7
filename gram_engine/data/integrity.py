"""Integrity of preprocessed files: sizes, checksums and index values, checked when the data is opened.

The manifest holds the size of each file and the CRC-32 of each of its blocks, and a CRC-32 of itself.  Blocks are read in
parallel and show where the damage is.  Whoever can change the data can change its checksums too (checksums.py), so index
values are checked as well before megatron-core uses them.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from gram_engine.checksums import crc32_of_blocks, crc32_of_json
from gram_engine.errors import DataError

TOKENS, INDEX, SAMPLES = ".bin", ".idx", ".samples.npy"
ENDINGS = (TOKENS, INDEX, SAMPLES)
BLOCK_BYTES = 64 << 20
SEAL = "checksum"
AGAIN = "Preprocess the data again: gram preprocess --data FILE --output-prefix PREFIX."
"""The remedy in all errors of this module."""

# megatron-core's index: magic, version, dtype code, sequences, documents (one more than there are).
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_ITEM_BYTES = {4: 4, 8: 2}  # int32 and uint16, what IndexedDataset takes for token ids


def describe_files(prefix: str | Path) -> dict[str, dict[str, Any]]:
    """Size and block checksums of the files behind `prefix`, for the manifest."""
    found = {}
    for ending in ENDINGS:
        path = Path(f"{prefix}{ending}")
        found[ending] = {"bytes": path.stat().st_size, "crc32": " ".join(crc32_of_blocks(path, BLOCK_BYTES))}
    return found


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a checksum of its own."""
    return {**manifest, SEAL: crc32_of_json(manifest)}


def check_seal(path: Path, manifest: dict[str, Any]) -> None:
    """Raise DataError if a manifest has changed since `sealed` added its checksum."""
    content = {name: value for name, value in manifest.items() if name != SEAL}
    if manifest.get(SEAL) != crc32_of_json(content):
        raise DataError(f"{path}: was changed after it was written (its checksum differs). {AGAIN}")


def check_files(prefix: str | Path, described: dict[str, dict[str, Any]], whole: bool) -> None:
    """Compare the files behind `prefix` with the manifest's entry `files`.

    Args:
        whole: also read the tokens; otherwise only their size is compared.

    Raises:
        DataError: names the first file that is missing, of another size, or altered.
    """
    for ending in ENDINGS:
        path, wanted = Path(f"{prefix}{ending}"), described[ending]["bytes"]
        if not path.is_file():
            raise DataError(f"{path}: no such file. {AGAIN}")
        size = path.stat().st_size
        if size != wanted:
            what = "cut off" if size < wanted else "longer"
            raise DataError(f"{path}: {what}: has {size:,} bytes, not {wanted:,} as when it was written. {AGAIN}")
    for ending in ENDINGS if whole else (INDEX, SAMPLES):
        path = Path(f"{prefix}{ending}")
        wanted, found = described[ending]["crc32"].split(" "), crc32_of_blocks(path, BLOCK_BYTES)
        if found != wanted:
            block = next((number for number, pair in enumerate(zip(found, wanted)) if pair[0] != pair[1]), 0)
            raise DataError(
                f"{path}: altered, or a file of other data: its bytes from {block * BLOCK_BYTES:,} on (a block of "
                f"{BLOCK_BYTES >> 20} MiB) do not have the checksum in {prefix}.json. {AGAIN}"
            )


def check_index(prefix: str | Path, num_samples: int) -> None:
    """Check each value of PREFIX.idx before megatron-core reads with it.

    Raises:
        DataError: it is not an index of `num_samples` sequences that follow each other and fill PREFIX.bin.
    """
    path = Path(f"{prefix}{INDEX}")
    raw = np.memmap(path, np.uint8, "r") if path.stat().st_size >= _HEADER.size else np.empty(0, np.uint8)

    def refuse(what: str) -> DataError:
        return DataError(f"{path}: {what}. {AGAIN}")

    if not len(raw):
        raise refuse("is too short for an index")
    magic, version, code, sequences, documents = _HEADER.unpack(raw[: _HEADER.size].tobytes())
    if magic != _MAGIC or version != _VERSION or code not in _ITEM_BYTES:
        raise refuse("is no index of token ids")
    if sequences != num_samples or documents != num_samples + 1:
        raise refuse(f"counts {sequences:,} sequences in {documents - 1:,} documents, {prefix}.json {num_samples:,}")
    if len(raw) != _HEADER.size + 4 * sequences + 8 * sequences + 8 * documents:
        raise refuse(f"has {len(raw):,} bytes, too few or too many for {sequences:,} sequences")
    lengths = np.frombuffer(raw, "<i4", sequences, _HEADER.size).astype(np.int64)
    offsets = np.frombuffer(raw, "<i8", sequences, _HEADER.size + 4 * sequences)
    ends = np.cumsum(lengths) * _ITEM_BYTES[code]
    size = Path(f"{prefix}{TOKENS}").stat().st_size
    if lengths.min(initial=1) < 1:
        raise refuse(f"gives sequence {int(np.argmin(lengths)):,} a length of {lengths.min():,} tokens")
    wrong = np.flatnonzero(offsets != ends - lengths * _ITEM_BYTES[code])
    if len(wrong) or (ends[-1] if sequences else 0) != size:
        number = int(wrong[0]) if len(wrong) else sequences - 1
        raise refuse(f"points outside of {TOKENS} or to another place ({size:,} bytes; from sequence {number:,} on)")
    if not np.array_equal(np.frombuffer(raw, "<i8", documents, _HEADER.size + 12 * sequences), np.arange(documents)):
        raise refuse("its documents are not its sequences")
