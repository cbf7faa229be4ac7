"""Checkpoints in megatron-core's torch_dist format: saved with one parallel layout, loaded with any other. Files: folder.py.

No random number is drawn after initialisation (dropout is 0, the data order is a function of seed and position), so weights,
optimizer, schedule and position are all that an exact resume needs.
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
    write_metadata_files,
)
from gram_engine.checkpoint.integrity import INTEGRITY, DamagedCheckpoint, check_extents, verify
from gram_engine.checkpoint.run_lock import RunLock
from gram_engine.checkpoint.safe_pickle import check_no_code, read_metadata
from gram_engine.checkpoint.writer import PendingCheckpoint
from gram_engine.config.schema import Config
from gram_engine.data.manifest import Manifest
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import CheckpointError, GramError
from gram_engine.log import log
from gram_engine.model.lora import check_adapters, is_adapter
from gram_engine.model.reward_model import unwrap
from gram_engine.model.scalar_head import SCALAR_HEAD
from gram_engine.platform.agreement import all_gather, raise_on_any_rank, run_on_rank0
from gram_engine.platform.stack import load_strategy

__all__ = ["CheckpointSaver", "TrainState", "candidates", "latest_checkpoint", "load_checkpoint", "load_weights"]

T = TypeVar("T")

# Optimizer state by model parameter: the format that can be loaded with any TP, PP and DP.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}

EXTRA_STATE = "_extra_state"
"""Suffix of the keys of Transformer Engine's scaling factors; without them FP8 starts as in a new run."""

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
"""How long a process that ends with an error waits for its part of a checkpoint that is being written."""


@dataclass
class TrainState:
    """Position of a run."""

    iteration: int = 0
    consumed_samples: int = 0
    resumed_from: Path | None = None
    """The checkpoint that this run resumed from, which --keep-last does not remove."""

    def position(self) -> dict[str, int]:
        """The part that is stored in a checkpoint."""
        return {"iteration": self.iteration, "consumed_samples": self.consumed_samples}


class CheckpointSaver:
    """Writes checkpoints of one run, in the foreground or (--async-save) while training goes on.

    All methods but `drain` are collective. A checkpoint becomes visible when its folder gets its final name; a failure before
    that leaves the older checkpoints unchanged.
    """

    def __init__(self, config: Config, data_manifest: Manifest, tokenizer: Tokenizer | None = None):
        self.config = config
        self.data_manifest = data_manifest
        self.tokenizer = tokenizer
        self.pending: PendingCheckpoint | None = None
        self.resumed_from: Path | None = None
        self.lock: RunLock | None = None

    def save(self, state: TrainState, model: list, optimizer, scheduler) -> None:
        """Save to --save, or with --async-save start to.

        Raises:
            CheckpointError: the disk is too full, or a process cannot write; also if the previous save, in the background,
                failed.
        """
        self.finish()
        final = iteration_folder(self.config.checkpoint.save, state.iteration)
        failure = self._failure(final)
        temporary = run_on_rank0(lambda: self._prepare(final), *failure)
        try:
            content = {**_sharded_state(model, optimizer, scheduler, state), "content_metadata": METADATA}
            pending = PendingCheckpoint(content, temporary, final)
            total_bytes = sum(all_gather(pending.nbytes))
            raise_on_any_rank(lambda: pending.check_room(total_bytes), *failure)
            in_background = self.config.checkpoint.async_save
            raise_on_any_rank(lambda: pending.write(self._write_metadata_files, in_background), *failure)
        except GramError:
            _discard(temporary)
            raise
        self.pending, self.resumed_from = pending, state.resumed_from
        if not in_background:
            self.finish()

    def finish(self, blocking: bool = True) -> None:
        """Complete the checkpoint that is being written, if there is one; unless `blocking`, only if all its files are written.

        Raises:
            CheckpointError: a process could not write.
        """
        pending = self.pending
        if pending is None or (not blocking and any(all_gather(pending.running()))):
            return
        self.pending = None
        failure = self._failure(pending.final)
        try:
            raise_on_any_rank(pending.wait, *failure)
            run_on_rank0(lambda: self._complete(pending), *failure)
        except GramError:
            _discard(pending.temporary)
            raise

    def drain(self) -> None:
        """Complete the checkpoint that is being written when training ends with an error. Not collective; never raises."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            pending.wait(DRAIN_SECONDS)
            if pending.rank == 0:
                self._complete(pending)
                log(f"saved {pending.final}, which was being written when training ended")
        except Exception as error:
            log(f"WARNING: {pending.final} was being written when training ended, and cannot be completed: {error}")

    def _failure(self, final: Path) -> tuple[str, str]:
        remedy = f"Older checkpoints are unchanged: free space or repair the disk, then resume with --load {final.parent}"
        return f"{final} cannot be saved", f"{remedy}."

    def _prepare(self, final: Path) -> Path:
        self._check_lock()
        final.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(final.parent)
        if self.tokenizer is None:
            self.tokenizer = Tokenizer.load(self.config.data.tokenizer_type, self.config.data.tokenizer_model)
        # A unique name: the writer process of a run that was killed may still be writing.
        temporary = final.with_suffix(f".{uuid.uuid4().hex[:8]}.tmp")
        temporary.mkdir()
        return temporary

    def _write_metadata_files(self, folder: Path) -> None:
        write_metadata_files(folder, self.config, self.data_manifest, self.tokenizer)

    def _check_lock(self) -> None:
        if self.lock is not None:
            self.lock.check()

    def _complete(self, pending: PendingCheckpoint) -> None:
        self._check_lock()
        pending.complete()
        options = self.config.checkpoint
        protected = [pending.final, *filter(None, [self.resumed_from])]
        try:
            prune(pending.final.parent, options.keep_last, options.keep_every, protected)
        except OSError as error:
            log(f"WARNING: --keep-last cannot remove old checkpoints: {error}")


def _discard(temporary: Path) -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)


def load_checkpoint(folder: str | Path, model: list, optimizer, scheduler, config: Config) -> TrainState:
    """Restore model, optimizer, schedule and position from the newest checkpoint in `folder`, whatever layout saved it.

    If it is damaged, the log names it and the one before it is loaded. With --no-load-optim only weights and position are
    loaded; optimizer and schedule start as in a new run.

    Raises:
        CheckpointError: there is none, or it is of a model of another shape, would run code, or cannot be read; with
            --strict-load also if the newest is damaged.
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
    """Restore the weights alone, to start another run from them.

    A scalar head keeps its random values if the checkpoint is of a language model, and so do adapters if it has none.

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
    """Call restore(path, verified) for the newest intact checkpoint, the same on every process."""
    paths = run_on_rank0(lambda: checkpoint_folders(folder), f"{folder} cannot be read")
    if not paths:
        raise CheckpointError(f"{folder}: no checkpoint here ({TRACKER} is missing). Check the path.")
    damaged: list[DamagedCheckpoint] = []
    for path in paths:
        try:
            checked = raise_on_any_rank(lambda path=path: _check(path, config, resuming), f"{path} cannot be read")
            verified = all(all_gather(checked))
            if damaged:
                log("\n".join(f"WARNING: DAMAGED CHECKPOINT: {error}" for error in damaged))
                log(f"WARNING: {path} is used instead. The steps after it are lost and will be trained again.")
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
    """Refuse a checkpoint that is damaged, would run code, or does not fit this run. Returns whether it has checksums."""
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
    """Load `sharded_state` from a checkpoint.

    Args:
        may_lack: suffix of keys that the checkpoint need not have, besides Transformer Engine's extra state, which local
            layers do not save.
    """

    def read() -> tuple:
        try:
            return dist_checkpointing.load(
                sharded_state,
                str(path),
                sharded_strategy=load_strategy(),
                strict=StrictHandling.RETURN_UNEXPECTED,
            )
        except (CheckpointingException, CheckpointException, OSError, RuntimeError, EOFError) as error:
            # Verified files that cannot be loaded do not fit this run, and nor would those of an older checkpoint.
            kind = CheckpointError if verified else DamagedCheckpoint
            failures = getattr(error, "failures", {None: [error]})  # of torch's exception: {rank: (error, traceback)}
            raise kind(f"{path}: cannot be loaded: {next(iter(failures.values()))[0]}") from error

    state, _, missing = raise_on_any_rank(read, f"{path} cannot be read")
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
        # A copy, so that the optimizer does not see its own entry.
        sharded["optimizer"] = optimizer.sharded_state_dict(dict(sharded), is_loading=loading, metadata=METADATA)
        sharded["scheduler"] = scheduler.state_dict()
    sharded["train_state"] = state.position()
    return sharded


def _load_model(model: list, state: dict, fresh_adapters: bool = False) -> None:
    for index, chunk in enumerate(model):
        found = unwrap(chunk).load_state_dict(state[_model_key(model, index)], strict=False)
        unlike = [key for key in (*found.missing_keys, *found.unexpected_keys) if not key.endswith((EXTRA_STATE, SCALAR_HEAD))]
        wrong = [key for key in unlike if not (fresh_adapters and is_adapter(key))]
        assert not wrong, f"keys of the checkpoint do not fit the model: {wrong}"
