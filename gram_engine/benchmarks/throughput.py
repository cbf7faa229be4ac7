"""Training steps of one stage by the trainer itself: tokens/s, samples/s, TFLOP/s, MFU and peak memory at any layout."""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Literal, Optional

import tyro

from gram_engine.benchmarks.measure import PeakMemory, Row, describe, table, write_json
from gram_engine.benchmarks.workload import write_workload
from gram_engine.config.parse import fail, parse
from gram_engine.config.schema import Config, world_size
from gram_engine.config.validate import check
from gram_engine.errors import GramError
from gram_engine.log import is_main_process
from gram_engine.model.shapes import resolve_shape
from gram_engine.platform import device as platforms
from gram_engine.training.session import hush_known_warnings

VOCABULARY = 128256
OBJECTIVES = {"1": "response-lm", "2": "pair-preference"}


@dataclass
class Benchmark:
    """Time training steps of random weights; under torchrun at any layout. All further flags are the trainer's, such as
    --model llama-3.2-1b --bf16 --tensor-model-parallel-size 2; see `gram finetune --help`.

    Without --data (or --data-path) of one's own, tokens are random and as long as those of real preference pairs.
    """

    stage: Literal["1", "2"] = "2"
    """1: learn to generate both responses. 2: learn to predict the label."""
    steps: int = 5
    """Timed steps; the median counts."""
    warmup: int = 2
    """Steps before these."""
    stretch: float = 1.0
    """Lengths of the random data: times this."""
    json: Optional[str] = None
    """Write the figures to this file."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of tools/benchmark_throughput.py."""
    arguments = sys.argv[1:] if argv is None else argv
    options, flags = tyro.cli(Benchmark, args=arguments, prog="benchmark_throughput", return_unknown_args=True)
    try:
        row = benchmark(options, flags)
    except GramError as error:
        fail(error)
    if is_main_process():
        print(table([row]))
        if options.json:
            write_json(options.json, [row])


def benchmark(options: Benchmark, flags: list[str]) -> Row:
    """Measure; call it in every process."""
    config = parse(["--objective", OBJECTIVES[options.stage], *flags], "benchmark_throughput")
    config.training.train_iters = options.warmup + options.steps
    resolve_shape(config)
    own_data = bool(config.data.data or config.data.data_path)
    if config.model.vocab_size is None and not own_data:
        config.model.vocab_size = VOCABULARY
    check(config, data=own_data)
    with running_trainer(config, own_data, options.stretch) as (trainer, peak):
        seconds, batches, _ = timed_steps(trainer, options.warmup, options.steps)
    return _row(options, config, seconds, batches, peak.bytes)


@contextlib.contextmanager
def running_trainer(config: Config, own_data: bool, stretch: float) -> Iterator[tuple]:
    """A trainer, and the memory of everything that it holds and does."""
    hush_known_warnings()
    platform = platforms.initialise(config.parallel.device)
    import torch.distributed as dist
    from megatron.core import parallel_state

    from gram_engine.model.te_layers import check_gpu, start_userbuffers
    from gram_engine.training.initialise import (
        PreparedData,
        complete_vocabulary,
        prepare_data,
        start_model_parallel,
        start_processes,
    )
    from gram_engine.training.trainer import Trainer

    check_gpu(config, platform)
    start_processes(config, platform)
    try:
        start_model_parallel(config)
        start_userbuffers(config)
        with tempfile.TemporaryDirectory() as folder:
            if own_data:
                prepared = prepare_data(config)
                complete_vocabulary(config, prepared)
            else:
                prefix, size = Path(folder) / "data", 64 + 4 * config.training.global_batch_size
                vocabulary, longest = config.model.vocab_size, config.data.seq_length
                write_workload(prefix, config.training.objective, size, longest, vocabulary, stretch)
                prepared = PreparedData(str(prefix), None, config.model.vocab_size)
            with PeakMemory(platform.device, exact=False) as peak:
                yield Trainer(config, platform, prepared), peak
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def timed_steps(trainer, warmup: int, steps: int) -> tuple[list[float], list, float]:
    """(seconds and global batch of each step after the first `warmup`, the first step's loss)."""
    seconds, batches, losses = [], [], []
    for _ in range(warmup + steps):
        trainer.platform.synchronize()
        started = time.perf_counter()
        batch = trainer.batches.batch(trainer.state.consumed_samples)
        result = trainer.step(batch)
        trainer.platform.synchronize()
        trainer.state.consumed_samples += batch.num_samples
        seconds.append(time.perf_counter() - started)
        batches.append(batch)
        losses.append(result.metrics["loss"])
    return seconds[warmup:], batches[warmup:], losses[0]


def _row(options: Benchmark, config: Config, seconds: list[float], batches: list, peak: int | None) -> Row:
    from gram_engine.planning.flops import step_flops

    platform, parallel, model = platforms.initialise(config.parallel.device), config.parallel, config.model
    middle = statistics.median(seconds)
    total = sum(seconds)
    figures = {
        "tokens_per_s": sum(batch.num_tokens for batch in batches) / total,
        "samples_per_s": sum(batch.num_samples for batch in batches) / total,
        "tflops_per_device": sum(step_flops(config, batch) for batch in batches) / total / world_size() / 1e12,
    }
    peak_tflops = config.logging.peak_tflops or platform.peak_tflops()
    if peak_tflops:
        figures["mfu"] = figures["tflops_per_device"] / peak_tflops
    shape = {"layers": model.num_layers, "hidden": model.hidden_size, "vocabulary": model.vocab_size}
    shape |= {"pack": config.pack_tokens, "samples": config.training.global_batch_size}
    name = (
        f"TP{parallel.tensor_model_parallel_size} PP{parallel.pipeline_model_parallel_size} "
        f"CP{parallel.context_parallel_size} DP{config.data_parallel_size}"
    )
    dtype = "bfloat16" if config.training.bf16 else "float32"
    if config.training.fp8_format:
        dtype = f"fp8 {config.training.fp8_recipe}"
    return Row(
        f"stage {options.stage} training step, {model.model or 'model'}", name, shape, dtype, describe(platform.device),
        middle * 1e3, len(seconds), peak, name, note=in_words(figures), figures=figures,
    )  # fmt: skip


def in_words(figures: dict[str, float]) -> str:
    """The figures for people."""
    text = f"{figures['tokens_per_s']:,.0f} tokens/s, {figures['samples_per_s']:,.2f} samples/s"
    if "tflops_per_device" in figures:
        text += f", {figures['tflops_per_device']:,.2f} TFLOP/s a device"
    return f"[{text}, MFU {figures['mfu']:.1%}]" if "mfu" in figures else f"[{text}]"
