"""A conversion as independent jobs, one per output file, for several processes; each has one tensor in memory at a time."""

from __future__ import annotations

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from gram_engine.checkpoint.torch_dist import Key
from gram_engine.config.schema import ModelConfig
from gram_engine.errors import ConfigError
from gram_engine.files import check_free_space
from gram_engine.hf.mapping import EMBEDDING, OUTPUT, SCORE, Rule, rules

MAX_FILE_BYTES = 1024**3
"""Size of an output file, unless a single tensor is larger."""


@dataclass(frozen=True)
class Job:
    """One output file: some tensors of the model, from a checkpoint to a Hugging Face folder or the other way."""

    number: int
    checkpoint: Path
    folder: Path
    file: str
    model: ModelConfig
    keys: tuple[Key, ...]
    dtype: torch.dtype
    label_ids: tuple[int, int] | None = None
    """Set in one job for the pair-logit head, whose single row replaces the output layer."""

    @property
    def nbytes(self) -> int:
        """Size of the output file's tensors."""
        return sum(key_bytes(rule, self.model, self.dtype) for rule, _ in self.rules())

    def rules(self) -> list[tuple[Rule, int | None]]:
        """(rule, layer) of each key."""
        rule_of = {(rule.engine, layer): rule for rule, layer in [*rules(self.model), (OUTPUT, None), (SCORE, None)]}
        return [(rule_of[key], key[1]) for key in self.keys]


def key_bytes(rule: Rule, model: ModelConfig, dtype: torch.dtype) -> int:
    """Size in bytes of a rule's tensors in one layer."""
    return sum(math.prod(shape) for shape in rule.hf_shapes(model)) * dtype.itemsize


def in_files(keys: Sequence[tuple[Rule, int | None]], model: ModelConfig, dtype: torch.dtype) -> list[list[Key]]:
    """Split the keys, in order, into files of at most MAX_FILE_BYTES; a larger tensor gets a file of its own."""
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
    """The key of the output layer's weight in a checkpoint: the embedding's if they are tied."""
    return ((OUTPUT if model.untie_embeddings_and_output_weights else EMBEDDING).engine, None)


def run_jobs(function: Callable[[Job], Any], jobs: Sequence[Job], processes: int, title: str) -> list[Any]:
    """Run function(job) for each job in `processes` processes, with a progress bar; returns the results in order."""
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
    """Refuse to start if the disk has too little space for the output.

    Raises:
        ConfigError: gives the needed and the free space.
    """
    check_free_space(folder, sum(job.nbytes for job in jobs), ConfigError, "--save", "Make room first.")


def same_bits(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors of the same dtype are equal bit for bit."""
    return torch.equal(found.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))
