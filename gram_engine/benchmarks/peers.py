"""The same training steps by the engine, with its parts switched off one by one, and by what a user would run instead.

Every contestant starts from the same weights, sees the same samples, and runs in a process of its own, one after the
other, so that its peak memory is everything that it holds and does.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Literal, Optional

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro

from gram_engine.benchmarks.measure import PeakMemory, Row, add_ratios, describe, measure, table, write_json
from gram_engine.benchmarks.peer_trainers import padded_batches, transformers_step, trl_steps
from gram_engine.benchmarks.random_model import write_random_folder
from gram_engine.benchmarks.throughput import OBJECTIVES, VOCABULARY, in_words, timed_steps
from gram_engine.benchmarks.workload import write_workload
from gram_engine.config.parse import fail, parse
from gram_engine.config.schema import Config
from gram_engine.config.validate import check
from gram_engine.errors import GramError
from gram_engine.model.shapes import resolve_shape
from gram_engine.platform import device as platforms
from gram_engine.training.session import hush_known_warnings

BASELINE = "transformers + AdamW, padded, all logits"
TRL = "TRL SFTTrainer"
OURS = {
    "gram_engine": (),
    "  plain losses": ("--no-fused-losses",),
    "  whole last layer": ("--no-prune-last-layer",),
    "  one sample a micro-batch": (),
}


@dataclass
class Benchmark:
    """Time training steps of the engine and of what a user would run instead: the same weights and the same samples."""

    shape: str = "--num-layers 8 --hidden-size 512 --ffn-hidden-size 1536 --num-attention-heads 8 --num-query-groups 4"
    """Trainer flags of the model's shape, or e.g. --shape="--model llama-3.2-1b"."""
    load_hf: Optional[str] = None
    """Hugging Face folder whose shape and weights all start from, in place of --shape and random weights."""
    processes: int = 1
    """Above 1, on a CPU: ours also as so many data-parallel processes with one thread each."""
    vocab_size: int = VOCABULARY
    """Rows of the embedding, where the shape leaves it open."""
    stages: tuple[Literal["1", "2"], ...] = ("1", "2")
    """1: learn to generate both responses. 2: learn to predict the label."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """bfloat16: ours with fp32 main parameters, theirs with fp32 weights under autocast, as their trainers do."""
    data: Optional[str] = None
    """Preference file whose lengths count, with --tokenizer-model; default: random tokens, lengths of real pairs."""
    tokenizer_model: Optional[str] = None
    """Tokenizer for --data."""
    template: str = "gram-code"
    """Judge template for --data."""
    seq_length: int = 2048
    """Most tokens in a sample."""
    global_batch_size: int = 32
    """Samples in a step."""
    pack: int = 4
    """Ours: a micro-batch is one pack of this times --seq-length tokens."""
    peer_batch_size: int = 4
    """Theirs: samples in a padded micro-batch."""
    steps: int = 3
    """Timed steps; the median counts."""
    warmup: int = 1
    """Steps before these."""
    parts: bool = True
    """Also switch off parts of ours one by one."""
    trl: bool = True
    """Also run TRL's SFTTrainer, where trl is installed."""
    json: Optional[str] = None
    """Write the figures to this file."""


@dataclass
class Result:
    """What one contestant's process found."""

    seconds: list[float]
    samples: int
    tokens: int
    peak: int | None
    loss: float
    flops: float = 0.0
    """Of the timed steps, as the trainer counts them."""
    device: str = field(default_factory=lambda: describe(platforms.initialise().device))


def main(argv: list[str] | None = None) -> None:
    """Entry point of tools/benchmark_peers.py."""
    options = tyro.cli(Benchmark, args=sys.argv[1:] if argv is None else argv, prog="benchmark_peers")
    try:
        rows = [row for stage in options.stages for row in stage_rows(options, stage)]
    except GramError as error:
        fail(error)
    if options.json:
        write_json(options.json, rows)


def stage_rows(options: Benchmark, stage: str) -> list[Row]:
    """Every contestant of a stage; prints the table."""
    with tempfile.TemporaryDirectory() as name:
        folder, prefix = Path(options.load_hf or Path(name) / "model"), Path(name) / "data"
        config = _config(options, stage, str(folder), str(prefix))
        if options.load_hf is None:
            write_random_folder(folder, config.model, torch.float32)
        _write_data(options, config, prefix)
        rows = [
            _row(options, stage, config, contestant, _in_own_process(function, options, stage, str(folder), str(prefix), *more))
            for contestant, function, more in _contestants(options, stage)
        ]
    add_ratios(rows)
    print(table(rows), flush=True)
    product = product_tflops(config, options.dtype)
    print(f"  one product of the MLP's shapes in {options.dtype}: {product:.2f} TFLOP/s\n", flush=True)
    rows[0].figures["product_tflops"] = product
    return rows


def _contestants(options: Benchmark, stage: str) -> list[tuple[str, Callable, tuple]]:
    """(name, function, its further arguments)."""
    found = [(BASELINE, run_transformers, ())]
    if options.trl and importlib.util.find_spec("trl"):
        found.append((TRL, run_trl, ()))
    for name, flags in OURS.items():
        if name == "gram_engine" or (options.parts and not (stage == "1" and "layer" in name)):
            found.append((name, run_ours, (flags, "one sample" not in name)))
    if options.processes > 1:
        found.append((f"gram_engine, {options.processes} processes of one thread", run_data_parallel, ()))
    return found


def _config(options: Benchmark, stage: str, folder: str, prefix: str, flags: tuple[str, ...] = ()) -> Config:
    shape = ["--load-hf", options.load_hf] if options.load_hf else options.shape.split()
    given = [*shape, "--objective", OBJECTIVES[stage], "--data-path", prefix, *flags]
    given += ["--seq-length", str(options.seq_length), "--micro-batch-size", str(options.pack)]
    given += ["--global-batch-size", str(options.global_batch_size), "--train-iters", str(options.warmup + options.steps)]
    config = parse([*given, *(["--bf16"] if options.dtype == "bfloat16" else [])])
    config.training.lr_warmup_fraction = 0.0
    resolve_shape(config)
    config.model.vocab_size = config.model.vocab_size or options.vocab_size
    config.model.load_hf = folder
    check(config, data=False)
    return config


def _write_data(options: Benchmark, config: Config, prefix: Path) -> None:
    objective, samples = config.training.objective, 2 * options.global_batch_size * (options.warmup + options.steps)
    if options.data is None:
        write_workload(prefix, objective, samples, options.seq_length, config.model.vocab_size)
        return
    from gram_engine.data.preprocess import preprocess

    flags = ["--tokenizer-model", str(options.tokenizer_model), "--template", options.template]
    data = parse([*flags, "--seq-length", str(options.seq_length)]).data
    preprocess([options.data], str(prefix), objective=objective, cfg=data, both_orders=False)


def _in_own_process(function: Callable[..., Result], *arguments: Any) -> Result:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        remedy = "Out of memory? Lower --peer-batch-size or --pack."
        raise GramError(f"{function.__name__} died: its output is above. {remedy}") from None
    finally:
        process.join()
    return result


def _answer(connection, function: Callable[..., Result], arguments: tuple) -> None:
    hush_known_warnings()
    connection.send(function(*arguments))


def run_ours(options: Benchmark, stage: str, folder: str, prefix: str, flags: tuple[str, ...], packed: bool) -> Result:
    """The trainer's own steps."""
    return _our_steps(options, stage, folder, prefix, flags, packed, dist.HashStore(), 0, 1)


def run_data_parallel(options: Benchmark, stage: str, folder: str, prefix: str) -> Result:
    """The trainer's steps in several data-parallel processes of one thread each; the peak is that of the first."""
    with tempfile.TemporaryDirectory() as name:
        store = str(Path(name) / "store")
        arguments = (options, stage, folder, prefix, store)
        spawn, ranks = mp.get_context("spawn"), range(1, options.processes)
        others = [spawn.Process(target=_data_parallel, args=(*arguments, rank)) for rank in ranks]
        for process in others:
            process.start()
        result = _data_parallel(*arguments, 0)
        for process in others:
            process.join()
    return result


def _data_parallel(options: Benchmark, stage: str, folder: str, prefix: str, store: str, rank: int) -> Result:
    hush_known_warnings()
    os.environ.update(OMP_NUM_THREADS="1", WORLD_SIZE=str(options.processes), RANK=str(rank))
    torch.set_num_threads(1)
    return _our_steps(
        options, stage, folder, prefix, (), True, dist.FileStore(store, options.processes), rank, options.processes
    )


def _our_steps(
    options: Benchmark, stage: str, folder: str, prefix: str, flags: tuple[str, ...], packed: bool, *group
) -> Result:
    from gram_engine.benchmarks.steps import process_groups
    from gram_engine.planning.flops import step_flops
    from gram_engine.training.initialise import PreparedData

    config, platform = _config(options, stage, folder, prefix, flags), platforms.initialise()
    with process_groups(platform.device, *group), PeakMemory(platform.device, exact=False) as peak:
        from gram_engine.training.trainer import Trainer

        trainer = Trainer(config, platform, PreparedData(prefix, None, config.model.vocab_size))
        if not packed:
            trainer.loader.packs = lambda lengths: [[number] for number in range(len(lengths))]
        seconds, batches, loss = timed_steps(trainer, options.warmup, options.steps)
    samples, tokens = (sum(getattr(batch, name) for batch in batches) for name in ("num_samples", "num_tokens"))
    return Result(seconds, samples, tokens, peak.bytes, loss, sum(step_flops(config, batch) for batch in batches))


def run_transformers(options: Benchmark, stage: str, folder: str, prefix: str) -> Result:
    """A training loop as their trainers run it."""
    platform = platforms.initialise()
    batches = padded_batches(prefix, stage, options, platform.device)
    with PeakMemory(platform.device, exact=False) as peak:
        step = transformers_step(folder, stage, options.dtype, platform.device)
        seconds, losses = [], []
        for micro_batches in batches:
            platform.synchronize()
            started = time.perf_counter()
            losses.append(step(micro_batches))
            platform.synchronize()
            seconds.append(time.perf_counter() - started)
    return _result(options, batches, seconds, peak.bytes, losses[0])


def run_trl(options: Benchmark, stage: str, folder: str, prefix: str) -> Result:
    """TRL's supervised trainer on the same sequences: responses (stage 1), or the label token (stage 2), carry loss."""
    platform = platforms.initialise()
    batches = padded_batches(prefix, stage, options, platform.device)
    with PeakMemory(platform.device, exact=False) as peak:
        seconds, loss = trl_steps(folder, stage, options, batches)
    return _result(options, batches, seconds, peak.bytes, loss)


def _result(options: Benchmark, batches: list, seconds: list[float], peak: int | None, loss: float) -> Result:
    timed = [micro_batch for step in batches[options.warmup :] for micro_batch in step]
    samples, tokens = sum(len(batch.tokens) for batch in timed), sum(int(batch.lengths.sum()) for batch in timed)
    return Result(seconds[options.warmup :], samples, tokens, peak, loss)


def _row(options: Benchmark, stage: str, config: Config, name: str, found: Result) -> Row:
    model, total = config.model, sum(found.seconds)
    figures = {"tokens_per_s": found.tokens / total, "samples_per_s": found.samples / total, "first_loss": found.loss}
    if found.flops:
        figures["tflops_per_device"] = found.flops / total / 1e12
    shape = {"layers": model.num_layers, "hidden": model.hidden_size, "vocabulary": model.vocab_size}
    shape |= {"samples": options.global_batch_size, "longest": options.seq_length}
    note = f"{in_words(figures)} first loss {found.loss:.4f}"
    return Row(
        f"stage {stage} training step", name, shape, options.dtype, found.device, statistics.median(found.seconds) * 1e3,
        len(found.seconds), found.peak, BASELINE, note=note, figures=figures,
    )  # fmt: skip


def product_tflops(config: Config, dtype: str, tokens: int = 512, seconds: float = 2.0) -> float:
    """TFLOP/s of nothing but the matrix product of the MLP's first weight with `tokens` hidden rows, all threads."""
    model, device = config.model, platforms.initialise().device
    rows = torch.randn(tokens, model.hidden_size, device=device).to(getattr(torch, dtype))
    weight = torch.randn(2 * model.ffn_hidden_size, model.hidden_size, device=device).to(rows.dtype)
    function = lambda: torch.nn.functional.linear(rows, weight)  # noqa: E731
    median, _, _ = measure(function, device, repeats=1000, budget_seconds=seconds)
    return 2 * tokens * weight.numel() / median / 1e12
