"""Results of a long command, written line by line, so that an interrupted command resumes without losing or repeating one.

Several processes (torchrun) share the rows out by length; each writes the lines of its rows to a file of its own, and the first
puts them together in the order of the input. A command may resume with another number of processes.
"""

from __future__ import annotations

import json
import os
from glob import escape
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Sequence, TypeVar

from tqdm import tqdm

from gram_engine.errors import DataError
from gram_engine.files import sha256_of_file, write_atomically
from gram_engine.scoring.processes import Processes

T = TypeVar("T")
Line = dict[str, Any]
FORMAT = 2
"""Of partial files: a JSON array [number of the item, line] in each line."""


def write_resumable(
    path: str | Path,
    depends_on: dict[str, Any],
    items: Sequence[T],
    make_lines: Callable[[Sequence[T], Sequence[int]], Iterable[Line]],
    unit: str,
    size: Callable[[T], int],
) -> list[Line]:
    """Write one JSON line for each item to `path`, without making those again that an interrupted command left.

    Args:
        depends_on: what the lines are made of (`fingerprint`); lines made of something else are discarded.
        make_lines: yields the lines of some items, in their order, given those items and their numbers; not called if there
            are none.
        unit: what the progress bar counts.
        size: characters of an item, by which several processes share the items out.

    Returns:
        all lines, in every process.
    """
    processes = Processes(str(path))
    output = ResumableLines(path, processes.rank)
    done = set(processes.from_first("done before", lambda: output.begin({"format": FORMAT, **depends_on})))
    rest = [number for number in range(len(items)) if number not in done]
    own = processes.own_part(rest, [size(items[number]) for number in rest])
    hidden = None if processes.is_first else True  # None: where there is no terminal
    with tqdm(total=len(items), initial=len(items) - len(rest), unit=f" {unit}", disable=hidden) as bar:

        def show(done_now: int) -> None:
            bar.update(len(items) - len(rest) + done_now - bar.n)

        lines = make_lines([items[number] for number in own], own) if own else ()
        for _ in output.append(zip(own, lines, strict=True)):
            show(processes.add_done(1))
        processes.wait_for_done(len(rest), show)
    processes.from_first("complete", lambda: output.complete(len(items)))
    processes.wait_for_all()
    with open(path, encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


class ResumableLines:
    """JSON lines that become `path` when they are complete; until then each process keeps its own in `path`.partial*.

    Args:
        path: the file to make.
        rank: number of this process; the first one calls `begin` and `complete`.
    """

    def __init__(self, path: str | Path, rank: int = 0):
        self.path = Path(path)
        self._first = self._beside("partial")
        self._own = self._beside(f"partial.{rank}") if rank else self._first
        self._origin = self._beside("partial.json")

    def begin(self, depends_on: dict[str, Any]) -> list[int]:
        """Gather the lines of an interrupted command in one file; returns the numbers of their items.

        An incomplete or damaged line and all after it in the same file are dropped, and everything if it depends on something
        else than `depends_on`, which is kept in `path`.partial.json.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = self._read_parts() if _read_json(self._origin) == depends_on else {}
        with write_atomically(self._first) as handle:
            handle.writelines(map(_numbered, kept.items()))
        for part in self._parts():
            if part != self._first:
                part.unlink()
        with write_atomically(self._origin) as handle:
            json.dump(depends_on, handle)
        return list(kept)

    def append(self, lines: Iterable[tuple[int, Line]]) -> Iterator[int]:
        """Write each (number, line) as it comes, and yield the number."""
        with open(self._own, "a", encoding="utf-8") as handle:
            for number, line in lines:
                handle.write(_numbered((number, line)))
                handle.flush()
                yield number
            os.fsync(handle.fileno())

    def complete(self, count: int) -> None:
        """Write the lines of all processes to `path`, in the order of their numbers, and remove the partial files.

        Raises:
            DataError: one of the `count` lines is missing.
        """
        found = self._read_parts()
        missing = next((number for number in range(count) if number not in found), None)
        if missing is not None:
            raise DataError(
                f"{self.path}: the line of row {missing} is missing in the partial files. All processes must see one folder; "
                "rerun the command to make the missing lines."
            )
        with write_atomically(self.path) as handle:
            handle.writelines(json.dumps(found[number], ensure_ascii=False) + "\n" for number in range(count))
        self._origin.unlink()
        for part in self._parts():
            part.unlink()

    def _beside(self, ending: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{ending}")

    def _parts(self) -> list[Path]:
        found = self.path.parent.glob(f"{escape(self.path.name)}.partial*")
        return sorted(part for part in found if part != self._origin)

    def _read_parts(self) -> dict[int, Line]:
        return {number: line for part in self._parts() for number, line in _whole_lines(part)}


def _numbered(line: tuple[int, Line]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def _whole_lines(part: Path) -> Iterator[tuple[int, Line]]:
    for text in part.read_bytes().splitlines(keepends=True):
        try:
            number, line = json.loads(text)
        except (ValueError, TypeError, RecursionError):
            return
        if not (text.endswith(b"\n") and type(number) is int and isinstance(line, dict)):
            return
        yield number, line


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def fingerprint(inputs: Iterable[str], model: str, **settings: Any) -> dict[str, Any]:
    """What scores depend on: checksums of the input files, the model's files, and settings."""
    files = {file: sha256_of_file(file) for file in inputs if Path(file).is_file()}
    weights = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(Path(model).glob("*.safetensors"))}
    gram = Path(model) / "gram_config.json"
    return {"inputs": files, "weights": weights, "gram": sha256_of_file(gram) if gram.is_file() else None, **settings}
