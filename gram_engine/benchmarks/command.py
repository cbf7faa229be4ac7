"""`gram benchmark NAME [flags]`: one command for all benchmarks, and the options that several of them share.

A benchmark is a dataclass of options whose method `run` measures, prints a table and writes the JSON file.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import partial
from typing import Literal, Optional

import tyro

from gram_engine.config.parse import fail, parse
from gram_engine.config.schema import Config
from gram_engine.errors import GramError
from gram_engine.log import is_main_process
from gram_engine.model.shapes import resolve_shape
from gram_engine.training.session import hush_known_warnings

BENCHMARKS = {
    "conversion": ("conversion:Conversion", "gram convert, to a checkpoint and back: seconds and peak memory"),
    "losses": ("losses:Losses", "output layer and loss beside PyTorch's, Megatron-Core's and Liger's"),
    "peers": ("peers:Peers", "training steps beside transformers and TRL: same weights, same samples"),
    "planner": ("planned_memory:Planner", "the peak memory that gram plan predicts beside the measured one"),
    "saving": ("throughput:Saving", "training steps with and without checkpoints saved in the background"),
    "scoring": ("scoring:Scoring", "pairs and lists scored per second, beside a loop with transformers"),
    "throughput": ("throughput:Throughput", "tokens/s, TFLOP/s, MFU and peak memory of training steps at any layout"),
}
OBJECTIVES = {"1": "response-lm", "2": "pair-preference"}


def main(argv: list[str]) -> None:
    """Run the benchmark that `argv` names; its flags follow."""
    if not argv or argv[0] not in BENCHMARKS:
        known = "\n".join(f"  gram benchmark {name:12s} {text}" for name, (_, text) in BENCHMARKS.items())
        print(f"usage: gram benchmark NAME [flags]\n\n{known}\n\ngram benchmark NAME --help explains a benchmark's flags.")
        raise SystemExit(0 if argv[:1] in (["-h"], ["--help"]) else 2)
    hush_known_warnings()
    module, name = BENCHMARKS[argv[0]][0].split(":")
    benchmark = getattr(importlib.import_module(f"gram_engine.benchmarks.{module}"), name)
    try:
        _options(benchmark, f"gram benchmark {argv[0]}", argv[1:]).run()
    except GramError as error:
        fail(error)


def _options(benchmark: type, prog: str, arguments: list[str]):
    parse_as = partial(tyro.cli, benchmark, prog=prog, args=arguments, console_outputs=is_main_process())
    if not issubclass(benchmark, TrainerOptions):
        return parse_as()
    options, options.trainer_flags = parse_as(return_unknown_args=True)
    return options


@dataclass(kw_only=True)
class Options:
    """Options of every benchmark."""

    json: Optional[str] = None
    """Also write the results to this file."""


@dataclass(kw_only=True)
class CallOptions(Options):
    """Options of benchmarks that time calls of a function."""

    repeats: int = 3
    """Timed calls; the median is reported."""
    budget_seconds: float = 60.0
    """Time no further call of a contestant once its timed calls have taken this many seconds."""


@dataclass(kw_only=True)
class StepOptions(Options):
    """Options of benchmarks that time training steps."""

    steps: int = 3
    """Timed training steps; the median is reported."""
    warmup: int = 1
    """Training steps before the timed ones."""


@dataclass(kw_only=True)
class TrainerOptions(Options):
    """Options of benchmarks that also take the flags of `gram finetune`, which they pass on to the trainer."""

    stage: Literal["1", "2"] = "2"
    """1: learn to generate both responses. 2: learn to predict the label."""

    trainer_flags = ()
    """Flags that the benchmark does not have itself."""

    def config(self, *defaults: str) -> Config:
        """The trainer's configuration with resolved shape; `defaults` are flags that the command line overrides."""
        found = parse(["--objective", OBJECTIVES[self.stage], *defaults, *self.trainer_flags], "gram benchmark")
        resolve_shape(found)
        return found
