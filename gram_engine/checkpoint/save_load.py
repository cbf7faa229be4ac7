"""Checkpoints in megatron-core's torch_dist format: saved at one layout, loaded at any other. Files: checkpoint_folder.py.

No random number is drawn after initialisation (dropouts are 0, the data order is a function of seed and position), so
weights, optimizer, schedule and position are all that an exact resume needs.
"""

from __future__ import annotations

import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, TypeVar

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint import CheckpointException

from gram_engine.checkpoint.folder import (
    RUN_CONFIG,
    TRACKER,
    candidates,
    checkpoint_folders,
    iteration_folder,
    latest_checkpoint,
    prune,
    remove_leftovers,
    run_config_of,
    write_companions,
)
from gram_engine.checkpoint.integrity import INTEGRITY, DamagedCheckpoint, check_extents, verify
from gram_engine.checkpoint.run_lock import RunLock
from gram_engine.checkpoint.safe_pickle import check_no_code, read_metadata
from gram_engine.checkpoint.writer import Writing
from gram_engine.config.schema import Config
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import CheckpointError, GramError
from gram_engine.log import log
from gram_engine.model.lora import check_adapters, is_adapter
from gram_engine.model.reward_model import unwrap
from gram_engine.model.scalar_head import SCALAR_HEAD
from gram_engine.platform.agreement import from_main, shared, together
from gram_engine.platform.stack import load_strategy

__all__ = ["CheckpointSaver", "TrainState", "candidates", "latest_checkpoint", "load_checkpoint", "load_weights"]

T = TypeVar("T")

# Optimizer state by parameter in model space: the layout that can be loaded at any TP, PP and DP.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}

EXTRA_STATE = "_extra_state"
"""End of the keys of Transformer Engine's scaling factors; without them FP8 starts as it does in a new run."""

SHAPE_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "untie_embeddings_and_output_weights",
    "qk_layernorm",
)


DRAIN_SECONDS = 300.0
"""How long a process that ends by an error waits for its part of a checkpoint that is being written."""


@dataclass
class TrainState:
    """How far a run has come."""

    iteration: int = 0
    consumed_samples: int = 0
    resumed_from: Path | None = None
    """The checkpoint that this run goes on from, which --keep-last spares."""

    def position(self) -> dict[str, int]:
        """What a checkpoint holds of it."""
        return {"iteration": self.iteration, "consumed_samples": self.consumed_samples}


class CheckpointSaver:
    """Writes checkpoints of one run, in the foreground or (--async-save) behind the training steps.

    Every process calls every method, but `drain`. A checkpoint counts once its folder has its final name; what goes wrong
    before leaves the older ones as they were.
    """

    def __init__(self, config: Config, data_manifest: dict):
        self.config = config
        self.data_manifest = data_manifest
        self.tokenizer: Tokenizer | None = None
        self.writing: Writing | None = None
        self.resumed_from: Path | None = None
        self.lock: RunLock | None = None

    def save(self, state: TrainState, model: list, optimizer, scheduler) -> None:
        """Save to --save, or begin to.

        Raises:
            CheckpointError: there is too little room, or a process cannot write; also of the save before, in background.
        """
        self.finish()
        final = iteration_folder(self.config.checkpoint.save, state.iteration)
        failure = self._failure(final)
        temporary = from_main(lambda: self._prepare(final), *failure)
        try:
            content = {**_sharded_state(model, optimizer, scheduler, state), "content_metadata": METADATA}
            writing = Writing(content, temporary, final)
            total_bytes = sum(shared(writing.nbytes))
            together(lambda: writing.check_room(total_bytes), *failure)
            in_background = self.config.checkpoint.async_save
            together(lambda: writing.write(self._write_companions, in_background), *failure)
        except GramError:
            _discard(temporary)
            raise
        self.writing, self.resumed_from = writing, state.resumed_from
        if not in_background:
            self.finish()

    def finish(self, blocking: bool = True) -> None:
        """Publish what is written; wait for it when `blocking`.

        Raises:
            CheckpointError: a process could not write.
        """
        writing = self.writing
        if writing is None or (not blocking and any(shared(writing.running()))):
            return
        self.writing = None
        failure = self._failure(writing.final)
        try:
            together(writing.wait, *failure)
            from_main(lambda: self._complete(writing), *failure)
        except GramError:
            _discard(writing.temporary)
            raise

    def close(self) -> None:
        """At the end of training: as `finish`."""
        self.finish()

    def drain(self) -> None:
        """When training ends by an error: publish what every process has written, without asking the others. Never raises."""
        writing, self.writing = self.writing, None
        if writing is None:
            return
        try:
            writing.wait(DRAIN_SECONDS)
            if writing.rank == 0:
                self._complete(writing)
                log(f"saved {writing.final}, which was being written when training ended")
        except Exception as error:
            log(f"WARNING: {writing.final} was being written when training ended, and cannot be completed: {error}")

    def _failure(self, final: Path) -> tuple[str, str]:
        remedy = f"Older checkpoints are as they were: make room or mend the disk, then go on with --load {final.parent}"
        return f"{final} cannot be saved", f"{remedy}."

    def _prepare(self, final: Path) -> Path:
        self._check_lock()
        final.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(final.parent)
        if self.tokenizer is None:
            self.tokenizer = Tokenizer.load(self.config.data.tokenizer_type, self.config.data.tokenizer_model)
        # A name of its own: the writer of a run that was killed may still be at work.
        temporary = final.with_suffix(f".{uuid.uuid4().hex[:8]}.tmp")
        temporary.mkdir()
        return temporary

    def _write_companions(self, folder: Path) -> None:
        write_companions(folder, self.config, self.data_manifest, self.tokenizer)

    def _check_lock(self) -> None:
        if self.lock is not None:
            self.lock.check()

    def _complete(self, writing: Writing) -> None:
        self._check_lock()
        writing.complete()
        options = self.config.checkpoint
        protected = [writing.final, *filter(None, [self.resumed_from])]
        try:
            prune(writing.final.parent, options.keep_last, options.keep_every, protected)
        except OSError as error:
            log(f"WARNING: --keep-last cannot remove old checkpoints: {error}")


def _discard(temporary: Path) -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)


def load_checkpoint(folder: str | Path, model: list, optimizer, scheduler, config: Config) -> TrainState:
    """Restore model, optimizer, schedule and position from the newest checkpoint in `folder`, saved at any layout.

    A damaged one is named and passed over for the one before it. With --no-load-optim only weights and position come back;
    the optimizer and the schedule start anew.

    Raises:
        CheckpointError: there is none, it is of another shape, would run code, or cannot be read; with --strict-load also
            the newest is damaged.
    """
    optimizer = optimizer if config.checkpoint.load_optim else None

    def restore(path: Path, verified: bool) -> TrainState:
        _check_freeze(path, config)
        state = _read(path, _sharded_state(model, optimizer, scheduler, TrainState(), loading=True), verified)
        _load_model(model, state)
        if optimizer is not None:
            with torch.no_grad():
                optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
        return TrainState(**state["train_state"], resumed_from=path)

    return _from_newest(folder, config, True, restore)


def _check_freeze(path: Path, config: Config) -> None:
    before, now = run_config_of(path).training.freeze, config.training.freeze
    if config.checkpoint.load_optim and before != now:
        raise CheckpointError(
            f"{path}: saved with --freeze {before}, this run has {now}, so the optimizer's state is of other weights. Resume "
            "with the same setting, or with --no-load-optim."
        )


def load_weights(folder: str | Path, model: list, config: Config) -> None:
    """Restore the weights alone, as a starting point for another run.

    A scalar head keeps its random start where the checkpoint is a language model's, and so do adapters where it has none.

    Raises:
        CheckpointError: as for `load_checkpoint`.
    """

    def restore(path: Path, verified: bool) -> None:
        wanted, fresh_adapters = _sharded_model(model), run_config_of(path).model.lora_rank is None
        if fresh_adapters:
            wanted = {name: {key: entry for key, entry in part.items() if not is_adapter(key)} for name, part in wanted.items()}
        _load_model(model, _read(path, wanted, verified, may_lack=SCALAR_HEAD), fresh_adapters)

    _from_newest(folder, config, False, restore)


def _from_newest(folder: str | Path, config: Config, resuming: bool, restore: Callable[[Path, bool], T]) -> T:
    """restore(path, verified) of the newest checkpoint that is whole; every process takes the same."""
    paths = from_main(lambda: checkpoint_folders(folder), f"{folder} cannot be read")
    if not paths:
        raise CheckpointError(f"{folder}: no checkpoint here ({TRACKER} is missing). Check the path.")
    damaged: list[DamagedCheckpoint] = []
    for path in paths:
        try:
            verified = all(shared(together(lambda path=path: _check(path, config, resuming), f"{path} cannot be read")))
            if damaged:
                log("\n".join(f"WARNING: DAMAGED CHECKPOINT: {error}" for error in damaged))
                log(f"WARNING: {path} is used instead. Newer steps are lost: they are trained again.")
            if not verified:
                log(f"{path} is from before there were checksums: it is read without {INTEGRITY}.")
            return restore(path, verified)
        except DamagedCheckpoint as error:
            damaged.append(error)
            if config.checkpoint.strict_load:
                break
    if config.checkpoint.strict_load and len(paths) > 1:
        raise CheckpointError(f"{damaged[0]} Without --strict-load the checkpoint before it is used.")
    raise CheckpointError("\n".join(map(str, damaged)) + f"\nNo other checkpoint is in {folder}: restore it, or start anew.")


def _check(path: Path, config: Config, resuming: bool) -> bool:
    """Refuse what is damaged, would run code, or does not fit this run; False where there are no checksums."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    verified = verify(path, rank, world_size)
    check_no_code(path, rank, world_size)
    if not verified:
        check_extents(path, read_metadata(path))
    saved = run_config_of(path)
    for name in SHAPE_FIELDS:
        before, now = getattr(saved.model, name), getattr(config.model, name)
        if before != now:
            flag = "--" + name.replace("_", "-")
            raise CheckpointError(
                f"{path}: saved with {flag} {before}, this run has {now}. Use the checkpoint's shape "
                f"(--config {path / RUN_CONFIG}), or another --load."
            )
    check_adapters(saved.model, config.model, path, resuming)
    if saved.parallel.use_distributed_optimizer != config.parallel.use_distributed_optimizer and config.checkpoint.load:
        raise CheckpointError(
            f"{path}: saved with use_distributed_optimizer {saved.parallel.use_distributed_optimizer}. Resume with the "
            "same setting, or start from the weights alone with --pretrained-checkpoint."
        )
    return verified


def _read(path: Path, sharded_state: dict, verified: bool, may_lack: str = EXTRA_STATE) -> dict:
    """What the checkpoint holds of `sharded_state`; Transformer Engine's own state is not in one of local layers."""

    def read() -> tuple:
        try:
            return dist_checkpointing.load(
                sharded_state,
                str(path),
                sharded_strategy=load_strategy(),
                strict=StrictHandling.RETURN_UNEXPECTED,
            )
        except (CheckpointingException, CheckpointException, OSError, RuntimeError, EOFError) as error:
            # Verified files that cannot be read do not fit this run; an older checkpoint would not either.
            kind = CheckpointError if verified else DamagedCheckpoint
            failures = getattr(error, "failures", {None: [error]})  # torch's: by process, with traceback
            raise kind(f"{path}: cannot be loaded: {next(iter(failures.values()))[0]}") from error

    state, _, missing = together(read, f"{path} cannot be read")
    lacking = sorted(key for key in missing if not key.endswith((EXTRA_STATE, may_lack)))
    if lacking:
        raise CheckpointError(f"{path}: cannot be loaded: it holds no {', '.join(lacking[:5])}{' ...' * (len(lacking) > 5)}.")
    return state


def _model_key(model: list, index: int) -> str:
    return "model" if len(model) == 1 else f"model{index}"


def _sharded_model(model: list) -> dict:
    return {_model_key(model, index): unwrap(chunk).sharded_state_dict() for index, chunk in enumerate(model)}


def _sharded_state(model: list, optimizer, scheduler, state: TrainState, loading: bool = False) -> dict:
    sharded = _sharded_model(model)
    if optimizer is not None:
        # A copy: the optimizer must not see its own entry.
        sharded["optimizer"] = optimizer.sharded_state_dict(dict(sharded), is_loading=loading, metadata=METADATA)
        sharded["scheduler"] = scheduler.state_dict()
    sharded["train_state"] = state.position()
    return sharded


def _load_model(model: list, state: dict, fresh_adapters: bool = False) -> None:
    for index, chunk in enumerate(model):
        found = unwrap(chunk).load_state_dict(state[_model_key(model, index)], strict=False)
        unlike = [key for key in (*found.missing_keys, *found.unexpected_keys) if not key.endswith((EXTRA_STATE, SCALAR_HEAD))]
        wrong = [key for key in unlike if not (fresh_adapters and is_adapter(key))]
        assert not wrong, f"a checkpoint that was read whole does not fit the model: {wrong}"
