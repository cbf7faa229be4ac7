"""Leaving early and in good order: on a signal, or when the time given to the run is over."""

from __future__ import annotations

import signal
import time

import torch
import torch.distributed as dist

from gram_engine.kernels.attention import to_device

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What Slurm and cluster managers send before they end a job."""

LEAVING = "leaving after step"
"""In the last line of a run that left early, whose exit status is 0 all the same."""


class StopRequests:
    """Notes a request in any process; all processes learn of it after the same step.

    Args:
        minutes: --exit-duration-in-mins, counted from here; None: no limit.
        device: where the collective that spreads the news runs.
    """

    def __init__(self, minutes: float | None, device: torch.device):
        self.deadline = time.monotonic() + 60 * minutes if minutes is not None else None
        self.minutes, self.device = minutes, device
        self.received = 0
        self.previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def reason(self) -> str | None:
        """Why the run should leave now, the same on every process, or None. Every process must call it."""
        late = self.deadline is not None and time.monotonic() >= self.deadline
        news = to_device(torch.tensor([self.received, int(late)], dtype=torch.int32), self.device)
        dist.all_reduce(news, op=dist.ReduceOp.MAX)
        number, late = news.tolist()
        if number:
            return f"received {signal.Signals(number).name}"
        return f"--exit-duration-in-mins {self.minutes:g} are over" if late else None

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        self.received = number
