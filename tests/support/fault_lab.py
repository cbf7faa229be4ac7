"""Tools of tests/support/faults.py: checkpoints to damage, a trap at the n-th file system call, and the check afterwards."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator

from tests.support.hand_made import in_child, load, manifest_and_tokenizer, meant, quick_run_config_of, save, with_flags

LONG = os.environ.get("GRAM_FAULTS") == "long"


@dataclass(frozen=True)
class Fault:
    """One kind of fault. `inject(lab)` tries all its cases and yields the outcome of each; it raises if a state is lost."""

    name: str
    how: str
    at_least: int
    inject: Callable[[Lab], Iterator[str]]


class Lab:
    """A folder with intact checkpoints of steps 1 and 2; every case gets a copy of it."""

    def __init__(self, folder: Path, config):
        self.folder, self.config = folder, config
        self.base = folder / "base"
        manifest_and_tokenizer(config.data.data_path, config.data.tokenizer_model)  # once here, not in every child
        _, self.meant = in_child(self._prepare)
        quick_run_config_of(self.base / "iter_0000001")

    def _prepare(self) -> dict:
        for step in (1, 2):
            save(with_flags(self.config, self.base), step)
        return {(step, seed): meant(self.config, step, seed) for step in range(12) for seed in (0, 1)}

    def copy(self) -> Path:
        return Path(shutil.copytree(self.base, Path(tempfile.mkdtemp(dir=self.folder)) / "run"))

    def flags(self, folder: Path, **options):
        return with_flags(self.config, folder, **options)

    def check(self, folder: Path, allowed: dict[str, str]) -> str:
        """In a forked child: check that one of the `allowed` states {digest: name} is loaded, that no damaged checkpoint looks
        intact, and that saving works again. Returns the name of the state."""
        from gram_engine.checkpoint.folder import candidates
        from gram_engine.checkpoint.integrity import verify

        found = load(self.flags(folder))[0]
        assert found in allowed, f"{folder}: lost"
        assert all(verify(path) for path in candidates(folder)), f"{folder}: a damaged checkpoint looks intact"
        save(self.flags(folder), 9)
        assert load(self.flags(folder))[0] == self.meant[9, 0]
        assert not [path for path in folder.iterdir() if path.suffix in (".tmp", ".old")], f"{folder}: leftovers"
        shutil.rmtree(folder.parent)
        return allowed[found]

    def check_all(self, cases: list[tuple[Path, dict[str, str]]]) -> list[str]:
        """`check` each case; ten share a child."""
        chunks = [cases[first : first + 10] for first in range(0, len(cases), 10)]
        return [name for chunk in chunks for name in in_child(lambda chunk=chunk: [self.check(*case) for case in chunk])[1]]

    def before_or_new(self, step: int = 3, seed: int = 0) -> dict[str, str]:
        return {self.meant[2, 0]: "the step before", self.meant[step, seed]: "the new step"}


class Trap:
    """Springs at the n-th call that changes something in a folder: open for writing, write, fsync, mkdir, rename, remove.

    Set it in a forked child only: Python's audit hooks cannot be removed.
    """

    def __init__(self, folder: Path, only_in_children: bool = False):
        self.folder, self.only_in_children = str(folder), only_in_children
        self.process, self.seen, self.at, self.spring = os.getpid(), 0, None, None
        sys.addaudithook(self._hook)
        self._watch_fsync_and_writes()

    def set(self, folder: Path, at: int | None, spring: Callable[[str], None] | None) -> None:
        self.folder, self.seen, self.at, self.spring = str(folder), 0, at, spring

    def _watch_fsync_and_writes(self) -> None:
        from gram_engine.checksums import ChecksummedFile

        fsync, begin = os.fsync, ChecksummedFile.__init__

        def watched_fsync(descriptor):
            self._count("fsync")
            fsync(descriptor)

        def watched_begin(file, path):
            begin(file, path)
            file.handle = WatchedHandle(file.handle, self._count)

        os.fsync, ChecksummedFile.__init__ = watched_fsync, watched_begin

    def _hook(self, event: str, args: tuple) -> None:
        if self.at is not None and self._changes(event, args):
            self._count(event)

    def _changes(self, event: str, args: tuple) -> bool:
        if event == "open":
            return str(args[0]).startswith(self.folder) and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if event in ("os.mkdir", "os.rename"):
            return str(args[0]).startswith(self.folder)
        # shutil.rmtree gives names relative to the folder's descriptor
        return event in ("os.remove", "os.rmdir") and (str(args[0]).startswith(self.folder) or args[-1] != -1)

    def _count(self, event: str) -> None:
        if self.at is None or (self.only_in_children and os.getpid() == self.process):
            return
        self.seen += 1
        if self.seen == self.at:
            self.spring(event)
        elif self.seen > self.at and getattr(self.spring, "stays", False):
            self.spring(event)


class WatchedHandle(io.BufferedWriter):
    """A file whose writes fail, or kill the process, when half of the data is written."""

    def __init__(self, handle, count: Callable[[str], None]):
        super().__init__(handle.detach(), buffer_size=1)
        self.count = count

    def write(self, data) -> int:
        half = len(data) // 2
        if half < 32:  # padding and such
            return super().write(data)
        written = super().write(memoryview(data)[:half])
        self.count("write")
        return written + super().write(memoryview(data)[half:])


def die(_event: str) -> None:
    """As kill -9: nothing is flushed or cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full(event: str) -> None:
    if event in ("open", "write", "os.mkdir", "fsync"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


disk_full.stays = True


def io_error(_event: str) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def calls_of(lab: Lab, task: Callable[[Path], None], only_in_children: bool = False) -> int:
    """Number of calls of a task at which a trap can spring."""

    def count() -> int:
        folder = lab.copy()
        trap = Trap(folder, only_in_children)
        trap.set(folder, -1, None)
        task(folder)
        return trap.seen

    return in_child(count)[1]
