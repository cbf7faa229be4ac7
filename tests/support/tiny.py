"""Flags of a tiny model, and runs of it, for tests that train."""

from __future__ import annotations

from gram_engine.config.parse import parse
from gram_engine.config.schema import Config

SHAPE = (
    "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --num-query-groups 2 "
    "--seq-length 192 --global-batch-size 8 --micro-batch-size 1 --lr 3e-3 --lr-warmup-fraction 0 --train-iters 20"
)


def tiny_config(prefix: str, tokenizer_model: str, flags: str = "") -> Config:
    """Resolved configuration of a model of two layers; tests of three or of virtual pipeline stages take six."""
    from gram_engine.model.shapes import resolve_shape

    config = parse([*SHAPE.split(), "--data-path", prefix, "--tokenizer-model", tokenizer_model, *flags.split()])
    resolve_shape(config)
    return config


def tiny_trainer(config: Config):
    """A Trainer in the process group that is up; the caller (the pool) destroys the groups."""
    from gram_engine.platform import device as platform
    from gram_engine.training.session import build_trainer

    return build_trainer(config, platform.initialise("cpu"))


def train_steps(trainer, steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm before clipping) of each of the next steps."""
    results = [trainer.advance() for _ in range(steps)]
    return [(result.metrics["loss"], result.grad_norm) for result in results]


def float64_gradients(prefix: str, tokenizer_model: str, flags: str, change=None) -> dict:
    """{"loss", "gradients": {name: array}} of one global batch in float64; under TP or PP the parameters of this rank.

    `change(trainer, batch)` may alter either before the pass.
    """
    from unittest import mock

    import torch

    from gram_engine.training import optimizer
    from gram_engine.training import trainer as trainer_module

    build, ddp_config = trainer_module.build_model, optimizer.DistributedDataParallelConfig

    def build_double(*args):
        chunks = [chunk.double() for chunk in build(*args)]
        chunks[0].config.params_dtype = chunks[0].config.pipeline_dtype = torch.float64
        return chunks

    def double_ddp_config(**fields):
        return ddp_config(**{**fields, "grad_reduce_in_fp32": False})

    with mock.patch.object(trainer_module, "build_model", build_double), mock.patch.object(
        optimizer, "DistributedDataParallelConfig", double_ddp_config
    ):
        trainer = tiny_trainer(tiny_config(prefix, tokenizer_model, flags))
    batch = trainer.loader.batch(0)
    if change is not None:
        change(trainer, batch)
    for _ in range(2):  # with overlapping communication, the first pass only counts the hooks
        metrics = trainer.forward_backward(batch)
    gradients = {
        f"{index}.{name}": parameter.main_grad.clone()
        for index, chunk in enumerate(trainer.model)
        for name, parameter in chunk.module.named_parameters()
        if parameter.requires_grad
    }
    assert all(gradient.dtype == torch.float64 for gradient in gradients.values())
    return {"loss": metrics["loss"], "gradients": {name: gradient.numpy() for name, gradient in gradients.items()}}


def packed(lengths):
    """(position ids [1, tokens], PackSequences) of consecutive whole sequences, for calling the model directly."""
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
