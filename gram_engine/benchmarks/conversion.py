"""Seconds, MB/s and peak memory of `gram convert` in both directions, on a random model."""

from __future__ import annotations

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

from gram_engine.benchmarks.command import Options
from gram_engine.benchmarks.measure import describe, in_new_processes
from gram_engine.benchmarks.results import Row, add_ratios, table, write_rows
from gram_engine.benchmarks.workload import model_of, write_random_folder
from gram_engine.config.schema import ModelConfig
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import CheckpointError
from gram_engine.hf.folder import HuggingFaceFolder
from gram_engine.log import log

COPY = "copy of the files"


@dataclass(kw_only=True)
class Conversion(Options):
    """Convert a random model to a checkpoint and back, each in a new process, and compare every bit."""

    tokenizer_model: str
    """Tokenizer of the model: SentencePiece .model file or Hugging Face folder."""
    model: str = "llama-3.2-3b"
    """Preset."""
    template: str = "gram-code"
    """Judge template whose labels the tokenizer must have as single tokens."""
    processes: int = 1
    """--processes of gram convert; the peak is that of the largest process."""
    work_dir: Optional[str] = None
    """Folder with room for three copies of the model; default: the system's temporary folder."""

    def run(self) -> None:
        """Measure, print and write."""
        with tempfile.TemporaryDirectory(dir=self.work_dir) as folder:
            rows = self._rows(Path(folder))
        log(table(rows))
        write_rows(self.json, rows)

    def _rows(self, folder: Path) -> list[Row]:
        """The copy and both directions.

        Raises:
            CheckpointError: a command failed, or the round trip changed a tensor.
        """
        model = model_of(f"--model {self.model}")
        # In a new process: a command's peak memory is never below the size of the process that starts it.
        (size,) = in_new_processes(write_random_folder, folder / "hf", model, torch.bfloat16)
        Tokenizer.load("auto", self.tokenizer_model).save_pretrained(folder / "hf")
        convert = [sys.executable, "-m", "gram_engine.cli", "convert", "--processes", str(self.processes)]
        to_engine = ["--from", "hf", "--load", folder / "hf", "--save", folder / "run", "--template", self.template]
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
                Row(f"convert {self.model}", name, sizes, "bfloat16", describe(torch.device("cpu")), seconds * 1e3, 1, peak,
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
            raise CheckpointError(f"{name} was changed by the round trip.")
