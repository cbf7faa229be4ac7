"""A tiny model's flags and runs of it, for tests that train: shared by the parity, packing and resume tests."""

from __future__ import annotations

from gram_engine.config.parse import parse
from gram_engine.config.schema import Config

SHAPE = (
    "--num-layers 6 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --num-query-groups 2 "
    "--seq-length 192 --global-batch-size 8 --micro-batch-size 1 --lr 3e-3 --lr-warmup-fraction 0 --train-iters 20"
)


def tiny_config(prefix: str, tokenizer_model: str, flags: str = "") -> Config:
    """Resolved configuration of a six-layer model (so that 2 and 3 pipeline stages, and virtual ones, fit)."""
    from gram_engine.model.shapes import resolve_shape

    config = parse([*SHAPE.split(), "--data-path", prefix, "--tokenizer-model", tokenizer_model, *flags.split()])
    resolve_shape(config)
    return config


def tiny_trainer(config: Config):
    """A Trainer in the process group that is up; the caller (the pool) destroys the groups."""
    from gram_engine.platform import device as platform
    from gram_engine.training.initialise import complete_vocabulary, prepare_data, start_model_parallel
    from gram_engine.training.trainer import Trainer

    where = platform.initialise("cpu")
    start_model_parallel(config)
    prepared = prepare_data(config)
    complete_vocabulary(config, prepared)
    return Trainer(config, where, prepared)


def train_steps(trainer, steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the next steps, advancing the trainer's state as Trainer.train does."""
    curve = []
    for _ in range(steps):
        batch = trainer.loader.batch(trainer.state.consumed_samples)
        stats, grad_norm = trainer.step(batch)
        trainer.state.iteration += 1
        trainer.state.consumed_samples += batch.num_samples
        curve.append((trainer.objective.metrics(stats)["loss"], grad_norm))
    return curve


def float64_gradients(prefix: str, tokenizer_model: str, flags: str, change=None) -> dict:
    """Every trained parameter's gradient of one global batch, in float64, by name; under TP or PP what this rank holds.

    `change(trainer, batch)` may alter either before the pass.
    """
    from unittest import mock

    import torch

    from gram_engine.training import optimizer
    from gram_engine.training import trainer as loop
    from gram_engine.training.step import run_schedule, summed_stats

    build, ddp_config = loop.build_model, optimizer.DistributedDataParallelConfig

    def build_double(*args):
        chunks = [chunk.double() for chunk in build(*args)]
        chunks[0].config.params_dtype = chunks[0].config.pipeline_dtype = torch.float64
        return chunks

    def double_ddp_config(**fields):
        return ddp_config(**{**fields, "grad_reduce_in_fp32": False})

    with mock.patch.object(loop, "build_model", build_double), mock.patch.object(
        optimizer, "DistributedDataParallelConfig", double_ddp_config
    ):
        trainer = tiny_trainer(tiny_config(prefix, tokenizer_model, flags))
    batch = trainer.loader.batch(0)
    if change is not None:
        change(trainer, batch)
    for _ in range(2):  # under overlap the first step only counts hooks
        for chunk in trainer.model:
            chunk.zero_grad_buffer()
        results = run_schedule(trainer.model, batch, trainer.objective, trainer.platform.device)
    gradients = {
        f"{index}.{name}": parameter.main_grad.clone()
        for index, chunk in enumerate(trainer.model)
        for name, parameter in chunk.module.named_parameters()
        if parameter.requires_grad
    }
    assert all(gradient.dtype == torch.float64 for gradient in gradients.values())
    loss_sum = summed_stats(results, trainer.objective, trainer.platform.device)["loss_sum"]
    return {"loss": loss_sum, "gradients": {name: gradient.numpy() for name, gradient in gradients.items()}}


def packed(lengths):
    """(position ids [1, tokens], PackSequences) of whole sequences, one after the other, for calls of the model itself."""
    import torch

    from gram_engine.kernels.attention import AttentionBounds
    from gram_engine.model.attention import PackSequences

    numbers = torch.tensor(lengths)
    bounds, longest = torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths)
    attention = AttentionBounds.of_ranges(numbers, bounds[:-1].long(), numbers)
    sequences = PackSequences("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest, attention=attention)
    return torch.cat([torch.arange(length) for length in lengths])[None], sequences


def add_packs_without_labels(_trainer, batch) -> None:
    """Put a pack of one unlabelled sequence before and after the others."""
    extra = labelless(batch.microbatches[0])
    batch.microbatches = [extra, *batch.microbatches, extra]


def labelless(batch):
    """The same tokens as one unlabelled sequence."""
    from dataclasses import replace

    import torch

    empty = {name: getattr(batch, name)[:0] for name in ("rows", "targets", "sample_ids", "preference", "weight", "margin")}
    size = len(batch.tokens)
    bounds = torch.tensor([0, size], dtype=torch.int32)
    return replace(batch, cu_seqlens=bounds, max_seqlen=size, position_ids=torch.arange(size), **empty)
