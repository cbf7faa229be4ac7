"""A training state of a few kilobytes that the real saver writes and the real loader reads, and forked processes to do so in.

A state is a function of (step, seed), so that whatever is loaded can be compared bit for bit with what should have been saved.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import multiprocessing
import os
import re
import tempfile
import traceback
from pathlib import Path

CHILD_SECONDS = 120
ROWS, COLUMNS = 24, 300


def run_state(config, step: int, seed: int = 0):
    """(model, optimizer, scheduler) of `step`; each process holds its share of the rows."""
    import torch
    import torch.distributed as dist
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

    from gram_engine.model.reward_model import RewardModel

    rank, world_size = dist.get_rank(), dist.get_world_size()
    size = ROWS // world_size
    draw = torch.Generator().manual_seed(1000 * step + seed)
    weight, moment = (torch.randn(ROWS, COLUMNS, generator=draw)[rank * size : (rank + 1) * size].clone() for _ in range(2))

    class Model(RewardModel):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.weight = torch.nn.Parameter(weight)

        def sharded_state_dict(self):
            extra = ShardedObject("layers._extra_state", None, (1,), (0,), replica_id=rank)
            return {
                "weight": ShardedTensor.from_rank_offsets("weight", self.weight, (0, rank, world_size)),
                "layers._extra_state": extra,
            }

    class Optimizer:
        def __init__(self):
            self.moment, self.groups = moment, [{"step": step, "lr": 1 / (1 + step)}]

        def sharded_state_dict(self, _, **__):
            sharded = ShardedTensor.from_rank_offsets("moment", self.moment, (0, rank, world_size))
            return {"moment": sharded, "groups": copy.deepcopy(self.groups)}

        def load_state_dict(self, state):
            self.moment, self.groups = state["moment"], state["groups"]

    class Scheduler(dict):
        def state_dict(self):
            return dict(self)

        load_state_dict = dict.update

    return Model(), Optimizer(), Scheduler(num_steps=8 * step, seed=seed)


def digest(state, position: dict) -> str:
    """SHA-256 of all bits of a state, gathered from all processes."""
    import torch
    import torch.distributed as dist

    model, optimizer, scheduler = state
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, [model.weight.detach(), optimizer.moment])
    tensors = [torch.cat([part[index] for part in parts]).numpy().tobytes() for index in (0, 1)]
    return hashlib.sha256(repr((tensors, optimizer.groups, dict(scheduler), position)).encode()).hexdigest()


def meant(config, step: int, seed: int = 0) -> str:
    """Digest of the state that `save` writes for a step."""
    return digest(run_state(config, step, seed), {"iteration": step, "consumed_samples": 8 * step})


@functools.cache
def manifest_and_tokenizer(prefix: str, tokenizer_model: str) -> tuple:
    """Data manifest and tokenizer for a saver; cached, as the modules take seconds to import."""
    from gram_engine.data.dataset import PairDataset
    from gram_engine.data.tokenizer import Tokenizer

    return PairDataset(prefix).manifest, Tokenizer.load("auto", tokenizer_model)


def new_saver(config):
    """A CheckpointSaver of this configuration."""
    from gram_engine.checkpoint.save_load import CheckpointSaver

    manifest, tokenizer = manifest_and_tokenizer(config.data.data_path, config.data.tokenizer_model)
    saver = CheckpointSaver(config, manifest)
    saver.tokenizer = tokenizer
    return saver


@functools.cache
def _parsed(text: str):
    from gram_engine.config.parse import load_yaml

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        return load_yaml(file.name)


def quick_run_config_of(checkpoint):
    """As folder.run_config_of, which takes 0.1 s: files that differ only in --save are parsed once."""
    text = (checkpoint / "run_config.yaml").read_text()
    return _parsed(re.sub(r"(?m)^  save: .*$", "  save: null", text))


def save(config, step: int, seed: int = 0, saver=None, resumed_from: Path | None = None):
    """Save a step, or with --async-save start to. Returns the saver."""
    from gram_engine.checkpoint.save_load import TrainState

    saver = saver or new_saver(config)
    model, optimizer, scheduler = run_state(config, step, seed)
    saver.save(TrainState(step, 8 * step, resumed_from), [model], optimizer, scheduler)
    return saver


def load(config, folder=None) -> tuple[str, list[str], Path]:
    """(digest of the state, log lines, checkpoint) that a resuming run gets."""
    from unittest import mock

    from gram_engine.checkpoint import save_load as checkpoint

    lines: list[str] = []
    model, optimizer, scheduler = state = run_state(config, 0)
    quick = {"log": lines.append, "run_config_of": quick_run_config_of}
    with mock.patch.multiple(checkpoint, **quick):
        found = checkpoint.load_checkpoint(folder or config.checkpoint.save, [model], optimizer, scheduler, config)
    return digest(state, found.position()), lines, found.resumed_from


def with_flags(config, save_to, **options):
    """A copy of a configuration with another --save and other checkpoint options."""
    changed = copy.deepcopy(config)
    changed.checkpoint.save = str(save_to)
    for name, value in options.items():
        setattr(changed.checkpoint, name, value)
    return changed


def in_child(function, *args):
    """Call function(*args) in a forked process with its own process group: (exit code, result or None if it died)."""
    return in_world(1, None, function, *args)[0]


def in_world(size: int, store: Path | None, function, *args) -> list:
    """As `in_child` in each of `size` processes that form a process group by the file `store`.

    Returns when the processes, and whatever they have forked, have ended.
    """
    context = multiprocessing.get_context("fork")
    ends = [context.Pipe(duplex=False) for _ in range(size)]
    started = []
    for rank, (_, ours) in enumerate(ends):
        started.append(context.Process(target=_answer, args=(ours, rank, size, store, function, args)))
        started[-1].start()
    for _, ours in ends:
        ours.close()
    try:
        return [_outcome(process, answer) for process, (answer, _) in zip(started, ends)]
    finally:
        for process in started:
            process.kill()


def _outcome(process, answer) -> tuple:
    answers = []
    try:
        while True:  # until all holders of the pipe's other end have ended
            assert answer.poll(CHILD_SECONDS), "a process hangs"
            answers.append(answer.recv())
    except EOFError:
        process.join()
    for whole, result in answers:
        assert whole, result
        return process.exitcode, result
    return process.exitcode, None


def start_world(rank: int = 0, size: int = 1, store: Path | None = None) -> None:
    """Initialise the process groups of a forked process."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    where = dist.FileStore(str(store), size) if store else dist.HashStore()
    dist.init_process_group("gloo", store=where, rank=rank, world_size=size)
    parallel_state.initialize_model_parallel()


def _answer(connection, rank: int, size: int, store: Path | None, function, args) -> None:
    try:
        start_world(rank, size, store)
        connection.send((True, function(*args)))
    except BaseException:
        connection.send((False, traceback.format_exc()))
    os._exit(0)
