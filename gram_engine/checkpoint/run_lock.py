"""Only one run at a time saves to a --save folder, on one machine or on several that share the folder.

    FOLDER/.run_lock/NAME    record (JSON): which process saves here, and a counter that it increments; each run draws a NAME

The run whose record is in `.run_lock` holds the lock. Every change is one atomic file system call on names that only one run
uses, so that no interleaving of several starting runs gives two holders, and a kill between two calls locks nobody out:

    acquire        rename a private folder that holds the record to `.run_lock`, which fails unless that is empty or missing
    release        move the record NAME out of `.run_lock`; the record of a later holder has another name and stays

The lock does not use flock (some shared file systems lack it), nor clocks (they differ between machines), nor hard links.
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
from gram_engine.platform.agreement import run_on_rank0

LOCK = ".run_lock"
BEAT_SECONDS = 10.0
"""Interval at which the holder increments its counter."""
LOOK_SECONDS, LOOKS = 1.0, 45
"""If another machine's record does not change between this many looks, one every LOOK_SECONDS, its run has ended."""
RETRY_SECONDS = 0.1

COMMAND_LETTERS = 120
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)
"""Errors of a rename to `.run_lock` if another run holds it; ENOENT if NFS repeated a rename whose answer was lost."""
GONE = (errno.ENOENT, errno.ESTALE)


@contextlib.contextmanager
def only_run_in(folder: str | None) -> Iterator[RunLock | None]:
    """Hold the lock of the --save folder while the block runs; yields None without --save. Collective; rank 0 holds the lock.

    Raises:
        ConfigError: another run saves to the folder.
        CheckpointError: the folder cannot be written.
    """
    if folder is None:
        yield None
        return
    lock = RunLock(folder)
    try:
        run_on_rank0(lock.acquire, f"--save {folder} cannot be written", "Make it writable, or give another folder.")
        yield lock
    finally:
        lock.release()


class RunLock:
    """The lock of `folder`: `acquire` it, `check` before each save that it is still held, `release` it at the end."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.lock_folder = self.folder / LOCK
        self.name = uuid.uuid4().hex
        self.record = self.lock_folder / self.name
        self.private = self.folder / f"{LOCK}.{self.name}.tmp"
        command = redact(" ".join(sys.argv))[:COMMAND_LETTERS]
        self.process = {"host": socket.gethostname(), "pid": os.getpid(), "command": command}
        self.process |= {"machine": machine(), "started": started(os.getpid())}
        self.counter = 0
        self.lost = False
        self.mutex, self.ended = threading.Lock(), threading.Event()
        self.thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock: at once, or, if a run of another machine holds it and may have died, after watching its record.

        Raises:
            ConfigError: another run holds the lock.
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        while not self._claim():
            for record in self._records():
                self._wait_until_dead(record)
                self._remove(record)
            time.sleep(RETRY_SECONDS)
        self._remove_leftovers()
        self.thread = threading.Thread(target=self._keep_counting, name="run lock", daemon=True)
        self.thread.start()

    def check(self) -> None:
        """Check that this run still holds the lock.

        Raises:
            CheckpointError: another run has taken it.
            OSError: the record cannot be read or written.
        """
        self._count()
        if self.lost:
            holder = next((_named(_parse(_read(record))) for record in self._records()), "another run")
            raise CheckpointError(
                f"{self.folder}: {holder} has taken the folder over, because this run stood still for too long. It saves "
                "nothing more here. The other's checkpoints are intact: resume from them, or start anew with another --save."
            )

    def release(self) -> None:
        """Release the lock, if this run holds it. May be called twice, and without `acquire`."""
        if self.thread is None:
            return
        with self.mutex, contextlib.suppress(OSError):
            self.ended.set()
            self._remove(self.record)

    def _claim(self) -> bool:
        self.private.mkdir()
        try:
            (self.private / self.name).write_bytes(self._content())
            self.private.rename(self.lock_folder)
        except OSError as error:
            if error.errno not in TAKEN:
                raise
        finally:
            shutil.rmtree(self.private, ignore_errors=True)
        return self.record.exists()

    def _content(self) -> bytes:
        """The record; its length never changes, so that no reader sees it half written."""
        return json.dumps({"counter": f"{self.counter:012}", **self.process}).encode()

    def _records(self) -> list[Path]:
        try:
            return sorted(self.lock_folder.iterdir())
        except FileNotFoundError:
            return []

    def _wait_until_dead(self, record: Path) -> None:
        """Return once the run of a record has ended or the record is gone; raise ConfigError if the run is alive."""
        content = _read(record)
        if content is None:
            return
        holder = _parse(content)
        alive = _alive(holder)
        if alive is None:
            log(
                f"--save {self.folder}: {_named(holder)} has saved here. Whether it still runs cannot be seen from here: "
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
            # Not unlinked there: NFS would keep a file that somebody has open in the folder, under another name.
            record.rename(self.private)
        self.private.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another run has acquired the lock
            self.lock_folder.rmdir()

    def _remove_leftovers(self) -> None:
        """Remove private folders of starting runs that were killed. To one that is alive, it is as if its claim had failed."""
        for left in self.folder.glob(f"{LOCK}.*.tmp"):
            with contextlib.suppress(OSError):
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    def _keep_counting(self) -> None:
        while not self.ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # the next count, or the next save, will notice
                self._count()

    def _count(self) -> None:
        """Increment the counter. A record that somebody removed is written again, unless another run holds the lock."""
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
    """The scope in which a process id and start time identify a process: host, boot, PID namespace, user. None if unknown."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):  # /proc is of another PID namespace
            return None
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return [socket.gethostname(), boot, os.readlink("/proc/self/ns/pid"), os.getuid()]
    except OSError:
        return None


def started(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process, independent of clock changes; None if the process has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else int(fields[18])


def _alive(holder: dict) -> bool | None:
    """Whether the process of a record runs; None if that cannot be known from this machine."""
    if holder.get("machine") is None or holder["machine"] != machine():
        return None
    return holder.get("started") == started(holder["pid"])


def _moves(record: Path, content: bytes) -> bool:
    """Whether a record changes. Looks are counted, not seconds, because a look may wait for a file server that is down."""
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
    """The fields of a record; {} if it is damaged or gone."""
    try:
        found = json.loads(content or b"")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("pid"), int) else {}


def _named(holder: dict) -> str:
    if not holder:
        return "a run whose record cannot be read"
    return one_line(f"process {holder['pid']} on {holder.get('host')} ({holder.get('command')})")
