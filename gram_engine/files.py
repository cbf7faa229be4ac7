"""Files that are whole or absent: write to a temporary name, fsync, rename. Small files, read with errors that name them.

Sources of data are files, and data sets of the Hugging Face hub by name (`hf:NAME` or `hf:NAME:SPLIT`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Iterator

import yaml

from gram_engine.errors import ConfigError, GramError

SPARE_BYTES = 64 << 20
"""Free space that small files (headers, tokenizer, metadata) may need beside the tensors."""
HUB = "hf:"
"""What the name of a data set of the hub begins with."""


@contextmanager
def write_atomically(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside `path`; rename it to `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, **({} if "b" in mode else {"encoding": "utf-8"})) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fsync(path: str | Path) -> None:
    """Wait until a file's content, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_free_space(folder: Path, nbytes: int, error: type[GramError], subject: str, remedy: str) -> None:
    """Refuse to write `nbytes` of tensors to `folder`, which need not exist yet, if the disk has too little space.

    Raises:
        error: "subject: ... are needed, ... free. remedy".
    """
    while not folder.exists():
        folder = folder.absolute().parent
    needed, free = nbytes + SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise error(f"{subject}: {needed / 1e9:.2f} GB are needed, {folder} has {free / 1e9:.2f} GB free. {remedy}")


def sha256_of_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_json(path: str | Path, error: type[GramError], remedy: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        error: the file cannot be read, is not JSON, or holds something other than an object; the text ends in `remedy`.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{path}: not valid JSON ({problem}). {remedy}") from None
    if not isinstance(content, dict):
        raise error(f"{path}: holds a {type(content).__name__}, not a JSON object. {remedy}")
    return content


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as JSON, atomically; nan, which JSON does not have, becomes null."""
    with write_atomically(path) as handle:
        json.dump(_without_nan(content), handle, indent=1)
        handle.write("\n")


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds; nothing in it is run.

    Raises:
        ConfigError: the file cannot be read, or is not YAML.
    """
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as problem:
        raise ConfigError(f"{path}: not valid YAML: {problem}") from None


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Let one process at a time run the block; others wait. Leaves an empty file at `path`.

    File systems without locks (some of clusters) let all of them in.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as handle:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield

def is_hub_name(source: str | Path) -> bool:
    """Whether a source is `hf:NAME`, not a file."""
    return str(source).startswith(HUB)


def source_is_there(source: str | Path) -> bool:
    """Whether a source can be opened; of the hub's data sets this shows only when they are read."""
    try:
        return is_hub_name(source) or Path(source).is_file()
    except OSError:  # a name too long
        return False


def missing_source_message(source: str | Path) -> str:
    """What to tell of a source that is not there."""
    if os.path.isdir(source):
        return f"{source}: a folder. Give the files in it, such as {source}/*.jsonl."
    return f"{source}: no such file. Check the path, and the working directory if it is relative."
