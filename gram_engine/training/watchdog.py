"""A run that hangs says where, in every process, and ends.

A collective that one process never joins holds all the others.  Each process therefore expects a sign of life from its
own training loop; without one for the given time it writes the stacks of all its threads to standard error and exits with
status 4, so that the launcher ends (or, with --max-restarts, restarts) the run.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from typing import Iterator

EXIT_STATUS = 4
BLOCKED_SECONDS = 20
"""Grace before the fallback, which also works while C code holds the interpreter's lock but cannot choose the status."""


class Watchdog:
    """`start` it before the first step; call `beat` at every sign of life, `close` at the end.

    Args:
        seconds: longest time between two beats.
        rank: named in the message.
    """

    def __init__(self, seconds: float, rank: int):
        self.seconds, self.rank = seconds, rank
        self.closed = threading.Event()
        self.started = False

    def start(self) -> None:
        """Begin to watch."""
        self.started = True
        self.beat("starting")
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, doing: str) -> None:
        """The process is alive and begins with `doing`, e.g. 'step 12'."""
        self.doing, self.last = doing, time.monotonic()
        if self.started:
            faulthandler.dump_traceback_later(self.seconds + BLOCKED_SECONDS, exit=True)

    def close(self) -> None:
        """No sign of life is expected any more."""
        self.started = False
        self.closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self.closed.wait(max(0.01, self.last + self.seconds - time.monotonic())):
            if time.monotonic() - self.last >= self.seconds:
                self._end()

    def _end(self) -> None:
        told = [
            f"error: rank {self.rank} hangs: no progress for {self.seconds:g} s in {self.doing} "
            "(--distributed-timeout-minutes). Stacks of its threads follow; the process that waits for something else than "
            "the others is the one to look at.",
            *(f"[rank {self.rank}] {line}" for line in stacks()),
        ]
        for line in told:  # each with one write: all processes of a node write to the same pipe now
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
        os._exit(EXIT_STATUS)


def stacks() -> Iterator[str]:
    """Every thread's name and calls, the innermost first. Opens no source file: it may lie where the run hangs."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        yield f"Thread {names.get(ident, ident)}:"
        while frame is not None:
            yield f'  File "{frame.f_code.co_filename}", line {frame.f_lineno} in {frame.f_code.co_name}'
            frame = frame.f_back
