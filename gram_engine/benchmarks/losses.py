"""Output layer + loss, forward and backward: ours against what others do, on the same tensors in one run.

Stage 2 needs a loss at `labels` positions of `tokens`, stage 1 at all of them.  The gradient of the hidden rows and of the
output weight is made in every case; where it lands (autograd's .grad, or main_grad) differs as it does in training.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from typing import Callable, Iterator, Literal, Optional

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from gram_engine.benchmarks.measure import Row, add_ratios, describe, measure, table, write_json
from gram_engine.benchmarks.steps import single_process, step_rows
from gram_engine.config.parse import fail
from gram_engine.errors import ConfigError, GramError
from gram_engine.kernels import linear_cross_entropy, pair_loss
from gram_engine.kernels.dispatch import name_of
from gram_engine.platform import device as platforms

# vocabulary, hidden size, tokens, labels
SHAPES: dict[str, tuple[int, int, int, int]] = {
    "tiny": (512, 64, 512, 4),
    "small": (8192, 256, 2048, 8),
    "llama-3.2-1b": (128256, 2048, 4096, 8),
    "llama-3.2-3b": (128256, 3072, 8192, 8),
    "llama-3.1-8b": (128256, 4096, 8192, 8),
}
ALL_LOGITS = "logits of all positions + cross entropy"
TORCH_FUSED = "torch F.linear_cross_entropy"
NORM_EPS = 1e-5


@dataclass
class Benchmark:
    """Time and peak memory of the losses, forward + backward, ours and others', in one table."""

    shapes: tuple[str, ...] = ("tiny", "small")
    """Any of tiny, small, llama-3.2-1b, llama-3.2-3b, llama-3.1-8b; the last need 8 GiB of memory and more."""
    stages: tuple[Literal["1", "2"], ...] = ("1", "2")
    """Stages whose losses are measured."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of hidden rows and weight."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: CUDA where there is a GPU."""
    tokens: Optional[int] = None
    """Tokens instead of the shape's own."""
    chunk_size: Optional[int] = None
    """Stage 1, ours: rows whose logits exist at one time, the trainer's --logits-chunk-size."""
    repeats: int = 5
    """Timed calls; the median counts."""
    budget_seconds: float = 60.0
    """No further timed calls of a contestant once they took so long."""
    steps: bool = False
    """Measure whole stage-2 training steps, plain and fused, too (gram_engine/benchmarks/steps.py)."""
    step_models: tuple[str, ...] = ("tiny", "llama-3.2-1b")
    """Models of --steps."""
    step_layers: Optional[int] = 2
    """Layers of --steps' models; None: their own number."""
    step_tokens: int = 2048
    """Tokens of one of --steps' training steps, 8 samples each."""
    json: Optional[str] = None
    """Write the rows to this file."""


@dataclass
class Problem:
    """Random tensors of one shape."""

    hidden: Tensor
    label_hidden: Tensor
    weight: Tensor
    norm_weight: Tensor
    targets: Tensor
    rows: Tensor
    preference: Tensor
    labels: tuple[int, int] = (32, 33)

    def clear_gradients(self) -> None:
        """To be called before each pass."""
        self.hidden.grad = self.label_hidden.grad = self.weight.grad = self.norm_weight.grad = None


def main(argv: list[str] | None = None) -> None:
    """Entry point of tools/benchmark_losses.py."""
    try:
        options = tyro.cli(Benchmark, args=sys.argv[1:] if argv is None else argv, prog="benchmark_losses")
        platform = platforms.initialise(options.device)
        rows = []
        with single_process(platform.device):
            for found in measurements(options, platform.device):
                print(table(found), end="\n\n", flush=True)
                rows += found
        if not hasattr(F, "linear_cross_entropy"):
            print(f"Without {TORCH_FUSED}, which torch {torch.__version__} does not have.")
        if options.json:
            write_json(options.json, rows)
    except GramError as error:
        fail(error)


def measurements(options: Benchmark, device: torch.device) -> Iterator[list[Row]]:
    """One list of rows for every table."""
    for shape in options.shapes:
        for stage in options.stages:
            yield loss_rows(options, shape, stage, device)
    for model in options.step_models if options.steps else ():
        yield step_rows(
            model, options.step_layers, options.step_tokens, 8, options.dtype, options.repeats, options.budget_seconds
        )


def loss_rows(options: Benchmark, shape: str, stage: str, device: torch.device) -> list[Row]:
    """Measure all contestants of a stage at one shape."""
    if shape not in SHAPES:
        raise ConfigError(f"--shapes {shape}: unknown. Choose among {', '.join(SHAPES)}.")
    vocabulary, hidden, tokens, labels = SHAPES[shape]
    tokens = options.tokens or tokens
    dtype = getattr(torch, options.dtype)
    problem = make_problem(vocabulary, hidden, tokens, labels, dtype, device)
    contestants = stage_1(problem, options.chunk_size) if stage == "1" else stage_2(problem)
    rows = []
    for name, run in contestants.items():
        seconds, repeats, peak = measure(run, device, options.repeats, options.budget_seconds, problem.clear_gradients)
        note = f"[{_kernel(stage, device)}]" if name.startswith("gram_engine") else ""
        sizes = {"vocabulary": vocabulary, "hidden": hidden, "tokens": tokens}
        sizes |= {"labels": labels} if stage == "2" else {}
        rows.append(
            Row(f"stage {stage} head + loss", name, sizes, options.dtype, describe(device), seconds * 1e3, repeats, peak,
                ALL_LOGITS, note=note)
        )  # fmt: skip
    add_ratios(rows)
    return rows


def make_problem(vocabulary: int, hidden: int, tokens: int, labels: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """Random hidden rows and weight of realistic size; label rows evenly spaced, the last at the end."""
    generator = torch.Generator(device).manual_seed(0)
    make = dict(dtype=dtype, device=device)
    states = torch.empty(tokens, hidden, **make).normal_(generator=generator)
    rows = (torch.arange(1, labels + 1, device=device) * tokens) // labels - 1
    return Problem(
        hidden=states.requires_grad_(),
        label_hidden=states.detach()[rows].requires_grad_(),
        weight=torch.empty(vocabulary, hidden, **make).normal_(std=hidden**-0.5, generator=generator).requires_grad_(),
        norm_weight=torch.ones(hidden, **make).requires_grad_(),
        targets=torch.randint(0, vocabulary, (tokens,), device=device, generator=generator),
        rows=rows,
        preference=(torch.arange(labels, device=device) % 2).float(),
    )


def stage_1(problem: Problem, chunk_size: int | None) -> dict[str, Callable]:
    """Cross entropy at every position."""
    hidden, weight, targets = problem.hidden, problem.weight, problem.targets

    def ours() -> None:
        main_grad = torch.zeros_like(weight, dtype=torch.float32)
        linear_cross_entropy(hidden, weight, targets, len(weight), chunk_size=chunk_size, main_grad=main_grad).backward()

    contestants = {
        ALL_LOGITS: lambda: F.cross_entropy(hidden @ weight.t(), targets, reduction="sum").backward(),
        TORCH_FUSED: lambda: _torch_fused(hidden, weight, targets).backward(),
        "megatron-core vocab-parallel cross entropy": lambda: _megatron(hidden @ weight.t(), targets).backward(),
    }
    if not hasattr(F, "linear_cross_entropy"):
        del contestants[TORCH_FUSED]
    if importlib.util.find_spec("liger_kernel") and hidden.is_cuda:
        contestants["Liger fused linear cross entropy"] = lambda: _liger(hidden, weight, targets).backward()
    contestants["gram_engine linear_cross_entropy"] = ours
    return contestants


def stage_2(problem: Problem) -> dict[str, Callable]:
    """Final norm and two-token loss at the label rows; the others compute the label's cross entropy as they can."""
    weight, rows = problem.weight, problem.rows
    label_a, label_b = problem.labels
    wanted = torch.where(problem.preference > 0, label_a, label_b)
    everywhere = torch.full((len(problem.hidden),), -100, device=weight.device).index_put((rows,), wanted)

    def normed(hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], problem.norm_weight, NORM_EPS)

    def all_positions() -> None:
        logits = normed(problem.hidden) @ weight.t()
        F.cross_entropy(logits, everywhere, ignore_index=-100, reduction="sum").backward()

    def label_rows_all_logits() -> None:
        F.cross_entropy(normed(problem.hidden)[rows] @ weight.t(), wanted, reduction="sum").backward()

    def label_rows_two_tokens() -> None:
        logits = normed(problem.hidden)[rows] @ weight[[label_a, label_b]].t()
        F.cross_entropy(logits, (problem.preference == 0).long(), label_smoothing=0.1, reduction="sum").backward()

    def ours(hidden: Tensor, positions: Tensor | None) -> None:
        with torch.no_grad():
            difference = weight[label_a].float() - weight[label_b].float()
            direction = (problem.norm_weight.float() * difference).requires_grad_()
        losses, _ = pair_loss(hidden, direction, problem.preference, 0.05, NORM_EPS, positions)
        losses.sum().backward()

    contestants = {
        ALL_LOGITS: all_positions,
        TORCH_FUSED: lambda: _torch_fused(normed(problem.hidden), weight, everywhere, ignore_index=-100).backward(),
        "label rows, logits of the vocabulary": label_rows_all_logits,
        "label rows, weight[[a, b]] by autograd": label_rows_two_tokens,
    }
    if not hasattr(F, "linear_cross_entropy"):
        del contestants[TORCH_FUSED]
    if importlib.util.find_spec("liger_kernel") and weight.is_cuda:
        contestants["Liger fused linear cross entropy"] = lambda: _liger(normed(problem.hidden), weight, everywhere).backward()
    contestants["gram_engine pair_loss, all rows given"] = lambda: ours(problem.hidden, rows)
    contestants["gram_engine pair_loss, label rows (pruned)"] = lambda: ours(problem.label_hidden, None)
    return contestants


def _torch_fused(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int | None = None) -> Tensor:
    """torch 2.13 has it, 2.11 does not."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", ignore_index=ignore_index, options=options)


def _megatron(logits: Tensor, targets: Tensor) -> Tensor:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy(logits.unsqueeze(1), targets.unsqueeze(1)).sum()


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets)


def _kernel(stage: str, device: torch.device) -> str:
    return name_of("cross_entropy_grad_" if stage == "1" else "pair_loss_forward", device)
