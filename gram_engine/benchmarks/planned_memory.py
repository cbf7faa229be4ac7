"""The planner (gram_engine/planning) beside real training steps on CPU processes, and beside published runs.

Measured are the bytes of all tensors' storages that exist at the same time, at their peak in a training step. They are counted
where torch dispatches operators (forward, backward, optimizer and communication alike) and where storages are freed. This is
exact and the same in every run, whereas resident memory depends on the C library's heap. It leaves out scratch memory inside an
operator, the interpreter, the libraries and gloo's own buffers.
"""

from __future__ import annotations

import weakref
from dataclasses import asdict, dataclass
from typing import Optional

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gram_engine.benchmarks.command import Options
from gram_engine.benchmarks.measure import in_new_processes
from gram_engine.benchmarks.results import write_rows
from gram_engine.benchmarks.workload import random_session
from gram_engine.config.parse import parse
from gram_engine.config.schema import Config
from gram_engine.config.validate import check
from gram_engine.model.shapes import resolve_shape
from gram_engine.planning.memory import CPU, GIB, Pack, peak_memory
from gram_engine.planning.published import RUNS, Run, as_published, as_this_engine

SAMPLES, LENGTH, MICROBATCHES = 4, 256, 4
"""Of every process: samples of a micro-batch, tokens of each sample, and micro-batches of a step."""
SHAPE = (
    "--device cpu --num-layers 8 --hidden-size 512 --ffn-hidden-size 1408 --num-attention-heads 8 --num-query-groups 4 "
    f"--vocab-size 8192 --seq-length {LENGTH} --micro-batch-size {SAMPLES} --train-iters 10 --logits-chunk-size 512 "
)
STAGE_1, STAGE_2 = "--objective response-lm ", "--objective pair-preference "
TIED, UNTIED = (f"--untie-embeddings-and-output-weights {value} " for value in (False, True))


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

    error: predicted / measured - 1; error_beyond_states: the same without parameters, gradients and optimizer state.
    """

    layout: str
    process: int
    measured_bytes: int
    predicted_bytes: int
    error: float
    error_beyond_states: float
    kinds: dict[str, int]


@dataclass(kw_only=True)
class Planner(Options):
    """Compare the peak memory that `gram plan` predicts with that of training steps on CPU processes, and its predictions
    with published runs.
    """

    only: Optional[str] = None
    """Measure only layouts whose name contains this text."""

    def run(self) -> None:
        """Measure, print and write."""
        rows: list[PlannerRow] = []
        print(f"{'layout':52}{'process':>8}{'measured':>12}{'predicted':>12}{'error':>9}{'beyond states':>15}")
        for case in CASES:
            if self.only is None or self.only in case.name:
                rows += compare(case)
                for row in rows[-case.processes :]:
                    sizes = f"{row.measured_bytes / 2**20:>8,.1f} MiB{row.predicted_bytes / 2**20:>8,.1f} MiB"
                    errors = f"{row.error:>+9.1%}{row.error_beyond_states:>+15.1%}"
                    print(f"{row.layout:52}{row.process:>8}{sizes}{errors}", flush=True)
        worst = max(rows, key=lambda row: abs(row.error), default=None)
        if worst is not None:
            print(f"largest error: {worst.error:+.1%} ({worst.layout}, process {worst.process})")
        published = [published_row(run) for run in RUNS]
        _print_published(published)
        write_rows(self.json, rows, published=published)


def _print_published(rows: list[dict]) -> None:
    print(f"\n{'published run (FP8, H100 80 GB)':32}{'predicted':>12}{'fits':>6}{'tok/s/GPU':>11}{'predicted':>11}{'ratio':>7}")
    for row in rows:
        memory = f"{row['predicted_bytes'] / GIB:>9,.1f} GB{'yes' if row['fits'] else 'no':>6}"
        speed = f"{row['tokens_per_gpu_second']:>11,.0f}{row['predicted_tokens_per_gpu_second']:>11,.0f}{row['ratio']:>7.2f}"
        print(f"{row['run']:32}{memory}{speed}")


def published_row(run: Run) -> dict:
    """A published run beside what the planner predicts for it."""
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
    """Measure a layout in new processes, and predict it; returns one row for each process."""
    config = configuration(case)
    parallel = config.parallel
    pp, cp = parallel.pipeline_model_parallel_size, parallel.context_parallel_size
    tokens = config.pack_tokens
    rows = tokens - SAMPLES if not config.task.needs_labels else SAMPLES
    pack = Pack(tokens / cp, rows / cp)
    shards = cp * parallel.dims(case.processes).data_parallel_size if parallel.use_distributed_optimizer else 1
    rows_of_case = []
    peaks = in_new_processes(peak_bytes, case, count=case.processes, threads=1)
    for rank, measured in enumerate(peaks):
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
    data_parallel = config.parallel.dims(case.processes).data_parallel_size
    config.training.global_batch_size = SAMPLES * MICROBATCHES * data_parallel
    resolve_shape(config)
    return config


def peak_bytes(case: Case) -> int:
    """Peak bytes of this process in the second step of a layout, which has the optimizer's state from the first one.

    Every process of the layout calls it.
    """
    config = configuration(case)
    check(config, case.processes, data=False)
    with TensorBytes() as tensors, random_session(config, equal_lengths=True) as trainer:
        trainer.advance()
        tensors.peak = tensors.live
        trainer.advance()
        return tensors.peak


class TensorBytes(TorchDispatchMode):
    """Context manager that counts the bytes of the storages of all tensors made in it: `live` now, `peak` the most so far."""

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
