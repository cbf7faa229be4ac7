"""Conversion cut into files, each a job for a process of its own; one tensor at a time is in a process's memory."""

from __future__ import annotations

import math
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import torch
from tqdm import tqdm

from gram_engine.checkpoint.torch_dist import Key
from gram_engine.config.schema import ModelConfig
from gram_engine.errors import ConfigError
from gram_engine.hf.mapping import EMBEDDING, OUTPUT, SCORE, Rule, rules

MAX_FILE_BYTES = 1024**3
"""Files are about this large: the unit of work and of progress."""
SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class Job:
    """Some of the model's tensors, from a checkpoint to a file of a Hugging Face folder or the other way."""

    number: int
    checkpoint: Path
    folder: Path
    file: str
    model: ModelConfig
    keys: tuple[Key, ...]
    dtype: torch.dtype
    label_ids: tuple[int, int] | None = None
    """Set for the pair-logit head: its one row takes the place of the output layer."""

    @property
    def nbytes(self) -> int:
        return sum(key_bytes(rule, self.model, self.dtype) for rule, _ in self.rules())

    def rules(self) -> list[tuple[Rule, int | None]]:
        """(rule, layer) of the job's keys."""
        rule_of = {(rule.engine, layer): rule for rule, layer in [*rules(self.model), (OUTPUT, None), (SCORE, None)]}
        return [(rule_of[key], key[1]) for key in self.keys]


def key_bytes(rule: Rule, model: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of a rule's tensors in one layer."""
    return sum(math.prod(shape) for shape in rule.hf_shapes(model)) * dtype.itemsize


def in_files(keys: Sequence[tuple[Rule, int | None]], model: ModelConfig, dtype: torch.dtype) -> list[list[Key]]:
    """Consecutive keys, MAX_FILE_BYTES at most where one alone is not larger."""
    files: list[list[Key]] = [[]]
    filled = 0
    for rule, layer in keys:
        size = key_bytes(rule, model, dtype)
        if files[-1] and filled + size > MAX_FILE_BYTES:
            files.append([])
            filled = 0
        files[-1].append((rule.engine, layer))
        filled += size
    return files


def head_key(model: ModelConfig) -> Key:
    """Where a checkpoint has the output layer's rows."""
    return ((OUTPUT if model.untie_embeddings_and_output_weights else EMBEDDING).engine, None)


def run_jobs(function: Callable[[Job], Any], jobs: Sequence[Job], processes: int, title: str) -> list[Any]:
    """function(job) of each job, in `processes` processes; results in the jobs' order."""
    results = []
    with tqdm(total=sum(job.nbytes for job in jobs), desc=title, unit="B", unit_scale=True, disable=None) as bar:
        for job, result in zip(jobs, _results(function, jobs, min(processes, len(jobs)))):
            results.append(result)
            bar.update(job.nbytes)
    return results


def _results(function: Callable[[Job], Any], jobs: Sequence[Job], processes: int) -> Iterator[Any]:
    if processes == 1:
        yield from map(function, jobs)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(function, jobs)


def check_room(folder: Path, jobs: Sequence[Job]) -> None:
    """Refuse to begin where the disk is too full.

    Raises:
        ConfigError: with what is needed and what is free.
    """
    while not folder.exists():
        folder = folder.absolute().parent
    needed, free = sum(job.nbytes for job in jobs) + SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(f"--save: {needed / 1e9:.1f} GB are needed, {folder} has {free / 1e9:.1f} GB free. Make room first.")
