"""Results of a long command, written line by line, so that an interrupted command resumes without losing or repeating one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Sequence, TypeVar

from tqdm import tqdm

from gram_engine.files import sha256_of_file, write_atomically

T = TypeVar("T")


def write_resumable(
    path: str | Path,
    depends_on: dict[str, Any],
    items: Sequence[T],
    make_lines: Callable[[Sequence[T], int], Iterable[dict[str, Any]]],
    unit: str,
) -> list[dict[str, Any]]:
    """Write one JSON line for each item to `path`, after those that an interrupted command left; returns all lines.

    Args:
        depends_on: what the lines are made of (`fingerprint`); lines made of something else are discarded.
        make_lines: yields the lines of the items that have none yet, given those items and the number of the first; not
            called if there are none.
        unit: what the progress bar counts.
    """
    output = ResumableLines(path, depends_on)
    lines = output.existing()
    rest = items[output.done :]

    def new_lines() -> Iterator[dict[str, Any]]:
        for line in make_lines(rest, output.done) if rest else ():
            lines.append(line)
            bar.update()
            yield line

    with tqdm(total=len(items), initial=output.done, unit=f" {unit}", disable=None) as bar:
        output.append(new_lines())
    return lines


class ResumableLines:
    """JSON lines that become `path` when they are complete; until then they are in `path`.partial.

    Args:
        path: the file to make.
        depends_on: what the lines are made of, kept in `path`.partial.json; a partial file of something else is deleted.
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
        self.done = self._keep_whole_lines()

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Write each line as it comes, and rename the partial file to `path` after the last."""
        with open(self._partial, "a", encoding="utf-8") as handle:
            for line in lines:
                handle.write(json.dumps(line, ensure_ascii=False) + "\n")
                handle.flush()
            os.fsync(handle.fileno())
        os.replace(self._partial, self.path)
        self._origin.unlink()

    def existing(self) -> list[dict[str, Any]]:
        """The lines that the interrupted command wrote."""
        if not self._partial.exists():
            return []
        return [json.loads(line) for line in self._partial.read_text(encoding="utf-8").splitlines()]

    def _read_origin(self) -> Any:
        try:
            return json.loads(self._origin.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _keep_whole_lines(self) -> int:
        """Number of whole lines; cuts off an incomplete or damaged line and all that follows."""
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


def fingerprint(inputs: Iterable[str], model: str, **settings: Any) -> dict[str, Any]:
    """What scores depend on: checksums of the input files, the model's files, and settings."""
    files = {file: sha256_of_file(file) for file in inputs if Path(file).is_file()}
    weights = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(Path(model).glob("*.safetensors"))}
    gram = Path(model) / "gram_config.json"
    return {"inputs": files, "weights": weights, "gram": sha256_of_file(gram) if gram.is_file() else None, **settings}
