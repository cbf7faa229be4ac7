"""A pool of worker processes that have imported torch and megatron-core, for tests that need several ranks."""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
import traceback
from pathlib import Path

import psutil
import torch.multiprocessing as mp

TIMEOUT_SECONDS = 180
MOST_THREADS = 150
"""Above this number of threads in a worker, which come from past process groups, the pool starts again."""


def worker_context():
    """A context of multiprocessing whose processes are forked where tests.support.preload is imported: they start at once."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preload"])
    return context


def run_alone(function, *args, timeout: float = TIMEOUT_SECONDS) -> tuple[int, str]:
    """(exit code, output) of function(*args) in a process of its own, which has all imports done."""
    with tempfile.NamedTemporaryFile() as file:
        process = worker_context().Process(target=_run_alone, args=(file.name, function, args))
        process.start()
        process.join(timeout)
        process.kill()
        process.join()
        return process.exitcode, Path(file.name).read_text(encoding="utf-8")


def _run_alone(output: str, function, args: tuple) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    function(*args)


class WorkerError(AssertionError):
    """A worker raised, died or hung; the text has the rank and its traceback."""


class Pool:
    """`size` processes; each run forms a new gloo process group of the first few."""

    def __init__(self, size: int):
        self.size = size
        self.workers: list = []

    def run(self, function, world_size: int, *args, timeout: float = TIMEOUT_SECONDS) -> list:
        """Call function(*args) on `world_size` ranks; returns the result of each rank.

        Raises:
            WorkerError: a rank raised, died or did not answer in time; the pool starts again for the next run.
        """
        self._start()
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            for rank in range(world_size):
                self.workers[rank][1].send((function, args, rank, world_size, store))
            try:
                answers = [self._answer(rank, timeout) for rank in range(world_size)]
            except WorkerError:
                self.close()
                raise
        if max(threads for _, threads in answers) > MOST_THREADS:
            self.close()
        return [result for result, _ in answers]

    def close(self) -> None:
        """End all workers, and the checkpoint writers that they started."""
        for process, connection in self.workers:
            _kill_session(process)
            process.join()
            connection.close()
        self.workers = []

    def _start(self) -> None:
        if self.workers:
            return
        context = worker_context()
        for _ in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))

    def _answer(self, rank: int, timeout: float) -> tuple:
        """(result of the rank, number of its threads)"""
        connection = self.workers[rank][1]
        if not connection.poll(timeout):
            raise WorkerError(f"rank {rank} did not answer within {timeout} s")
        try:
            result, failure, threads = connection.recv()
        except EOFError:
            process = self.workers[rank][0]
            process.join(10)
            raise WorkerError(f"rank {rank} died: exit code {process.exitcode}") from None
        if failure is not None:
            raise WorkerError(f"rank {rank} raised:\n{failure}")
        return result, threads


def _kill_session(process) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it died, or has not reached setsid
        process.kill()


def _serve(connection) -> None:
    faulthandler.enable()
    os.setsid()
    # A daemonic process may not have children, which the checkpoint writer starts.
    mp.current_process()._config["daemon"] = False
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    import torch

    from gram_engine.platform import device as platform

    torch.set_num_threads(1)
    platform.initialise("cpu")
    while True:
        try:
            function, args, rank, world_size, store = connection.recv()
        except EOFError:
            return
        try:
            result, failure = _in_world(function, args, rank, world_size, store), None
        except BaseException:
            result, failure = None, traceback.format_exc()
        connection.send((result, failure, psutil.Process().num_threads()))


def _in_world(function, args, rank: int, world_size: int, store: str):
    import gc

    import torch.distributed as dist
    from megatron.core import parallel_state

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        return function(*args)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        gc.collect()  # reference cycles of a model keep process groups alive, and with each several threads
