"""Ends a run early, with a checkpoint: on a signal, or when --exit-duration-in-mins is over."""

from __future__ import annotations

import signal
import time

import torch
import torch.distributed as dist

from gram_engine.kernels.attention import to_device

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that Slurm and cluster managers send before they end a job."""

LEAVING = "leaving after step"
"""Part of the last log line of a run that ended early; its exit status is 0, as that of a finished one."""


class StopRequests:
    """Records a request to stop in any process; all processes learn of it after the same step.

    Args:
        minutes: --exit-duration-in-mins, counted from the construction; None: no limit.
        device: device of the collective.
    """

    def __init__(self, minutes: float | None, device: torch.device):
        self.deadline = time.monotonic() + 60 * minutes if minutes is not None else None
        self.minutes, self.device = minutes, device
        self.received = 0
        self.previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def reason(self) -> str | None:
        """Why the run should stop now, or None; the same on every process (collective)."""
        late = self.deadline is not None and time.monotonic() >= self.deadline
        flags = to_device(torch.tensor([self.received, int(late)], dtype=torch.int32), self.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        number, late = flags.tolist()
        if number:
            return f"received {signal.Signals(number).name}"
        return f"--exit-duration-in-mins {self.minutes:g} are over" if late else None

    def close(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        self.received = number
