"""Checkpoints in megatron-core's torch_dist format: saved at one layout, loaded at any other. Files: checkpoint_folder.py.

No random number is drawn after initialisation (dropouts are 0, the data order is a function of seed and position), so
weights, optimizer, schedule and position are all that an exact resume needs.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.validation import StrictHandling

from gram_engine.config import Config, is_main_process
from gram_engine.errors import CheckpointError
from gram_engine.model.lora import check_adapters, is_adapter
from gram_engine.model.reward_model import unwrap
from gram_engine.model.scalar_head import SCALAR_HEAD
from gram_engine.training.checkpoint_folder import (
    RUN_CONFIG,
    TRACKER,
    iteration_folder,
    latest_checkpoint,
    publish,
    run_config_of,
    write_companions,
)
from gram_engine.training.save_helper import start_save_helper

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


@dataclass
class TrainState:
    """How far a run has come."""

    iteration: int = 0
    consumed_samples: int = 0


class CheckpointSaver:
    """Writes checkpoints of one run, in the foreground or (--async-save) behind the training steps."""

    def __init__(self, config: Config, data_manifest: dict):
        self.config = config
        self.data_manifest = data_manifest
        start_save_helper()
        self.queue = AsyncCallsQueue(persistent=False) if config.checkpoint.async_save else None

    def save(self, state: TrainState, model: list, optimizer, scheduler) -> None:
        """Save to --save; every process takes part. The checkpoint counts once its folder has its final name."""
        final = iteration_folder(self.config.checkpoint.save, state.iteration)
        temporary = final.with_suffix(".tmp")
        self.finish()
        if is_main_process():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write_companions(temporary, self.config, self.data_manifest)
        dist.barrier()
        strategy = FullyParallelSaveStrategyWrapper(
            get_default_save_sharded_strategy(), parallel_state.get_data_parallel_group(with_context_parallel=True)
        )
        request = dist_checkpointing.save(
            _sharded_state(model, optimizer, scheduler, state),
            str(temporary),
            sharded_strategy=strategy,
            async_sharded_save=self.queue is not None,
            content_metadata=METADATA,
        )
        publish = partial(_publish, temporary, final)
        if self.queue is None:
            publish()
            dist.barrier()
        else:
            request.add_finalize_fn(publish)
            self.queue.schedule_async_request(request)

    def finish(self, blocking: bool = True) -> None:
        """Publish background saves that are done; wait for them when `blocking`. Every process must call it."""
        if self.queue is not None:
            self.queue.maybe_finalize_async_calls(blocking=blocking)


    def close(self) -> None:
        """Wait for and publish what is still being written."""
        self.finish()

    def drain(self) -> None:
        """Publish what is whole, after an error."""


def _publish(temporary: Path, final: Path) -> None:
    if is_main_process():
        publish(temporary, final)


def load_checkpoint(folder: str | Path, model: list, optimizer, scheduler, config: Config) -> TrainState:
    """Restore model, optimizer, schedule and position from the newest checkpoint in `folder`, saved at any layout.

    With --no-load-optim only weights and position come back; the optimizer and the schedule start anew.

    Raises:
        CheckpointError: there is none, it is of another shape, or it cannot be read.
    """
    path = _checked_path(folder, config, resuming=True)
    before, now = run_config_of(path).training.freeze, config.training.freeze
    if not config.checkpoint.load_optim:
        optimizer = None
    elif before != now:
        raise CheckpointError(
            f"{path}: saved with --freeze {before}, this run has {now}, so the optimizer's state is of other weights. Resume "
            "with the same setting, or with --no-load-optim."
        )
    state = _read(path, _sharded_state(model, optimizer, scheduler, TrainState(), loading=True))
    _load_model(model, state)
    if optimizer is not None:
        with torch.no_grad():
            optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
    return TrainState(**state["train_state"])


def load_weights(folder: str | Path, model: list, config: Config) -> None:
    """Restore the weights alone, as a starting point for another run.

    A scalar head keeps its random start where the checkpoint is a language model's, and so do adapters where it has none.

    Raises:
        CheckpointError: as for `load_checkpoint`.
    """
    path = _checked_path(folder, config, resuming=False)
    wanted, fresh_adapters = _sharded_model(model), run_config_of(path).model.lora_rank is None
    if fresh_adapters:
        wanted = {name: {key: entry for key, entry in part.items() if not is_adapter(key)} for name, part in wanted.items()}
    _load_model(model, _read(path, wanted, may_lack=SCALAR_HEAD), fresh_adapters)


def _checked_path(folder: str | Path, config: Config, resuming: bool) -> Path:
    path = latest_checkpoint(folder)
    if path is None:
        raise CheckpointError(f"{folder}: no checkpoint here ({TRACKER} is missing). Check the path.")
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
    return path


def _read(path: Path, sharded_state: dict, may_lack: str = EXTRA_STATE) -> dict:
    """What the checkpoint holds of `sharded_state`; Transformer Engine's own state is not in one of local layers."""
    try:
        state, _, missing = dist_checkpointing.load(
            sharded_state,
            str(path),
            sharded_strategy=get_default_load_sharded_strategy(str(path)),
            strict=StrictHandling.RETURN_UNEXPECTED,
        )
    except (CheckpointingException, OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path}: cannot be loaded: {error}") from error
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
    sharded["train_state"] = asdict(state)
    return sharded


def _load_model(model: list, state: dict, fresh_adapters: bool = False) -> None:
    for index, chunk in enumerate(model):
        found = unwrap(chunk).load_state_dict(state[_model_key(model, index)], strict=False)
        unlike = [key for key in (*found.missing_keys, *found.unexpected_keys) if not key.endswith((EXTRA_STATE, SCALAR_HEAD))]
        wrong = [key for key in unlike if not (fresh_adapters and is_adapter(key))]
        assert not wrong, f"a checkpoint that was read whole does not fit the model: {wrong}"
