"""One training at a time in a --save folder, on one machine or on several that share the folder.

    FOLDER/.run_lock/NAME    JSON: which process saves here, and a counter that it raises; every run draws a NAME of its own

Whose record lies in `.run_lock` may save. Each change is one call that the file server carries out whole, on names that belong
to one run only, so no order of calls of several starters gives two holders, and a kill between two calls locks nobody out:

    claim          rename a private folder with the record to `.run_lock`, which fails while that holds anything
    give way       move the record NAME out of `.run_lock`; that of a later holder has another name and cannot be hit

Neither flock, which some shared file systems lack, nor clocks, which differ between machines, nor hard links are relied on.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Iterator

from gram_engine.errors import CheckpointError, ConfigError, one_line
from gram_engine.log import log, redact
from gram_engine.platform.agreement import from_main

LOCK = ".run_lock"
BEAT_SECONDS = 10.0
"""Between two counts of a holder."""
LOOK_SECONDS, LOOKS = 1.0, 45
"""A record of another machine that is the same at so many looks in a row is of a run that has ended."""
RETRY_SECONDS = 0.1

COMMAND_LETTERS = 120
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)
"""What a rename to `.run_lock` gives where another run holds it; ENOENT where NFS lost its answer and asked again."""
GONE = (errno.ENOENT, errno.ESTALE)


@contextlib.contextmanager
def only_run_in(folder: str | None) -> Iterator[RunLock | None]:
    """Hold the lock of --save while the block runs; None without --save. Every process calls it, the main process holds.

    Raises:
        ConfigError: another run saves there.
        CheckpointError: the folder cannot be written.
    """
    if folder is None:
        yield None
        return
    lock = RunLock(folder)
    try:
        from_main(lock.acquire, f"--save {folder} cannot be written", "Mend it, or give another folder.")
        yield lock
    finally:
        lock.release()


class RunLock:
    """The right of one run to save into `folder`. `acquire` it, `check` before each change, `release` it at the end."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.place = self.folder / LOCK
        self.name = uuid.uuid4().hex
        self.record = self.place / self.name
        self.private = self.folder / f"{LOCK}.{self.name}.tmp"
        command = redact(" ".join(sys.argv))[:COMMAND_LETTERS]
        self.process = {"host": socket.gethostname(), "pid": os.getpid(), "command": command}
        self.process |= {"machine": machine(), "started": started(os.getpid())}
        self.counter = 0
        self.lost = False
        self.mutex, self.ended = threading.Lock(), threading.Event()
        self.thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Become the holder, at once or, where one of another machine may have died, after watching its record.

        Raises:
            ConfigError: another run holds the folder.
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        while not self._claim():
            for record in self._records():
                self._see_dead(record)
                self._remove(record)
            time.sleep(RETRY_SECONDS)
        self._tidy_up()
        self.thread = threading.Thread(target=self._count_on, name="run lock", daemon=True)
        self.thread.start()

    def check(self) -> None:
        """Make sure that the folder is still this run's.

        Raises:
            CheckpointError: another run has taken it over.
            OSError: the record cannot be read or written.
        """
        self._count()
        if self.lost:
            holder = next((_named(_parse(_read(record))) for record in self._records()), "another run")
            raise CheckpointError(
                f"{self.folder}: {holder} has taken the folder over, as this run stood still for long. It saves nothing more "
                "here. The other's checkpoints are whole: go on with them, or begin anew with another --save."
            )

    def release(self) -> None:
        """Give the folder free, if it is this run's. May be called twice, and without `acquire`."""
        if self.thread is None:
            return
        with self.mutex, contextlib.suppress(OSError):
            self.ended.set()
            self._remove(self.record)

    def _claim(self) -> bool:
        self.private.mkdir()
        try:
            (self.private / self.name).write_bytes(self._content())
            self.private.rename(self.place)
        except OSError as error:
            if error.errno not in TAKEN:
                raise
        finally:
            shutil.rmtree(self.private, ignore_errors=True)
        return self.record.exists()

    def _content(self) -> bytes:
        """The record, of the same length at each count, so that it is never seen half written."""
        return json.dumps({"counter": f"{self.counter:012}", **self.process}).encode()

    def _records(self) -> list[Path]:
        try:
            return sorted(self.place.iterdir())
        except FileNotFoundError:
            return []

    def _see_dead(self, record: Path) -> None:
        """Return when the record is of a run that has ended, or is gone."""
        content = _read(record)
        if content is None:
            return
        holder = _parse(content)
        alive = _alive(holder)
        if alive is None:
            log(
                f"--save {self.folder}: {_named(holder)} has saved here. Whether it still runs cannot be told from here: "
                f"its record is watched, for up to {LOOKS * LOOK_SECONDS:.0f} s."
            )
            alive = _moves(record, content)
        if alive:
            raise ConfigError(
                f"--save {self.folder}: {_named(holder)} saves here. Wait until it has ended, stop it, or give another --save."
            )
        log(f"--save {self.folder}: {_named(holder)}, which saved here, has ended.")

    def _remove(self, record: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            record.rename(self.private)  # NFS keeps a file that somebody reads, under another name, where it is unlinked
        self.private.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another run has come
            self.place.rmdir()

    def _tidy_up(self) -> None:
        """Remove what starters that were killed left. One that lives meets it as if its claim had failed, as it would."""
        for left in self.folder.glob(f"{LOCK}.*.tmp"):
            with contextlib.suppress(OSError):
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    def _count_on(self) -> None:
        while not self.ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # the next one, or the next save, finds out
                self._count()

    def _count(self) -> None:
        """Raise the counter. A record that somebody removed is made anew, unless another run has come."""
        with self.mutex:
            if self.lost or self.ended.is_set():
                return
            self.counter += 1
            try:
                with open(self.record, "r+b", buffering=0) as handle:
                    handle.write(self._content())
            except OSError as error:
                if error.errno not in GONE:
                    raise
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lost = not self._claim()


def machine() -> list | None:
    """Where a process is known by its number and start: the boot, the PID namespace and the user. None where it is not."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):  # /proc shows another namespace
            return None
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return [socket.gethostname(), boot, os.readlink("/proc/self/ns/pid"), os.getuid()]
    except OSError:
        return None


def started(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process, which no change of the clock moves; None where it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else int(fields[18])


def _alive(holder: dict) -> bool | None:
    """Whether a record's process runs; None where that cannot be known."""
    if holder.get("machine") is None or holder["machine"] != machine():
        return None
    return holder.get("started") == started(holder["pid"])


def _moves(record: Path, content: bytes) -> bool:
    """Whether somebody writes the record. Looks are counted, not seconds: a look may wait for a file server that is down."""
    for _ in range(LOOKS):
        time.sleep(LOOK_SECONDS)
        now = _read(record)
        if now != content:
            return now is not None
    return False


def _read(record: Path) -> bytes | None:
    try:
        return record.read_bytes()
    except OSError as error:
        if error.errno not in GONE:
            raise
        return None


def _parse(content: bytes | None) -> dict:
    """The fields of a record; {} of one that is damaged or gone."""
    try:
        found = json.loads(content or b"")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("pid"), int) else {}


def _named(holder: dict) -> str:
    if not holder:
        return "a run whose record cannot be read"
    return one_line(f"process {holder['pid']} on {holder.get('host')} ({holder.get('command')})")
