"""What torchrun tells each process through environment variables: read once at start-up, passed on as arguments."""

from __future__ import annotations

import os


def world_size() -> int:
    """Number of processes of the run; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Number of this process among those of its machine; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def restarts() -> int:
    """How many times torchrun (--max-restarts) has restarted this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
