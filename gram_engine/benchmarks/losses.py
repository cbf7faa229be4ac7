"""Output layer + loss, forward and backward: ours beside what others do, on the same tensors in one run.

Stage 2 needs a loss at `labels` positions of `tokens`, stage 1 at all of them. Every contestant computes the gradients of the
hidden states and of the output weight; where they are stored (autograd's .grad, or main_grad) is as in training.
"""

from __future__ import annotations

import contextlib
import importlib.util
from dataclasses import dataclass
from typing import Callable, Iterator, Literal, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from gram_engine.benchmarks.command import CallOptions
from gram_engine.benchmarks.measure import describe, measure
from gram_engine.benchmarks.results import Row, add_ratios, table, write_rows
from gram_engine.benchmarks.workload import random_session
from gram_engine.config.parse import parse
from gram_engine.config.schema import Config
from gram_engine.config.validate import check
from gram_engine.errors import ConfigError
from gram_engine.kernels import linear_cross_entropy, pair_loss
from gram_engine.kernels.dispatch import name_of
from gram_engine.log import log
from gram_engine.model.shapes import resolve_shape
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
STEP_SAMPLES = 8
STEP_VARIANTS = {
    "plain": ("--no-fused-losses",),
    "fused, whole last layer": ("--no-prune-last-layer",),
    "fused, pruned last layer": (),
}


@dataclass(kw_only=True)
class Losses(CallOptions):
    """Time and peak memory of the losses, forward + backward, ours and others', in one table."""

    repeats: int = 5
    shapes: tuple[str, ...] = ("tiny", "small")
    """Any of tiny, small, llama-3.2-1b, llama-3.2-3b, llama-3.1-8b; the last three need 8 GiB of memory or more."""
    stages: tuple[Literal["1", "2"], ...] = ("1", "2")
    """Stages whose losses are measured."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the hidden states and the weight."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: CUDA where there is a GPU."""
    tokens: Optional[int] = None
    """Number of tokens, in place of the shape's own."""
    chunk_size: Optional[int] = None
    """Stage 1, ours: rows whose logits exist at the same time, as --logits-chunk-size of the trainer."""
    steps: bool = False
    """Also measure whole training steps of stage 2 with plain and fused losses."""
    step_models: tuple[str, ...] = ("tiny", "llama-3.2-1b")
    """Models of --steps."""
    step_layers: Optional[int] = 2
    """Number of layers with --steps; None: as many as the model has."""
    step_tokens: int = 2048
    """Tokens of a training step with --steps, in 8 samples."""

    def run(self) -> None:
        """Measure; print each table as soon as it is complete."""
        rows = []
        for found in self._tables(platforms.initialise(self.device)):
            log(table(found) + "\n")
            rows += found
        if not hasattr(F, "linear_cross_entropy"):
            log(f"Without {TORCH_FUSED}, which torch {torch.__version__} does not have.")
        write_rows(self.json, rows)

    def _tables(self, platform: platforms.Platform) -> Iterator[list[Row]]:
        with single_process(platform):
            for shape in self.shapes:
                for stage in self.stages:
                    yield loss_rows(self, shape, stage, platform.device)
        for model in self.step_models if self.steps else ():
            yield step_rows(self, model, platform.device)


@dataclass
class Problem:
    """Random tensors of one shape: T tokens, R label rows, hidden size H, vocabulary V.

    hidden: [T, H]; label_hidden: [R, H], its rows at `rows`; weight: [V, H]; norm_weight: [H], all of one dtype;
    targets: int64 [T]; rows: int64 [R], ascending; preference: fp32 [R], 1 where label A is the better one; labels: the two
    label tokens.
    """

    hidden: Tensor
    label_hidden: Tensor
    weight: Tensor
    norm_weight: Tensor
    targets: Tensor
    rows: Tensor
    preference: Tensor
    labels: tuple[int, int] = (32, 33)

    def clear_gradients(self) -> None:
        """Free all gradients; call it before each pass."""
        self.hidden.grad = self.label_hidden.grad = self.weight.grad = self.norm_weight.grad = None


@contextlib.contextmanager
def single_process(platform: platforms.Platform) -> Iterator[None]:
    """The process groups that Megatron-Core's cross entropy needs, for this process alone."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from gram_engine.training.initialise import start_model_parallel, start_processes

    start_processes(Config(), platform)
    start_model_parallel(Config())
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def loss_rows(options: Losses, shape: str, stage: str, device: torch.device) -> list[Row]:
    """Measure all contestants of a stage at one shape.

    Raises:
        ConfigError: there is no such shape.
    """
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
    """Random hidden states and weight of realistic magnitude; label rows are evenly spaced, the last is the last token."""
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
    """Contestants of stage 1 by name: cross entropy at every position."""
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
    """Contestants of stage 2 by name: final norm and loss at the label rows, which for ours is the two-token loss."""
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
    """torch 2.13 has this function, 2.11 does not."""
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


def step_rows(options: Losses, model: str, device: torch.device) -> list[Row]:
    """Measure a training step of stage 2 with each variant: how much the losses gain in a whole step."""
    rows = []
    for name, flags in STEP_VARIANTS.items():
        config = _step_config(options, model, flags)
        with random_session(config, equal_lengths=True) as trainer:
            seconds, repeats, peak = measure(trainer.advance, device, options.repeats, options.budget_seconds)
        sizes = {"layers": config.model.num_layers, "hidden": config.model.hidden_size}
        sizes |= {"vocabulary": config.padded_vocab_size, "tokens": options.step_tokens, "labels": STEP_SAMPLES}
        rows.append(
            Row(f"stage 2 training step, {model}", name, sizes, options.dtype, describe(device), seconds * 1e3, repeats, peak,
                "plain", note=f"[{options.step_tokens / seconds:,.0f} tokens/s]")
        )  # fmt: skip
    add_ratios(rows)
    return rows


def _step_config(options: Losses, model: str, flags: tuple[str, ...]) -> Config:
    sizes = f"--seq-length {options.step_tokens // STEP_SAMPLES} --global-batch-size {STEP_SAMPLES}"
    fixed = f"--objective pair-preference --model {model} --device {options.device} --train-iters 100 {sizes}".split()
    fixed += ["--micro-batch-size", str(STEP_SAMPLES), *(["--bf16"] if options.dtype == "bfloat16" else [])]
    fixed += [] if options.step_layers is None else ["--num-layers", str(options.step_layers)]
    config = parse([*fixed, *flags])
    resolve_shape(config)
    config.model.vocab_size = config.model.vocab_size or SHAPES["tiny"][0]
    check(config, world_size=1, data=False)
    return config
