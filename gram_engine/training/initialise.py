"""Parts of a run's start-up (session.py puts them in order): process groups, seeds, preprocessed data, vocabulary size."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.distributed.rendezvous import rendezvous

from gram_engine.config.schema import Config, restarts, world_size
from gram_engine.data.dataset import PairDataset
from gram_engine.data.preprocess import ensure_preprocessed
from gram_engine.data.samples import label_ids
from gram_engine.data.template import JudgeTemplate
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import ConfigError, DataError
from gram_engine.platform.agreement import run_on_rank0
from gram_engine.platform.device import Platform


@dataclass
class PreparedData:
    """Prefixes of the preprocessed data, and the number of tokens in the tokenizer's vocabulary."""

    train_prefix: str
    valid_prefix: str | None
    tokenizer_size: int


def start_processes(config: Config, platform: Platform) -> None:
    """Initialise the default process group, from torchrun's environment; a single process needs none."""
    timeout = datetime.timedelta(minutes=_collective_minutes(config))
    if world_size() == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(platform.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        # After a restart, torchrun's store still holds the addresses of the processes that died.
        store = dist.PrefixStore(f"start-{restarts()}", store)
        dist.init_process_group(platform.backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _collective_minutes(config: Config) -> float:
    """Timeout of collectives: longer than the watchdog's, which prints what every process was doing."""
    return config.parallel.distributed_timeout_minutes + 2


def start_model_parallel(config: Config) -> None:
    """Initialise megatron-core's groups (tensor, pipeline, context, data parallel) and seeds in the default process group."""
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_size,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=_collective_minutes(config),
    )
    torch.manual_seed(config.training.seed)
    model_parallel_cuda_manual_seed(config.training.seed, force_reset_rng=True)


def prepare_data(config: Config) -> PreparedData:
    """Preprocess --data and --valid-data on rank 0, or check the data that was preprocessed before (collective).

    Raises:
        GramError: the data cannot be used (bad rows, a tokenizer that splits a label ...); every process raises it.
    """
    return run_on_rank0(lambda: _prepare_on_main(config), "the data cannot be prepared", error=DataError)


def _prepare_on_main(config: Config) -> PreparedData:
    data, objective = config.data, config.training.objective
    tokenizer = Tokenizer.load(data.tokenizer_type, data.tokenizer_model)
    train = data.data_path or ensure_preprocessed(data.data, config, objective, data.pair_order == "both")
    valid = data.valid_data_path
    if data.valid_data:
        valid = ensure_preprocessed(data.valid_data, config, objective, not config.has_scalar_head)
    # What ensure_preprocessed found or made is whole; data that somebody else made is read once, here, to know that.
    not_ours = (data.data_path, data.valid_data_path)
    opened = {prefix: PairDataset(prefix, whole=prefix in not_ours) for prefix in (train, valid) if prefix}
    given = JudgeTemplate.load(data.template).sha256 if data.template else None
    for prefix, dataset in opened.items():
        _check_manifest(prefix, dataset, config, tokenizer, given or opened[train].manifest["template"]["sha256"])
    return PreparedData(str(train), str(valid) if valid else None, tokenizer.vocab_size)


def _check_manifest(prefix: str, dataset: PairDataset, config: Config, tokenizer: Tokenizer, template: str) -> None:
    """Refuse data whose tokens this run would not have made: `template` is the hash of the run's."""
    manifest, again = dataset.manifest, f"Preprocess again: gram preprocess --output-prefix {prefix} ..."
    objective, seq_length = config.training.objective, config.data.seq_length
    if manifest["objective"] != objective:
        raise ConfigError(f"{prefix}: made for --objective {manifest['objective']}, this run's is {objective}. {again}")
    if manifest["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
        raise ConfigError(f"{prefix}: made with another tokenizer than {config.data.tokenizer_model}. {again}")
    if manifest["template"]["sha256"] != template:
        wanted = f"--template {config.data.template}" if config.data.template else "the training data's template"
        raise ConfigError(f"{prefix}: made with the template {manifest['template']['name']}, not with {wanted}. {again}")
    stored = JudgeTemplate.from_dict({k: v for k, v in manifest["template"].items() if k != "sha256"}, f"{prefix}.json")
    labels = list(label_ids(tokenizer, stored)) if objective == "pair-preference" else None
    if manifest["label_ids"] != labels:
        raise ConfigError(f"{prefix}: made for the label tokens {manifest['label_ids']}, this run's are {labels}. {again}")
    longest = int(dataset.parts.max(initial=0))
    if longest > seq_length:
        raise ConfigError(
            f"{prefix}: its longest sample has {longest} tokens, more than --seq-length {seq_length}. "
            f"Raise --seq-length to {longest}, or preprocess again."
        )
    if seq_length > manifest["seq_length"] and manifest["counts"]["truncated"]:
        raise ConfigError(
            f"{prefix}: {manifest['counts']['truncated']} samples were shortened to --seq-length {manifest['seq_length']}, "
            f"this run has {seq_length}. Use --seq-length {manifest['seq_length']}, or preprocess again."
        )
    if len(dataset) == 0:
        raise ConfigError(f"{prefix}: holds no samples. {again}")


def complete_vocabulary(config: Config, prepared: PreparedData) -> None:
    """Set vocab_size from the tokenizer where it is open.

    Raises:
        ConfigError: the model has fewer rows than the tokenizer has tokens.
    """
    model = config.model
    if model.vocab_size is None:
        model.vocab_size = prepared.tokenizer_size
    if model.vocab_size < prepared.tokenizer_size:
        raise ConfigError(
            f"--vocab-size {model.vocab_size} is smaller than the tokenizer's {prepared.tokenizer_size} tokens. "
            "Leave --vocab-size out, or use the model's own tokenizer."
        )
