"""The processes of a command that torchrun has started: they share out rows and meet through torchrun's key-value store."""

from __future__ import annotations

import functools
import json
import time
from datetime import timedelta
from typing import Any, Callable, Sequence

import torch.distributed as dist

from gram_engine.platform.environment import restarts, world_size

FOREVER = timedelta(days=365)
"""How long a process waits for another one. When a process fails, torchrun ends those that wait for it."""
SECONDS_BETWEEN_LOOKS = 0.2


class Processes:
    """The processes that work on one output; without torchrun there is a single one.

    Args:
        name: the same in all processes, another one for each output.
    """

    def __init__(self, name: str):
        self.rank, self.count, self._store, self._done = 0, 1, None, 0
        if world_size() > 1:
            store, self.rank, self.count = _rendezvous()
            self._store = dist.PrefixStore(f"gram/{restarts()}/{name}", store)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which shows progress and writes the files that all share."""
        return self.rank == 0

    def own_part(self, numbers: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """The numbers that fall to this process, in their order: each process gets as many rows, and as long ones."""
        by_size = sorted(range(len(numbers)), key=lambda place: -sizes[place])
        return sorted(numbers[place] for place in by_size[self.rank :: self.count])

    def from_first(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make` returns in the first process, which alone calls it; JSON carries it to the others."""
        if self._store is None:
            return make()
        if self.is_first:
            value = make()
            self._store.set(key, json.dumps(value))
            return value
        self._store.wait([key], FOREVER)
        return json.loads(self._store.get(key))

    def add_done(self, rows: int) -> int:
        """Report rows as done; returns how many all processes have reported."""
        if self._store is None:
            self._done += rows
            return self._done
        return self._store.add("done", rows)

    def wait_for_done(self, rows: int, look: Callable[[int], None]) -> None:
        """Return when all processes together have reported `rows`; `look` is called with the number meanwhile."""
        while (done := self.add_done(0)) < rows:
            look(done)
            time.sleep(SECONDS_BETWEEN_LOOKS)
        look(done)

    def wait_for_all(self) -> None:
        """Return in the first process when all others have come here too: without torchrun's agent it holds the store."""
        if self._store is None:
            return
        present = self._store.add("present", 1)
        while self.is_first and present < self.count:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            present = self._store.add("present", 0)


@functools.cache
def _rendezvous():
    return next(dist.rendezvous("env://"))
