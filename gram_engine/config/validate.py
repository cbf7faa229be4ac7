"""Refuses configurations that cannot work, each with the values and the remedy."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Iterable, Iterator

from gram_engine.config.schema import Config, ModelConfig, TrainingConfig
from gram_engine.errors import ConfigError
from gram_engine.files import missing_source_message, source_is_there

Rules = Iterator[tuple[bool, str]]
"""(violated, message) of each rule; a rule may rely on those before it, so the first violated one counts."""


def check(config: Config, world_size: int, data: bool = True) -> None:
    """Refuse combinations that cannot work. Call after `resolve_shape` and before any process group starts.

    Args:
        world_size: number of processes of the run.
        data: whether the run reads the data that the configuration names (benchmarks generate their own).

    Raises:
        ConfigError: names the values that clash and the remedy.
    """
    layout_rules = config.parallel.dims(world_size).rules(config)
    data_rules = _data_rules(config) if data else ()
    refuse(_shape_rules(config), layout_rules, _communication_rules(config), data_rules, _run_rules(config), lora_rules(config))


def refuse(*groups: Iterable[tuple[bool, str]]) -> None:
    """Raise a ConfigError with the message of the first rule that is violated."""
    for violated, message in itertools.chain(*groups):
        if violated:
            raise ConfigError(message)


def _shape_rules(config: Config) -> Rules:
    model, heads, groups = config.model, config.model.num_attention_heads, config.model.num_query_groups
    yield heads % groups != 0, f"--num-attention-heads {heads} is not a multiple of --num-query-groups {groups}."
    yield model.kv_channels % 2 != 0, f"--kv-channels {model.kv_channels} is odd: rotary embeddings rotate pairs of channels."


def _communication_rules(config: Config) -> Rules:
    parallel = config.parallel
    yield parallel.tp_comm_overlap and not parallel.sequence_parallel, (
        "--tp-comm-overlap hides the communication of sequence parallelism: add --sequence-parallel."
    )
    without = dataclasses.replace(config, parallel=dataclasses.replace(parallel, tp_comm_overlap=False))
    yield parallel.tp_comm_overlap and config.pack_tokens % without.pack_multiple != 0, (
        f"--tp-comm-overlap pads every micro-batch to --micro-batch-size x --seq-length = {config.pack_tokens} tokens, which "
        f"must be a multiple of {without.pack_multiple}. Change --seq-length."
    )
    yield parallel.overlap_param_gather and not parallel.use_distributed_optimizer, (
        "--overlap-param-gather gathers the distributed optimizer's shards: add --use-distributed-optimizer."
    )
    yield parallel.overlap_param_gather and not parallel.overlap_grad_reduce, (
        "--overlap-param-gather works only together with --overlap-grad-reduce: add it."
    )


def _precision_rules(config: Config) -> Rules:
    training, model, tp = config.training, config.model, config.parallel.tensor_model_parallel_size
    fp8 = training.fp8_format is not None
    multiple = 32 if training.fp8_recipe == "mxfp8" else 16
    widths = (model.hidden_size, model.ffn_hidden_size // tp, model.num_attention_heads * model.kv_channels // tp)
    yield fp8 and any(width % multiple for width in widths), (
        f"--fp8-recipe {training.fp8_recipe} needs matrices whose sides are multiples of {multiple}; hidden size, "
        f"feed-forward and attention width of a process are {widths}. Leave --fp8-format out, or lower TP."
    )
    yield fp8 and not training.bf16, "--fp8-format computes the rest in bfloat16: add --bf16."
    yield training.fp8_param_gather and not (fp8 and config.parallel.use_distributed_optimizer), (
        "--fp8-param-gather needs --fp8-format and --use-distributed-optimizer."
    )
    yield training.first_last_layers_bf16 and not fp8, "--first-last-layers-bf16 needs --fp8-format."
    yield training.first_last_layers_bf16 and training.fp8_recipe == "delayed", (
        "--first-last-layers-bf16 does not work with --fp8-recipe delayed. Use --fp8-recipe tensorwise."
    )
    yield fp8 and config.model.transformer_impl == "local", (
        "--fp8-format needs Transformer Engine's layers: leave --transformer-impl local out."
    )


def lora_rules(config: Config) -> Rules:
    """Rules of --lora-rank, --lora-alpha and --lora-modules."""
    model, rank = config.model, config.model.lora_rank
    unused = model.lora_alpha is not None or model.lora_modules != ModelConfig.lora_modules
    yield rank is None and unused, "--lora-alpha and --lora-modules need --lora-rank."
    if rank is None:
        return
    yield config.training.freeze is not None, "--lora-rank freezes all weights: leave --freeze out."
    yield config.has_scalar_head, (
        "--lora-rank would freeze the scalar head of --objective bradley-terry: leave it out, or use --freeze backbone."
    )
    yield rank < 1, f"--lora-rank {rank} must be at least 1. Leave it out to train all weights."
    yield model.lora_alpha <= 0, f"--lora-alpha {model.lora_alpha:g} must be positive. Leave it out for twice the rank."
    yield not model.lora_modules, "--lora-modules names no layer. Leave it out for all linear layers."
    yield config.training.fp8_format is not None, (
        "--lora-rank with --fp8-format is not tested: leave --fp8-format out to train adapters in BF16."
    )
    yield config.parallel.tp_comm_overlap, (
        "--lora-rank with --tp-comm-overlap is not tested: leave --tp-comm-overlap out."
    )


def _data_rules(config: Config) -> Rules:
    data = config.data
    yield bool(data.data) == bool(data.data_path), (
        "Give the training data once: --data FILE ... (raw) or --data-path PREFIX (from gram preprocess)."
    )
    yield bool(data.valid_data) and bool(data.valid_data_path), "Give either --valid-data or --valid-data-path."
    for file in (*data.data, *data.valid_data):
        yield not source_is_there(file), missing_source_message(file)
    for prefix in filter(None, (data.data_path, data.valid_data_path)):
        yield not Path(f"{prefix}.idx").is_file(), (
            f"{prefix}.idx: no such file. Make it with: gram preprocess --data FILE --output-prefix {prefix}"
        )
    tokenizer = data.tokenizer_model
    yield tokenizer is None, "--tokenizer-model is missing: a SentencePiece .model file or a Hugging Face folder."
    yield tokenizer is not None and not Path(tokenizer).exists(), f"--tokenizer-model {tokenizer}: no such file."
    yield data.seq_length < 1, f"--seq-length {data.seq_length} must be positive."


def _scalar_head_rules(config: Config) -> Rules:
    training, scalar = config.training, config.has_scalar_head
    yield scalar and config.data.pair_order == "both", (
        "--pair-order both would give --objective bradley-terry every pair twice: its loss is the same in both orders. "
        "Leave it out."
    )
    yield scalar and training.label_softmax != "two-token", (
        "--label-softmax is for --objective pair-preference: bradley-terry has no label tokens. Leave it out."
    )
    yield scalar and training.label_smoothing not in (0, TrainingConfig.label_smoothing), (
        f"--label-smoothing {training.label_smoothing} is for --objective pair-preference: bradley-terry (Eq. 1) does not "
        "smooth. Leave it out."
    )
    weight = training.sft_loss_weight
    yield weight < 0, f"--sft-loss-weight {weight} must be at least 0."
    yield weight > 0 and not scalar, "--sft-loss-weight regularises a scalar head: use it with --objective bradley-terry."
    yield training.freeze == "backbone" and not scalar, (
        f"--freeze backbone leaves --objective {training.objective} nothing to train: it is for bradley-terry. "
        "For the generative baseline use --freeze embeddings."
    )
    yield training.freeze == "backbone" and weight > 0, (
        "--sft-loss-weight regularises the features that --freeze backbone keeps fixed: give one of the two."
    )


def _run_rules(config: Config) -> Rules:
    training, checkpoint = config.training, config.checkpoint
    lengths = [training.train_samples, training.train_iters, training.train_epochs]
    yield sum(length is not None for length in lengths) != 1, (
        "Give the length of the run once: --train-epochs, --train-iters or --train-samples."
    )
    yield not 0 <= training.label_smoothing < 0.5, (
        f"--label-smoothing {training.label_smoothing} is the weight of the wrong label: it must be in [0, 0.5)."
    )
    yield training.label_softmax == "full-vocabulary" and not training.fused_losses, (
        "--label-softmax full-vocabulary has no plain version: leave --no-fused-losses out."
    )
    yield min(training.micro_batch_size, training.global_batch_size) < 1, "Batch sizes must be at least 1."
    yield from _scalar_head_rules(config)
    yield from _precision_rules(config)
    rows = training.logits_chunk_size
    yield rows is not None and rows < 1, f"--logits-chunk-size {rows} must be at least 1. Leave it out for the default."
    yield not 0 <= training.lr_warmup_fraction < 1, (
        f"--lr-warmup-fraction {training.lr_warmup_fraction} must be in [0, 1)."
    )
    yield checkpoint.save_interval is not None and checkpoint.save is None, "--save-interval needs --save FOLDER."
    for flag, number in (("--keep-last", checkpoint.keep_last), ("--keep-every", checkpoint.keep_every)):
        yield number is not None and number < 1, f"{flag} {number} must be at least 1. Leave it out to keep all checkpoints."
    yield checkpoint.keep_every is not None and checkpoint.keep_last is None, (
        f"--keep-every {checkpoint.keep_every} is an exception to --keep-last: give that too, or neither to keep all."
    )
    yield bool(config.model.load_hf) and bool(checkpoint.pretrained_checkpoint), (
        "--load-hf and --pretrained-checkpoint are two starting points: give one."
    )
    yield config.logging.eval_interval is not None and not (config.data.valid_data or config.data.valid_data_path), (
        "--eval-interval needs --valid-data FILE or --valid-data-path PREFIX."
    )
