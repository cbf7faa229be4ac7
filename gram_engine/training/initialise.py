"""Parts of a run's start-up (session.py puts them in order): process groups, seeds, preprocessed data, vocabulary size."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.distributed.rendezvous import rendezvous

from gram_engine.config.schema import Config
from gram_engine.data.dataset import PairDataset
from gram_engine.data.preprocess import ensure_preprocessed
from gram_engine.data.samples import label_ids
from gram_engine.data.template import JudgeTemplate
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import ConfigError, DataError
from gram_engine.platform.agreement import run_on_rank0
from gram_engine.platform.device import Platform
from gram_engine.platform.environment import restarts, world_size


@dataclass
class PreparedData:
    """Preprocessed data by prefix, and the size of the tokenizer's vocabulary; rank 0 keeps what it has opened already."""

    train_prefix: str
    valid_prefix: str | None
    tokenizer_size: int
    opened: dict[str, PairDataset] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None

    def dataset(self, prefix: str) -> PairDataset:
        """The data set at `prefix`, opened once."""
        return self.opened[prefix] if prefix in self.opened else PairDataset(prefix)


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
    kept: PreparedData | None = None

    def prepare() -> PreparedData:
        nonlocal kept
        kept = _prepare_on_main(config)
        return replace(kept, opened={}, tokenizer=None)

    sent = run_on_rank0(prepare, "the data cannot be prepared", error=DataError)
    return kept or sent


def _prepare_on_main(config: Config) -> PreparedData:
    data = config.data
    tokenizer = Tokenizer.load(data.tokenizer_type, data.tokenizer_model)

    def opened(prefix: str | None, files: tuple, both_orders: bool) -> PairDataset | None:
        if prefix:
            return PairDataset(prefix, whole=True)  # made by somebody else: its tokens are read once, here
        return ensure_preprocessed(files, config, both_orders, tokenizer) if files else None

    train = opened(data.data_path, data.data, data.pair_order == "both")
    valid = opened(data.valid_data_path, data.valid_data, config.task.order_matters)
    given = JudgeTemplate.load(data.template).sha256 if data.template else train.manifest.template["sha256"]
    datasets = {dataset.prefix: dataset for dataset in (train, valid) if dataset is not None}
    for prefix, dataset in datasets.items():
        check_data(prefix, dataset, config, tokenizer, given)
    return PreparedData(train.prefix, valid.prefix if valid else None, tokenizer.vocab_size, datasets, tokenizer)


def check_data(prefix: str, dataset: PairDataset, config: Config, tokenizer: Tokenizer, template: str) -> None:
    """Refuse data whose samples this run would not have made.

    Args:
        template: sha256 of the run's judge template.

    Raises:
        ConfigError: names what differs.
    """
    manifest, again = dataset.manifest, f"Preprocess again: gram preprocess --output-prefix {prefix} ..."
    task, seq_length = config.task, config.data.seq_length
    if manifest.task.text != task.text:
        raise ConfigError(f"{prefix}: made for --objective {manifest.objective}, this run's is {task.name}. {again}")
    if manifest.tokenizer["fingerprint"] != tokenizer.fingerprint:
        raise ConfigError(f"{prefix}: made with another tokenizer than {config.data.tokenizer_model}. {again}")
    if manifest.template["sha256"] != template:
        wanted = f"--template {config.data.template}" if config.data.template else "the training data's template"
        raise ConfigError(f"{prefix}: made with the template {manifest.template['name']}, not with {wanted}. {again}")
    labels = list(label_ids(tokenizer, manifest.judge_template(f"{prefix}.json"))) if task.has_label_tokens else None
    if manifest.label_ids != labels:
        raise ConfigError(f"{prefix}: made for the label tokens {manifest.label_ids}, this run's are {labels}. {again}")
    longest = int(dataset.parts.max(initial=0))
    if longest > seq_length:
        raise ConfigError(
            f"{prefix}: its longest sample has {longest} tokens, more than --seq-length {seq_length}. "
            f"Raise --seq-length to {longest}, or preprocess again."
        )
    truncated = manifest.counts["truncated"]
    if seq_length > manifest.seq_length and truncated:
        raise ConfigError(
            f"{prefix}: {truncated} samples were shortened to --seq-length {manifest.seq_length}, "
            f"this run has {seq_length}. Use --seq-length {manifest.seq_length}, or preprocess again."
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
