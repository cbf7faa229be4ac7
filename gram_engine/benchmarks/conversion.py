"""Seconds, MB/s and peak memory of `gram convert` in both directions, on a random model that is made and deleted."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
import tyro

from gram_engine.benchmarks.measure import Row, add_ratios, describe, table, write_json
from gram_engine.benchmarks.random_model import model_of, write_random_folder
from gram_engine.config.parse import fail
from gram_engine.config.schema import ModelConfig
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import CheckpointError, GramError
from gram_engine.hf.folder import HuggingFaceFolder

COPY = "copy of the files"


@dataclass
class Benchmark:
    """Convert a random model to a checkpoint and back, each in a process of its own, and compare every bit."""

    tokenizer_model: str
    """Tokenizer of the model: SentencePiece .model file or Hugging Face folder."""
    model: str = "llama-3.2-3b"
    """Preset."""
    template: str = "gram-code"
    """Judge template whose labels the tokenizer must have as single tokens."""
    processes: int = 1
    """As of gram convert; the peak is that of the largest process."""
    work_dir: Optional[str] = None
    """Folder with room for three copies of the model; default: the system's temporary one."""
    json: Optional[str] = None
    """Write the rows to this file."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of tools/benchmark_conversion.py."""
    options = tyro.cli(Benchmark, args=sys.argv[1:] if argv is None else argv, prog="benchmark_conversion")
    try:
        with tempfile.TemporaryDirectory(dir=options.work_dir) as folder:
            rows = measurements(options, Path(folder))
    except GramError as error:
        fail(error)
    print(table(rows))
    if options.json:
        write_json(options.json, rows)


def measurements(options: Benchmark, folder: Path) -> list[Row]:
    """The copy, both directions, and the comparison.

    Raises:
        CheckpointError: the round trip changed a tensor.
    """
    model = model_of(f"--model {options.model}")
    # In a process of its own: a command's peak counts from the size of the process that starts it.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        size = pool.apply(write_random_folder, (folder / "hf", model, torch.bfloat16))
    Tokenizer.load("auto", options.tokenizer_model).save_pretrained(folder / "hf")
    convert = [sys.executable, "-m", "gram_engine.cli", "convert", "--processes", str(options.processes)]
    to_engine = ["--from", "hf", "--load", folder / "hf", "--save", folder / "run", "--template", options.template]
    commands = {
        COPY: ["cp", "-r", folder / "hf", folder / "copy"],
        "Hugging Face -> engine": [*convert, *to_engine],
        "engine -> Hugging Face": [*convert, "--load", folder / "run", "--save", folder / "out"],
    }
    rows = []
    for name, command in commands.items():
        seconds, peak = _run([str(word) for word in command])
        shutil.rmtree(folder / "copy", ignore_errors=True)
        sizes = {"layers": model.num_layers, "hidden": model.hidden_size, "megabytes": size // 10**6}
        rows.append(
            Row(f"convert {options.model}", name, sizes, "bfloat16", describe(torch.device("cpu")), seconds * 1e3, 1, peak,
                COPY, note=f"[{size / seconds / 1e6:,.0f} MB/s]")
        )  # fmt: skip
    _compare(folder / "hf", folder / "out", model)
    add_ratios(rows)
    return rows


def _run(command: list[str]) -> tuple[float, int]:
    """(seconds, largest resident memory in bytes) of a command."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise CheckpointError(f"{' '.join(command)} failed with status {status}.")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def _compare(one: Path, other: Path, model: ModelConfig) -> None:
    sources = HuggingFaceFolder(one), HuggingFaceFolder(other)
    for source in sources:
        source.check(model)
    for name in sources[1].files:
        before, after = (source.read(name).view(torch.uint8) for source in sources)
        if not torch.equal(before, after):
            raise CheckpointError(f"{name} is not what it was before the round trip.")
