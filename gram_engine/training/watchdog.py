"""Ends a run that hangs, after every process has printed where.

If one process never joins a collective, all others wait for it.  Each process therefore has a watchdog for its training loop:
if the loop makes no progress for the given time, the watchdog prints the stacks of all threads to standard error and ends the
process with status 4, so that the launcher ends (or, with --max-restarts, restarts) the run.
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
"""Delay of the fallback (faulthandler), which works even while C code holds the GIL, but cannot choose the exit status."""


class Watchdog:
    """`start` it before the first step, call `beat` at every progress, `close` it at the end.

    Args:
        seconds: longest time allowed between two beats.
        rank: rank of this process, for the message.
    """

    def __init__(self, seconds: float, rank: int):
        self.seconds, self.rank = seconds, rank
        self.closed = threading.Event()
        self.started = False

    def start(self) -> None:
        """Start watching."""
        self.started = True
        self.beat("starting")
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, doing: str) -> None:
        """Report progress: the process now starts `doing`, e.g. 'step 12'."""
        self.doing, self.last = doing, time.monotonic()
        if self.started:
            faulthandler.dump_traceback_later(self.seconds + BLOCKED_SECONDS, exit=True)

    def close(self) -> None:
        """Stop watching."""
        self.started = False
        self.closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self.closed.wait(max(0.01, self.last + self.seconds - time.monotonic())):
            if time.monotonic() - self.last >= self.seconds:
                self._end()

    def _end(self) -> None:
        message = [
            f"error: rank {self.rank} hangs: no progress for {self.seconds:g} s in {self.doing} "
            "(--distributed-timeout-minutes). Stacks of its threads follow; look at the process that waits for something "
            "else than the others.",
            *(f"[rank {self.rank}] {line}" for line in stacks()),
        ]
        for line in message:  # one write each, because all processes of a node write to the same pipe now
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
        os._exit(EXIT_STATUS)


def stacks() -> Iterator[str]:
    """Lines with every thread's name and calls, innermost first. Reads no source file, which may be on the disk that hangs."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        yield f"Thread {names.get(ident, ident)}:"
        while frame is not None:
            yield f'  File "{frame.f_code.co_filename}", line {frame.f_lineno} in {frame.f_code.co_name}'
            frame = frame.f_back
