"""The planner (gram_engine/planning) against real training steps on CPU processes, and against published runs.

Measured: the bytes of all tensors' storages that exist at one time, at their highest in a training step, counted where
torch dispatches operators (forward, backward, optimizer and communication alike) and where storages are freed.  It is exact
and repeats to the byte, where resident memory depends on the C library's heap.  Not in it: scratch memory inside one
operator, the interpreter, the libraries and gloo's own buffers.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Optional

import torch
import tyro
from torch import multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gram_engine.benchmarks.measure import write_json
from gram_engine.benchmarks.steps import make_step, random_batch
from gram_engine.config.parse import parse
from gram_engine.config.schema import Config
from gram_engine.model.shapes import resolve_shape
from gram_engine.planning.memory import CPU, GIB, Pack, peak_memory
from gram_engine.planning.published import RUNS, Run, as_published, as_this_engine

SHAPE = (
    "--num-layers 8 --hidden-size 512 --ffn-hidden-size 1408 --num-attention-heads 8 --num-query-groups 4 "
    "--vocab-size 8192 --seq-length 512 --micro-batch-size 2 --train-iters 10 --logits-chunk-size 512 "
)
STAGE_1, STAGE_2 = "--objective response-lm ", "--objective pair-preference "
TIED, UNTIED = (f"--untie-embeddings-and-output-weights {value} " for value in (False, True))
MICROBATCHES = 4
SAMPLES = 4
"""Samples of a micro-batch, of equal lengths."""


@dataclass(frozen=True)
class Case:
    """A layout to measure."""

    name: str
    processes: int
    flags: str


CASES = (
    Case("stage 1, fp32, tied, TP1", 1, STAGE_1 + TIED),
    Case("stage 1, bf16, untied, TP1", 1, STAGE_1 + UNTIED + "--bf16"),
    Case("stage 2, fp32, untied, TP1", 1, STAGE_2 + UNTIED),
    Case("stage 2, bf16, tied, TP1", 1, STAGE_2 + TIED + "--bf16"),
    Case("stage 1, fp32, untied, full recompute", 1, STAGE_1 + UNTIED + "--recompute-granularity full"),
    Case("stage 2, bf16, untied, full recompute", 1, STAGE_2 + UNTIED + "--bf16 --recompute-granularity full"),
    Case("stage 1, fp32, untied, TP2", 2, STAGE_1 + UNTIED + "--tensor-model-parallel-size 2"),
    Case("stage 2, fp32, tied, TP2 SP", 2, STAGE_2 + TIED + "--tensor-model-parallel-size 2 --sequence-parallel"),
    Case("stage 1, bf16, untied, TP2 SP", 2, STAGE_1 + UNTIED + "--bf16 --tensor-model-parallel-size 2 --sequence-parallel"),
    Case("stage 1, fp32, untied, PP2", 2, STAGE_1 + UNTIED + "--pipeline-model-parallel-size 2"),
    Case("stage 2, bf16, tied, PP2", 2, STAGE_2 + TIED + "--bf16 --pipeline-model-parallel-size 2"),
    Case("stage 2, fp32, untied, PP2 VPP2", 2, STAGE_2 + UNTIED
         + "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2"),
    Case("stage 2, fp32, untied, CP2", 2, STAGE_2 + UNTIED + "--context-parallel-size 2"),
    Case("stage 2, fp32, untied, DP2 distributed optimizer", 2, STAGE_2 + UNTIED + "--use-distributed-optimizer"),
    Case("stage 1, bf16, tied, DP2 distributed optimizer", 2, STAGE_1 + TIED + "--bf16 --use-distributed-optimizer"),
)  # fmt: skip


@dataclass
class PlannerRow:
    """One process of one layout.

    error: predicted / measured - 1; error_beyond_states: the same of what is neither parameter, gradient nor optimizer state.
    """

    layout: str
    process: int
    measured_bytes: int
    predicted_bytes: int
    error: float
    error_beyond_states: float
    kinds: dict[str, int]


@dataclass
class PlannerArguments:
    """Compare the planner's memory with that of training steps on CPU processes."""

    only: Optional[str] = None
    """Layouts whose name contains this text."""
    json_file: Annotated[Optional[str], tyro.conf.arg(name="json")] = None
    """Also write the rows to this file."""


def main(argv: list[str] | None = None) -> None:
    """Command line of tools/benchmark_planner.py."""
    arguments = tyro.cli(PlannerArguments, args=argv, prog="benchmark_planner")
    rows: list[PlannerRow] = []
    print(f"{'layout':52}{'process':>8}{'measured':>12}{'predicted':>12}{'error':>9}{'beyond states':>15}")
    for case in CASES:
        if arguments.only is None or arguments.only in case.name:
            rows += compare(case)
            for row in rows[-case.processes :]:
                sizes = f"{row.measured_bytes / 2**20:>8,.1f} MiB{row.predicted_bytes / 2**20:>8,.1f} MiB"
                print(f"{row.layout:52}{row.process:>8}{sizes}{row.error:>+9.1%}{row.error_beyond_states:>+15.1%}", flush=True)
    worst = max(rows, key=lambda row: abs(row.error), default=None)
    if worst is not None:
        print(f"largest error: {worst.error:+.1%} ({worst.layout}, process {worst.process})")
    published = [published_row(run) for run in RUNS]
    print(f"\n{'published run (FP8, H100 80 GB)':32}{'predicted':>12}{'fits':>6}{'tok/s/GPU':>11}{'predicted':>11}{'ratio':>7}")
    for row in published:
        memory = f"{row['predicted_bytes'] / GIB:>9,.1f} GB{'yes' if row['fits'] else 'no':>6}"
        speed = f"{row['tokens_per_gpu_second']:>11,.0f}{row['predicted_tokens_per_gpu_second']:>11,.0f}{row['ratio']:>7.2f}"
        print(f"{row['run']:32}{memory}{speed}")
    if arguments.json_file:
        write_json(arguments.json_file, rows, published=published)


def published_row(run: Run) -> dict:
    """A published run beside what the planner says of it."""
    plan = as_published(run)
    return {
        "run": run.name,
        "layout": str(run.layout),
        "predicted_bytes": round(plan.memory.total),
        "fits": plan.fits,
        "tokens_per_gpu_second": run.tokens_per_gpu_second,
        "predicted_tokens_per_gpu_second": plan.tokens_per_gpu_second,
        "ratio": plan.tokens_per_gpu_second / run.tokens_per_gpu_second,
        "fits_in_this_engine_in_fp8": as_this_engine(run, fp8=True).fits,
        "fits_in_this_engine_in_bf16": as_this_engine(run).fits,
        "fits_in_this_engine_in_bf16_with_full_recompute": as_this_engine(run, recompute="full").fits,
    }


def compare(case: Case) -> list[PlannerRow]:
    """Measure a layout in processes of its own, and predict it: one row a process."""
    config = configuration(case)
    parallel = config.parallel
    pp, cp = parallel.pipeline_model_parallel_size, parallel.context_parallel_size
    tokens = config.pack_tokens
    rows = tokens - SAMPLES if config.training.objective == "response-lm" else SAMPLES
    pack = Pack(tokens / cp, rows / cp)
    shards = cp * case.processes // parallel.model_parallel_size if parallel.use_distributed_optimizer else 1
    rows_of_case = []
    for rank, measured in enumerate(measure(case)):
        stage = rank // (case.processes // pp)
        memory = peak_memory(config, stage, pack, MICROBATCHES, shards, CPU)
        kinds = {name: round(value) for name, value in asdict(memory).items()}
        difference, states = memory.total - measured, memory.parameters + memory.gradients + memory.optimizer
        errors = difference / measured, difference / (measured - states)
        rows_of_case.append(PlannerRow(case.name, rank, measured, round(memory.total), *errors, kinds))
    return rows_of_case


def configuration(case: Case) -> Config:
    """The layout's resolved configuration."""
    config = parse([*SHAPE.split(), *case.flags.split()])
    resolve_shape(config)
    return config


def measure(case: Case) -> list[int]:
    """Peak bytes of each process of a layout."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_process, args=(case, folder), nprocs=case.processes)
        return [int((Path(folder) / str(rank)).read_text()) for rank in range(case.processes)]


def _process(rank: int, case: Case, folder: str) -> None:
    os.environ.update(OMP_NUM_THREADS="1", RANK=str(rank), WORLD_SIZE=str(case.processes))
    torch.set_num_threads(1)
    import torch.distributed as dist

    from gram_engine.platform import device as platform

    where = platform.initialise("cpu")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=case.processes)
    # Each process keeps its number in a file: what it prints is the libraries' own business.
    peak = _peak_of_steps(configuration(case), where)
    dist.destroy_process_group()
    (Path(folder) / str(rank)).write_text(str(peak))


def _peak_of_steps(config: Config, where) -> int:
    from gram_engine.training.initialise import start_model_parallel

    start_model_parallel(config)
    with TensorBytes() as tensors:
        batch = random_batch(config, SAMPLES, config.pack_tokens // SAMPLES, MICROBATCHES)
        step = make_step(config, where, batch)
        step()  # makes the optimizer's state
        tensors.peak = tensors.live
        step()
        return tensors.peak


class TensorBytes(TorchDispatchMode):
    """Counts bytes of the storages of all tensors made within: `live` now, `peak` at their highest."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
