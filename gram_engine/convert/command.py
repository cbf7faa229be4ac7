"""`gram convert`: the command line of both directions."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Optional

import tyro

from gram_engine.config.parse import fail
from gram_engine.errors import ConfigError, GramError


@dataclass
class ConvertArguments:
    """Convert a checkpoint of the engine to a Hugging Face folder, or a Hugging Face folder to a checkpoint.

    Megatron-Bridge's form is accepted too: `gram convert export --megatron-path CHECKPOINT --hf-path FOLDER` and
    `gram convert import --hf-path FOLDER --megatron-path CHECKPOINT`.
    """

    load: str
    """Input: a folder of checkpoints (--save of a run) or one of its iter_... folders; with --from hf a Hugging Face folder."""
    save: str
    """Folder to write; it must not exist."""
    source: Annotated[Literal["engine", "hf"], tyro.conf.arg(name="from")] = "engine"
    """Input format."""
    to: Optional[Literal["engine", "hf"]] = None
    """Output format; default: the other one."""
    dtype: Optional[Literal["float32", "bfloat16", "float16"]] = None
    """Dtype of the written weights; default: that of the input."""
    head: Optional[Literal["causal-lm", "pair-logit", "scalar"]] = None
    """For --to hf: the language model (causal-lm), or an AutoModelForSequenceClassification with one logit, which is Z_A - Z_B
    (pair-logit) or the reward of bradley-terry (scalar); default: scalar for bradley-terry, otherwise causal-lm."""
    template: str = "gram-code"
    """For --to engine: judge prompt of the checkpoint: gram-code, gram-paper, or a YAML file."""
    evaluation: Optional[str] = None
    """For --to hf: a report of `gram score --report` or `gram evaluate` to show in the model card."""
    tensor_model_parallel_size: int = 1
    """Ignored; accepted for scripts that pass it. A checkpoint of the engine loads at every layout."""
    processes: int = 1
    """Number of files that are converted in parallel; each process has one tensor in memory."""
    verify: bool = False
    """Read everything back and compare it bit for bit."""


def main(argv: list[str] | None = None) -> None:
    """Command line of tools/convert_checkpoint.py and `gram convert`."""
    try:
        argv = _translate_bridge_arguments(sys.argv[1:] if argv is None else argv)
        arguments = tyro.cli(ConvertArguments, args=argv, prog="gram convert")
        print(f"wrote {convert(arguments)}")
    except GramError as error:
        fail(error)


def convert(arguments: ConvertArguments) -> Path:
    """Convert; returns the path that was written.

    Raises:
        ConfigError, CheckpointError: see `export_hf` and `import_checkpoint`.
    """
    if arguments.to == arguments.source:
        raise ConfigError(f"--from {arguments.source} --to {arguments.to}: nothing to convert.")
    if arguments.processes < 1:
        raise ConfigError(f"--processes {arguments.processes} must be at least 1.")
    work = dict(processes=arguments.processes, verify=arguments.verify)
    if arguments.source == "engine":
        from gram_engine.convert.export_hf import export_hf

        options = dict(head=arguments.head, evaluation=arguments.evaluation)
        return export_hf(arguments.load, arguments.save, arguments.dtype, **options, **work)
    from gram_engine.convert.import_checkpoint import import_checkpoint

    return import_checkpoint(arguments.load, arguments.save, arguments.dtype, template=arguments.template, **work)


def _translate_bridge_arguments(argv: list[str]) -> list[str]:
    """Replace Megatron-Bridge's `import` and `export` by --from, --load and --save."""
    if not argv or argv[0] not in ("import", "export"):
        return argv
    names = {"--hf-path": "--load", "--megatron-path": "--save"}
    source = "hf"
    if argv[0] == "export":
        names, source = {"--megatron-path": "--load", "--hf-path": "--save"}, "engine"
    return ["--from", source, *(names.get(word, word) for word in argv[1:])]
