"""Whole stage-2 training steps on one process, with plain and with fused losses: what the losses gain end to end."""

from __future__ import annotations

import contextlib
from typing import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist

from gram_engine.benchmarks.measure import Row, add_ratios, describe, measure
from gram_engine.config.parse import parse
from gram_engine.config.schema import Config
from gram_engine.model.shapes import resolve_shape
from gram_engine.platform import device as platforms

LABEL_IDS = (32, 33)
VARIANTS = {
    "plain": ("--no-fused-losses",),
    "fused, whole last layer": ("--no-prune-last-layer",),
    "fused, pruned last layer": (),
}


@contextlib.contextmanager
def single_process(device: torch.device) -> Iterator[None]:
    """megatron-core's groups for a process on its own."""
    with process_groups(device, dist.HashStore(), 0, 1):
        yield


@contextlib.contextmanager
def process_groups(device: torch.device, store: dist.Store, rank: int, size: int) -> Iterator[None]:
    """megatron-core's groups for process `rank` of `size`, which share the batch (data parallel)."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def step_rows(model: str, layers: int | None, tokens: int, samples: int, dtype: str, repeats: int, budget: float) -> list[Row]:
    """Measure a training step (forward, backward, optimizer) of each variant on `samples` random samples.

    Call within `single_process`.
    """
    rows = []
    platform = platforms.initialise()
    for name, flags in VARIANTS.items():
        config = _config(model, layers, tokens // samples, samples, dtype, flags)
        step = make_step(config, platform, random_batch(config, samples, tokens // samples))
        seconds, done, peak = measure(step, platform.device, repeats, budget)
        sizes = {"layers": config.model.num_layers, "hidden": config.model.hidden_size}
        sizes |= {"vocabulary": config.padded_vocab_size, "tokens": tokens, "labels": samples}
        note = f"[{tokens / seconds:,.0f} tokens/s]"
        rows.append(
            Row(f"stage 2 training step, {model}", name, sizes, dtype, describe(platform.device), seconds * 1e3, done, peak,
                "plain", note=note)
        )  # fmt: skip
        del step
    add_ratios(rows)
    return rows


def _config(model: str, layers: int | None, length: int, samples: int, dtype: str, flags: tuple[str, ...]) -> Config:
    fixed = ["--objective", "pair-preference", "--model", model, "--seq-length", str(length)]
    fixed += [] if layers is None else ["--num-layers", str(layers)]
    size = ["--global-batch-size", str(samples), "--micro-batch-size", str(samples), "--train-iters", "100"]
    config = parse([*fixed, *size, *flags, *(["--bf16"] if dtype == "bfloat16" else [])])
    resolve_shape(config)
    if config.model.vocab_size is None:
        config.model.vocab_size = 512
    return config


def make_step(config: Config, platform: platforms.Platform, batch) -> Callable[[], None]:
    """A function that does one training step on the global batch, in the process groups that are up."""
    from megatron.core import parallel_state

    from gram_engine.model.build import build_model
    from gram_engine.objectives import build_objective
    from gram_engine.training.optimizer import build_optimizer, build_scheduler, connect_schedule, wrap_ddp
    from gram_engine.training.step import run_schedule

    model = wrap_ddp(build_model(config, platform), config)
    optimizer = build_optimizer(model, config)
    build_scheduler(optimizer, config, 100 * batch.num_samples)
    objective = build_objective(config, LABEL_IDS, parallel_state.get_tensor_model_parallel_group())
    connect_schedule(model, optimizer, objective, config)

    def step() -> None:
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        run_schedule(model, batch, objective, platform.device)
        optimizer.step()

    return step


def random_batch(config: Config, samples: int, length: int, microbatches: int = 1):
    """Micro-batches of `samples` random samples of equal length; in stage 1 every position but a sample's last predicts."""
    from gram_engine.data.loader import GlobalBatch, PackedBatch

    tokens = samples * length
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, config.model.vocab_size, (tokens,), generator=generator)
    positions = torch.arange(tokens)
    stage_1 = config.training.objective == "response-lm"
    rows = positions[(positions + 1) % length != 0] if stage_1 else torch.arange(1, samples + 1) * length - 1
    pack = PackedBatch(
        tokens=drawn,
        position_ids=torch.arange(length).repeat(samples),
        cu_seqlens=torch.arange(samples + 1, dtype=torch.int32) * length,
        max_seqlen=length,
        rows=rows,
        targets=drawn[rows + 1] if stage_1 else torch.empty(0, dtype=torch.int64),
        sample_ids=torch.arange(samples),
        preference=(torch.arange(samples) % 2).float(),
        weight=torch.ones(samples),
        margin=torch.zeros(samples),
    )
    total = microbatches * samples
    counts = (total, total * length, microbatches * len(rows), total * length**2)
    return GlobalBatch([pack] * microbatches, *counts, np.arange(total))
