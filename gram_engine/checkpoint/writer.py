"""Writing one checkpoint: megatron-core plans which process writes which shards, and the code here writes them.

megatron-core's own writer is not used because it hangs on faults: it waits without limit for writer processes that were killed,
and if one process runs out of disk between two collectives, the others wait for it.  Here each process (or one that it forks)
writes its shards without any collective, and then a receipt file.  Once all receipts exist, rank 0 completes the folder alone.
Only planning is collective, and it ends before anything is written.
"""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item

from gram_engine.checkpoint.folder import publish
from gram_engine.checkpoint.integrity import seal
from gram_engine.checksums import ChecksummedFile
from gram_engine.errors import CheckpointError, GramError
from gram_engine.files import check_free_space, write_atomically
from gram_engine.platform.stack import StoredObject, plan_checkpoint

RECEIPT = "receipt_{:05d}.pickle"
RECEIPT_SECONDS = 60.0
"""How long a receipt written on another node may take to become visible here."""


class PendingCheckpoint:
    """A checkpoint that is being written. Every process constructs one, collectively."""

    def __init__(self, sharded_state: dict, temporary: Path, final: Path):
        """Plan which process writes which shards of `sharded_state`, as megatron-core's dist_checkpointing.save takes it."""
        self.temporary, self.final = temporary, final
        sharded, self.common = save_preprocess(sharded_state)
        self.writer, self.metadata = plan_checkpoint(sharded, temporary)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.background: Background | None = None

    def check_room(self, total_bytes: int) -> None:
        """Check that the disk has space for `total_bytes`, the sum of `nbytes` over all processes.

        Raises:
            CheckpointError: it has not; the text gives the needed and the free space.
        """
        check_free_space(
            self.temporary.parent,
            total_bytes,
            CheckpointError,
            str(self.final),
            "Nothing was written, older checkpoints stay. Free space, keep fewer with --keep-last, or give another --save.",
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors and objects that this process writes."""
        contents = [part for _, _, parts in self.writer.write_buckets for part in (*parts[0], *parts[1])]
        return sum(data.nbytes if isinstance(data, torch.Tensor) else len(data.getbuffer()) for _, data in contents)

    def write(self, write_metadata_files: Callable[[Path], None], in_background: bool) -> None:
        """Write this process's shards, and on rank 0 the files beside them; `in_background`: in a forked process."""
        buckets = self.writer.preload_tensors(self.writer.write_buckets)
        self.writer.write_buckets = []  # the copies in `buckets` are enough
        write = lambda: self._write(buckets, write_metadata_files)  # noqa: E731
        if in_background:
            self.background = Background(write)
        else:
            write()

    def _write(self, buckets: list, write_metadata_files: Callable[[Path], None]) -> None:
        if self.rank == 0:
            write_metadata_files(self.temporary)
            with ChecksummedFile(self.temporary / "common.pt") as file:
                torch.save(self.common, file)
        with ThreadPoolExecutor(max(1, len(buckets))) as pool:
            written = list(pool.map(self._write_bucket, buckets))
        receipt = {
            "results": [result for results, _ in written for result in results],
            "files": {name: entry for (_, name, _), (_, entry) in zip(buckets, written)},
        }
        with write_atomically(self.temporary / RECEIPT.format(self.rank), "wb") as handle:
            pickle.dump(receipt, handle)

    def _write_bucket(self, bucket: tuple) -> tuple[list, dict]:
        path, name, (objects, tensors) = bucket
        transforms, form = self.writer.transforms, SerializationFormat.TORCH_SAVE
        with ChecksummedFile(path) as file:
            contents = (*((item, StoredObject(data.getvalue())) for item, data in objects), *tensors)
            results = [_write_item(transforms, file, data, item, name, form) for item, data in contents]
        return results, file.entry

    def running(self) -> bool:
        """Whether this process's files are still being written."""
        return self.background is not None and self.background.running()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until this process's files are written.

        Raises:
            OSError: they could not be written, or not within `seconds`.
        """
        if self.background is not None:
            self.background.wait(seconds)

    def complete(self) -> None:
        """On rank 0: write .metadata and integrity.json, flush the folder to disk, and give it its final name."""
        paths = [self.temporary / RECEIPT.format(rank) for rank in range(self.world_size)]
        _wait_for(paths)
        receipts = [pickle.loads(path.read_bytes()) for path in paths]
        self.writer.finish(self.metadata, [receipt["results"] for receipt in receipts])
        save_config(CheckpointingConfig("torch_dist", 1), str(self.temporary))
        for path in paths:
            path.unlink()
        seal(self.temporary, {name: entry for receipt in receipts for name, entry in receipt["files"].items()})
        publish(self.temporary, self.final)


def _wait_for(paths: list[Path]) -> None:
    deadline = time.monotonic() + RECEIPT_SECONDS
    for path in paths:
        while not path.is_file():
            if time.monotonic() > deadline:
                raise CheckpointError(f"{path} did not appear within {RECEIPT_SECONDS:.0f} s: do all nodes share the folder?")
            time.sleep(0.1)


class Background:
    """Runs act() in a forked process, which has a copy-on-write image of this process's memory."""

    def __init__(self, act: Callable[[], None]):
        context = multiprocessing.get_context("fork")
        self.answer, ours = context.Pipe(duplex=False)
        self.process = context.Process(target=_in_background, args=(act, ours), name="checkpoint writer")
        self.process.start()
        ours.close()

    def running(self) -> bool:
        return self.process.is_alive()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until it has ended.

        Raises:
            OSError: it failed, was killed, or has not ended within `seconds`.
        """
        if not self.answer.poll(seconds):
            raise OSError(f"it is still being written after {seconds:.0f} s")
        try:
            error = self.answer.recv()
        except EOFError:
            error = "the process that wrote it ended early"
        self.process.join()
        if self.process.exitcode:
            error = f"the process that wrote it ended with {self.process.exitcode} (-9: killed, often because memory ran out)"
        if error:
            raise OSError(error)


def _in_background(act: Callable[[], None], answer) -> None:
    gc.disable()  # this process must not free the training process's objects, such as CUDA tensors
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to end training; this process ends by itself
        signal.signal(number, signal.SIG_IGN)
    error = None
    try:
        act()
    except (OSError, GramError) as failure:
        error = str(failure)
    answer.send(error)
