"""What saving in the background costs: training steps with a checkpoint every so many steps against steps without.

    python tools/benchmark_saving.py --model tiny --seq-length 512 --global-batch-size 16 --json FILE

Trains on the demonstration data, both ways in turns within one process.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import tyro

from gram_engine.benchmarks.measure import Row, add_ratios, describe, table, write_json
from gram_engine.benchmarks.soak import make_files
from gram_engine.benchmarks.throughput import OBJECTIVES, VOCABULARY, running_trainer
from gram_engine.config.parse import fail, parse
from gram_engine.config.schema import Config
from gram_engine.config.validate import check
from gram_engine.errors import GramError
from gram_engine.log import is_main_process
from gram_engine.model.shapes import resolve_shape


@dataclass
class Benchmark:
    """Time steps with and without --async-save, in turns; under torchrun at any layout. All further flags are the trainer's.

    On a CPU leave a core to the writer (OMP_NUM_THREADS), as there is one beside every GPU.
    """

    stage: Literal["1", "2"] = "2"
    """1: learn to generate both responses. 2: learn to predict the label."""
    interval: int = 20
    """Steps between checkpoints."""
    rounds: int = 3
    """Times that both are measured, in turns."""
    json: Optional[str] = None
    """Write the figures to this file."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of tools/benchmark_saving.py."""
    arguments = sys.argv[1:] if argv is None else argv
    options, flags = tyro.cli(Benchmark, args=arguments, prog="benchmark_saving", return_unknown_args=True)
    try:
        rows = benchmark(options, flags)
    except GramError as error:
        fail(error)
    if is_main_process():
        print(table(rows))
        if options.json:
            write_json(options.json, rows)


def benchmark(options: Benchmark, flags: list[str]) -> list[Row]:
    """Measure; call it in every process."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["--objective", OBJECTIVES[options.stage], "--train-iters", "100000", *make_files(Path(folder))]
        config = parse([*fixed, "--vocab-size", str(VOCABULARY), *flags], "benchmark_saving")
        config.checkpoint.save, config.checkpoint.async_save, config.checkpoint.keep_last = f"{folder}/checkpoints", True, 2
        resolve_shape(config)
        check(config)
        with running_trainer(config, own_data=True, stretch=1.0) as (trainer, _):
            return _rows(options, config, trainer)


def _rows(options: Benchmark, config: Config, trainer) -> list[Row]:
    _steps(trainer, options.interval, save=True)  # warm up both
    seconds = {"no saving": 0.0, "saving": 0.0}
    for _ in range(options.rounds):
        seconds["no saving"] += _steps(trainer, options.interval, save=False)
        seconds["saving"] += _steps(trainer, options.interval, save=True)
    size = sum(file.stat().st_size for file in Path(config.checkpoint.save).rglob("iter_*/*.distcp"))
    steps = options.rounds * options.interval
    shape = {"layers": config.model.num_layers, "hidden": config.model.hidden_size, "vocabulary": config.model.vocab_size}
    dtype, device = "bfloat16" if config.training.bf16 else "float32", describe(trainer.platform.device)
    rows = [
        Row(
            f"stage {options.stage} step with --async-save every {options.interval} steps", name, shape, dtype, device,
            total / steps * 1e3, steps, None, "no saving", figures={"checkpoint_bytes": size},
        )
        for name, total in seconds.items()
    ]  # fmt: skip
    add_ratios(rows)
    return rows


def _steps(trainer, number: int, save: bool) -> float:
    """Seconds of `number` steps, with a checkpoint begun before the first and published at the latest after the last."""
    trainer.platform.synchronize()
    started = time.perf_counter()
    if save:
        trainer.saver.save(trainer.state, trainer.model, trainer.optimizer, trainer.scheduler)
    for _ in range(number):
        batch = trainer.batches.batch(trainer.state.consumed_samples)
        trainer.step(batch)
        trainer.state.consumed_samples += batch.num_samples
        trainer.state.iteration += 1
        trainer.saver.finish(blocking=False)
    trainer.saver.finish()
    trainer.platform.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
