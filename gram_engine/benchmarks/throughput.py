"""Training steps by the trainer itself, at any layout: their speed and memory, and what saving in the background costs."""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from gram_engine.benchmarks.command import StepOptions, TrainerOptions
from gram_engine.benchmarks.measure import PeakMemory, describe
from gram_engine.benchmarks.results import Row, add_ratios, table, write_rows
from gram_engine.benchmarks.workload import demonstration_data, random_session
from gram_engine.config.schema import Config
from gram_engine.config.validate import check
from gram_engine.log import log
from gram_engine.platform import device as platforms
from gram_engine.platform.environment import world_size
from gram_engine.training.session import session

VOCAB_SIZE = 128256


@dataclass
class TimedSteps:
    """Consecutive training steps: seconds of each, and totals over the whole global batches."""

    seconds: list[float]
    samples: int
    tokens: int
    first_loss: float
    """Loss of the first step, which may be a warm-up step."""
    peak_bytes: int | None
    flops: float = 0.0
    """Floating-point operations as the trainer counts them; 0: not counted."""
    device: str = field(default_factory=lambda: describe(platforms.initialise().device))

    def median_ms(self) -> float:
        """Median milliseconds of a step."""
        return statistics.median(self.seconds) * 1e3

    def figures(self) -> dict[str, float]:
        """tokens_per_s and samples_per_s of all devices, and tflops_per_device."""
        total = sum(self.seconds)
        found = {"tokens_per_s": self.tokens / total, "samples_per_s": self.samples / total}
        if self.flops:
            found["tflops_per_device"] = self.flops / total / world_size() / 1e12
        return found


def time_steps(config: Config, trainer_session: AbstractContextManager, warmup: int, steps: int) -> TimedSteps:
    """Time `steps` steps after `warmup` ones. The peak includes weights, optimizer state and data: all that the session makes.

    Every process of the session calls it.
    """
    platform = platforms.initialise(config.parallel.device)
    import gram_engine.training.trainer  # noqa: F401  before the peak's start: the memory of libraries is not counted

    seconds, results = [], []
    with PeakMemory(platform.device, exact=False) as peak, trainer_session as trainer:
        for _ in range(warmup + steps):
            platform.synchronize()
            started = time.perf_counter()
            results.append(trainer.advance())
            platform.synchronize()
            seconds.append(time.perf_counter() - started)
    timed = results[warmup:]
    samples, tokens, flops = (sum(getattr(step, name) for step in timed) for name in ("num_samples", "num_tokens", "flops"))
    first_loss = results[0].metrics["loss"]
    return TimedSteps(seconds[warmup:], samples, tokens, first_loss, peak.bytes, flops, describe(platform.device))


def in_words(figures: dict[str, float]) -> str:
    """The figures for the note of a table's row."""
    text = f"{figures['tokens_per_s']:,.0f} tokens/s, {figures['samples_per_s']:,.2f} samples/s"
    if "tflops_per_device" in figures:
        text += f", {figures['tflops_per_device']:,.2f} TFLOP/s a device"
    return f"[{text}, MFU {figures['mfu']:.1%}]" if "mfu" in figures else f"[{text}]"


@dataclass(kw_only=True)
class Throughput(StepOptions, TrainerOptions):
    """Time training steps from random weights; under torchrun at any layout. All other flags go to the trainer, such as
    --model llama-3.2-1b --bf16 --tensor-model-parallel-size 2; see `gram finetune --help`.

    Without --data or --data-path, tokens are random and samples are as long as those of real preference pairs.
    """

    steps: int = 5
    warmup: int = 2
    stretch: float = 1.0
    """Random data: factor on the lengths of samples."""

    def run(self) -> None:
        """Measure, print and write; every process calls it."""
        config = self.config()
        config.training.train_iters = self.warmup + self.steps
        own_data = bool(config.data.data or config.data.data_path)
        if config.model.vocab_size is None and not own_data:
            config.model.vocab_size = VOCAB_SIZE
        check(config, world_size(), data=own_data)
        trainer_session = session(config) if own_data else random_session(config, stretch=self.stretch)
        row = self._row(config, time_steps(config, trainer_session, self.warmup, self.steps))
        log(table([row]))
        write_rows(self.json, [row])

    def _row(self, config: Config, found: TimedSteps) -> Row:
        parallel, model, figures = config.parallel, config.model, found.figures()
        peak_tflops = config.logging.peak_tflops or platforms.initialise(parallel.device).peak_tflops()
        if peak_tflops:
            figures["mfu"] = figures["tflops_per_device"] / peak_tflops
        shape = _shape(config) | {"pack": config.pack_tokens, "samples": config.training.global_batch_size}
        layout = (
            f"TP{parallel.tensor_model_parallel_size} PP{parallel.pipeline_model_parallel_size} "
            f"CP{parallel.context_parallel_size} DP{parallel.dims(world_size()).data_parallel_size}"
        )
        return Row(
            f"stage {self.stage} training step, {model.model or 'model'}", layout, shape, _precision(config), found.device,
            found.median_ms(), len(found.seconds), found.peak_bytes, layout, note=in_words(figures), figures=figures,
        )  # fmt: skip


@dataclass(kw_only=True)
class Saving(TrainerOptions):
    """Time training steps on the demonstration data with --async-save and without saving, in turns within one process; under
    torchrun at any layout. All other flags go to the trainer, such as --model tiny --seq-length 512 --global-batch-size 16.

    On a CPU, leave a core to the process that writes (OMP_NUM_THREADS), as every GPU has one.
    """

    interval: int = 20
    """Training steps between two checkpoints."""
    rounds: int = 3
    """How often each of the two is measured."""

    def run(self) -> None:
        """Measure, print and write; every process calls it."""
        with tempfile.TemporaryDirectory() as folder:
            files = demonstration_data(Path(folder))
            config = self.config("--train-iters", "100000", "--vocab-size", str(VOCAB_SIZE), *files)
            config.checkpoint.save, config.checkpoint.async_save, config.checkpoint.keep_last = f"{folder}/run", True, 1
            check(config, world_size())
            with session(config) as trainer:
                rows = self._rows(trainer)
        log(table(rows))
        write_rows(self.json, rows)

    def _rows(self, trainer) -> list[Row]:
        config, steps = trainer.config, self.rounds * self.interval
        _seconds(trainer, self.interval, save=True)  # warm-up of both
        seconds = {"no saving": 0.0, "saving": 0.0}
        for _ in range(self.rounds):
            seconds["no saving"] += _seconds(trainer, self.interval, save=False)
            seconds["saving"] += _seconds(trainer, self.interval, save=True)
        size = sum(file.stat().st_size for file in Path(config.checkpoint.save).rglob("iter_*/*.distcp"))
        name, device = f"stage {self.stage} step with --async-save every {self.interval} steps", trainer.platform.device
        rows = [
            Row(
                name, kind, _shape(config), _precision(config), describe(device), total / steps * 1e3, steps, None,
                "no saving", figures={"checkpoint_bytes": size},
            )
            for kind, total in seconds.items()
        ]  # fmt: skip
        add_ratios(rows)
        return rows


def _seconds(trainer, steps: int, save: bool) -> float:
    """Seconds of `steps` training steps; `save`: a checkpoint is begun before the first and complete after the last."""
    trainer.platform.synchronize()
    started = time.perf_counter()
    if save:
        trainer.save()
    for _ in range(steps):
        trainer.advance()
        trainer.saver.finish(blocking=False)
    trainer.saver.finish()
    trainer.platform.synchronize()
    return time.perf_counter() - started


def _shape(config: Config) -> dict[str, int]:
    model = config.model
    return {"layers": model.num_layers, "hidden": model.hidden_size, "vocabulary": model.vocab_size}


def _precision(config: Config) -> str:
    if config.training.fp8_format:
        return f"fp8 {config.training.fp8_recipe}"
    return "bfloat16" if config.training.bf16 else "float32"
