"""Results of a long job written line by line, so that a killed job goes on where it was: no line lost, none twice."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Iterable

from gram_engine.files import sha256_of_file, write_atomically


class ResumableLines:
    """JSON lines that become `path` when they are complete; until then `path`.partial and what they depend on beside it.

    Args:
        path: the file to make.
        depends_on: what the lines are made of; a partial file of something else is not gone on with.
    """

    def __init__(self, path: str | Path, depends_on: dict[str, Any]):
        self.path = Path(path)
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._origin = self.path.with_name(self.path.name + ".partial.json")
        if self._read_origin() != depends_on:
            self._partial.unlink(missing_ok=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(self._origin) as handle:
            json.dump(depends_on, handle)
        self.done = self._whole_lines()

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Add lines as they come, and give the file its name behind the last."""
        with open(self._partial, "a", encoding="utf-8") as handle:
            for line in lines:
                handle.write(json.dumps(line, ensure_ascii=False) + "\n")
                handle.flush()
            os.fsync(handle.fileno())
        os.replace(self._partial, self.path)
        self._origin.unlink()

    def earlier(self) -> list[dict[str, Any]]:
        """The lines of the job before it was killed."""
        if not self._partial.exists():
            return []
        return [json.loads(line) for line in self._partial.read_text(encoding="utf-8").splitlines()]

    def _read_origin(self) -> Any:
        try:
            return json.loads(self._origin.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _whole_lines(self) -> int:
        """Count the whole lines, and cut off what follows: a line that was being written, or one that was damaged."""
        if not self._partial.exists():
            return 0
        count = size = 0
        for line in self._partial.read_bytes().splitlines(keepends=True):
            if not (line.endswith(b"\n") and _is_object(line)):
                os.truncate(self._partial, size)
                break
            count, size = count + 1, size + len(line)
        return count


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def origin(inputs: Iterable[str], model: str, **settings: Any) -> dict[str, Any]:
    """What scores depend on: the input files' and the model's content, and settings."""
    weights = sorted(Path(model).glob("*.safetensors"))
    files = {file: sha256_of_file(file) for file in inputs if Path(file).is_file()}
    described = {str(file.name): [file.stat().st_size, file.stat().st_mtime_ns] for file in weights}
    gram = Path(model) / "gram_config.json"
    return {"inputs": files, "weights": described, "gram": sha256_of_file(gram) if gram.is_file() else None, **settings}
