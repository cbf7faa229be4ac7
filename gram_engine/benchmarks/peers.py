"""The same training steps by the engine, with parts of it switched off one by one, and by what a user would run instead.

Every contestant starts from the same weights, sees the same samples, and runs in a new process, one after the other, so that
its peak memory is all that it uses.
"""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator, Literal, Optional

import torch

from gram_engine.benchmarks.command import OBJECTIVES, StepOptions
from gram_engine.benchmarks.measure import PeakMemory, in_new_processes, measure
from gram_engine.benchmarks.peer_trainers import PaddedBatch, padded_batches, transformers_step, trl_steps
from gram_engine.benchmarks.results import Row, add_ratios, table, write_rows
from gram_engine.benchmarks.throughput import VOCAB_SIZE, TimedSteps, in_words, time_steps
from gram_engine.benchmarks.workload import write_random_folder, write_workload
from gram_engine.config.parse import parse
from gram_engine.config.schema import Config
from gram_engine.config.validate import check
from gram_engine.model.shapes import resolve_shape
from gram_engine.platform import device as platforms
from gram_engine.training.session import session

BASELINE = "transformers + AdamW, padded, all logits"
TRL = "TRL SFTTrainer"
OURS = {
    "gram_engine": (),
    "  plain losses": ("--no-fused-losses",),
    "  whole last layer": ("--no-prune-last-layer",),
    "  one sample a micro-batch": (),
}


@dataclass(kw_only=True)
class Peers(StepOptions):
    """Time training steps of the engine and of what a user would run instead: the same weights and the same samples."""

    shape: str = "--num-layers 8 --hidden-size 512 --ffn-hidden-size 1536 --num-attention-heads 8 --num-query-groups 4"
    """Trainer flags of the model's shape, or e.g. --shape="--model llama-3.2-1b"."""
    load_hf: Optional[str] = None
    """Hugging Face folder with shape and weights for all, in place of --shape and random weights."""
    processes: int = 1
    """Above 1, on a CPU: also measure ours with this many data-parallel processes of one thread each."""
    vocab_size: int = VOCAB_SIZE
    """Rows of the embedding, where the shape leaves it open."""
    stages: tuple[Literal["1", "2"], ...] = ("1", "2")
    """1: learn to generate both responses. 2: learn to predict the label."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """bfloat16: ours with fp32 main parameters, theirs with fp32 weights under autocast, as their trainers do."""
    data: Optional[str] = None
    """Preference file, with --tokenizer-model; default: random tokens, samples as long as those of real preference pairs."""
    tokenizer_model: Optional[str] = None
    """Tokenizer for --data."""
    template: str = "gram-code"
    """Judge template for --data."""
    seq_length: int = 2048
    """Most tokens in a sample."""
    global_batch_size: int = 32
    """Samples in a step."""
    pack: int = 4
    """Ours: a micro-batch is a pack of up to this times --seq-length tokens."""
    peer_batch_size: int = 4
    """Theirs: samples in a padded micro-batch."""
    parts: bool = True
    """Also switch off parts of ours one by one."""
    trl: bool = True
    """Also run TRL's SFTTrainer, where trl is installed."""

    def run(self) -> None:
        """Measure; print each stage's table as soon as it is complete."""
        write_rows(self.json, [row for stage in self.stages for row in stage_rows(self, stage)])


@dataclass
class Contestant:
    """A function that makes training steps: function(options, stage, model folder, data prefix, *arguments) -> TimedSteps."""

    name: str
    function: Callable[..., TimedSteps]
    arguments: tuple = ()
    processes: dict[str, int] = field(default_factory=dict)
    """As in_new_processes takes it: count and threads."""


def stage_rows(options: Peers, stage: str) -> list[Row]:
    """One row for each contestant of a stage; prints the table."""
    with tempfile.TemporaryDirectory() as name:
        folder, prefix = Path(options.load_hf or Path(name) / "model"), Path(name) / "data"
        config = _config(options, stage, str(folder))
        if options.load_hf is None:
            write_random_folder(folder, config.model, torch.float32)
        _write_data(options, config, prefix)
        rows = []
        for one in _contestants(options, stage):
            arguments = (options, stage, str(folder), str(prefix), *one.arguments)
            hint = "Out of memory? Lower --peer-batch-size or --pack."
            found, *_ = in_new_processes(one.function, *arguments, **one.processes, hint=hint)
            rows.append(_row(options, stage, config, one.name, found))
    add_ratios(rows)
    print(table(rows), flush=True)
    product = product_tflops(config, options.dtype)
    print(f"  one product of the MLP's shapes in {options.dtype}: {product:.2f} TFLOP/s\n", flush=True)
    rows[0].figures["product_tflops"] = product
    return rows


def _contestants(options: Peers, stage: str) -> list[Contestant]:
    found = [Contestant(BASELINE, run_transformers)]
    if options.trl and importlib.util.find_spec("trl"):
        found.append(Contestant(TRL, run_trl))
    for name, flags in OURS.items():
        if name == "gram_engine" or (options.parts and not (stage == "1" and "layer" in name)):
            found.append(Contestant(name, run_ours, (flags, "one sample" not in name)))
    if options.processes > 1:
        processes = {"count": options.processes, "threads": 1}
        found.append(Contestant(f"gram_engine, {options.processes} processes of one thread", run_ours, processes=processes))
    return found


def _config(options: Peers, stage: str, folder: str, flags: tuple[str, ...] = ()) -> Config:
    shape = ["--load-hf", options.load_hf] if options.load_hf else options.shape.split()
    given = [*shape, "--objective", OBJECTIVES[stage], *flags]
    given += ["--seq-length", str(options.seq_length), "--micro-batch-size", str(options.pack)]
    given += ["--global-batch-size", str(options.global_batch_size), "--train-iters", str(options.warmup + options.steps)]
    config = parse([*given, *(["--bf16"] if options.dtype == "bfloat16" else [])])
    config.training.lr_warmup_fraction = 0.0
    resolve_shape(config)
    config.model.vocab_size = config.model.vocab_size or options.vocab_size
    config.model.load_hf = folder
    check(config, world_size=options.processes, data=False)
    return config


def _write_data(options: Peers, config: Config, prefix: Path) -> None:
    objective, samples = config.training.objective, 2 * options.global_batch_size * (options.warmup + options.steps)
    if options.data is None:
        write_workload(prefix, objective, samples, options.seq_length, config.model.vocab_size)
        return
    from gram_engine.data.preprocess import preprocess

    flags = ["--tokenizer-model", str(options.tokenizer_model), "--template", options.template]
    data = parse([*flags, "--seq-length", str(options.seq_length)]).data
    preprocess([options.data], str(prefix), objective=objective, cfg=data, both_orders=False)


def run_ours(
    options: Peers, stage: str, folder: str, prefix: str, flags: tuple[str, ...] = (), packed: bool = True
) -> TimedSteps:
    """The trainer's own steps; the peak is that of each process."""
    platforms.initialise()
    from gram_engine.training.initialise import PreparedData

    config = _config(options, stage, folder, flags)
    trainer_session = session(config, PreparedData(prefix, None, config.model.vocab_size))
    trainer_session = trainer_session if packed else _one_sample_a_microbatch(trainer_session)
    return time_steps(config, trainer_session, options.warmup, options.steps)


@contextlib.contextmanager
def _one_sample_a_microbatch(trainer_session: AbstractContextManager) -> Iterator:
    with trainer_session as trainer:
        trainer.loader.packs = lambda lengths: [[number] for number in range(len(lengths))]
        yield trainer


def run_transformers(options: Peers, stage: str, folder: str, prefix: str) -> TimedSteps:
    """A training loop as the trainers that build on transformers run it."""
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
    return _timed_steps(options, batches, seconds, losses[0], peak.bytes)


def run_trl(options: Peers, stage: str, folder: str, prefix: str) -> TimedSteps:
    """TRL's supervised trainer on the same sequences: responses (stage 1) or the label token (stage 2) carry loss."""
    platform = platforms.initialise()
    batches = padded_batches(prefix, stage, options, platform.device)
    with PeakMemory(platform.device, exact=False) as peak:
        seconds, loss = trl_steps(folder, stage, options, batches)
    return _timed_steps(options, batches, seconds, loss, peak.bytes)


def _timed_steps(
    options: Peers, batches: list[list[PaddedBatch]], seconds: list[float], first_loss: float, peak: int | None
) -> TimedSteps:
    timed = [micro_batch for step in batches[options.warmup :] for micro_batch in step]
    samples, tokens = sum(len(batch.tokens) for batch in timed), sum(int(batch.lengths.sum()) for batch in timed)
    return TimedSteps(seconds[options.warmup :], samples, tokens, first_loss, peak)


def _row(options: Peers, stage: str, config: Config, name: str, found: TimedSteps) -> Row:
    model, figures = config.model, {**found.figures(), "first_loss": found.first_loss}
    shape = {"layers": model.num_layers, "hidden": model.hidden_size, "vocabulary": model.vocab_size}
    shape |= {"samples": options.global_batch_size, "longest": options.seq_length}
    return Row(
        f"stage {stage} training step", name, shape, options.dtype, found.device, found.median_ms(), len(found.seconds),
        found.peak_bytes, BASELINE, note=f"{in_words(figures)} first loss {found.first_loss:.4f}", figures=figures,
    )  # fmt: skip


def product_tflops(config: Config, dtype: str, tokens: int = 512, seconds: float = 2.0) -> float:
    """TFLOP/s of the matrix product of the MLP's first weight and `tokens` hidden states alone, with all threads."""
    model, device = config.model, platforms.initialise().device
    rows = torch.randn(tokens, model.hidden_size, device=device).to(getattr(torch, dtype))
    weight = torch.randn(2 * model.ffn_hidden_size, model.hidden_size, device=device).to(rows.dtype)
    function = lambda: torch.nn.functional.linear(rows, weight)  # noqa: E731
    median, _, _ = measure(function, device, repeats=1000, budget_seconds=seconds)
    return 2 * tokens * weight.numel() / median / 1e12
