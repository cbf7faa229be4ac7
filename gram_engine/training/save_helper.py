"""megatron-core's checkpoint writer keeps a helper process (it hands over results); let it end when its trainer dies.

A trainer that is killed would else leave one behind with each restart, which holds memory and the launcher's output pipe.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.managers import SyncManager

from megatron.core.dist_checkpointing.strategies import filesystem_async


def start_save_helper() -> None:
    """Start the helper, once in a process, where megatron-core will look for it."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(initializer=_end_with_parent)
        filesystem_async._results_queue = manager.Queue()


def _end_with_parent() -> None:
    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
