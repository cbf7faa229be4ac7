"""`make quickstart`: the whole way of the data once, each step a command that can be pasted into a shell.

Data, tokenizer, preprocessing, stage 1, stage 2, export and scoring; the held-out accuracy of the stage-1 model (which
has seen no label) and of the stage-2 model, and every command, end up in OUTPUT_DIR/report.json.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import tyro

from gram_engine.config.parse import fail
from gram_engine.errors import ConfigError, GramError
from gram_engine.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = "examples/configs"


@dataclass
class QuickstartConfig:
    """Without flags: the demonstration task. With --data and --eval-data: the same steps on your preference pairs."""

    data: tuple[str, ...] = ()
    """Training pairs (JSONL, JSON, .gz, Parquet); default: demonstration data made on the spot."""
    eval_data: Optional[str] = None
    """Held-out pairs; needed with --data."""
    output_dir: str = "runs/quickstart"
    """Everything is written here."""
    settings: Optional[str] = None
    """X of X-stage1.yaml and X-stage2.yaml; default: examples/configs/quickstart, or .../small with --data."""
    vocab_size: Optional[int] = None
    """Pieces of the tokenizer; default: 768, or 8192 with --data."""
    nproc_per_node: Optional[int] = None
    """Training processes; default: the number of GPUs, or 2 where there is none."""
    tensor_model_parallel_size: Optional[int] = None
    """Default: 2 where the number of processes is even, else 1."""
    seed: Optional[int] = None
    """Seed of data, initialisation and order; default: each command's own."""


@dataclass
class Quickstart:
    """The steps of one run and what they took."""

    config: QuickstartConfig
    commands: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        """Run every step; returns the report.

        Raises:
            ConfigError: --data without --eval-data, or a step failed.
        """
        config, out = self.config, Path(self.config.output_dir)
        if bool(config.data) != bool(config.eval_data):
            raise ConfigError("--data and --eval-data go together: pairs to train on, and held-out pairs to score.")
        started = time.perf_counter()
        train, test = config.data, config.eval_data
        if not train:
            self.step("demonstration data", "gram", "demo-data", "--output-dir", out / "data", *self.seed)
            train, test = (out / "data/train.jsonl",), out / "data/test.jsonl"
        model = out / "tokenizer.model"
        size = config.vocab_size or (8192 if config.data else 768)
        template = [] if config.data else ["--template", f"{CONFIGS}/quickstart-template.yaml"]
        self.step(
            "tokenizer", "gram", "train-tokenizer", "--data", *train, "--output", model,
            "--vocab-size", size, *template,
        )  # fmt: skip
        accuracy = {}
        for stage, objective in (("stage1", "response-lm"), ("stage2", "pair-preference")):
            self.train(stage, objective, train, model)
            accuracy[stage] = self.score(stage, test)
        return {
            "accuracy_before": accuracy["stage1"]["accuracy"],
            "accuracy_after": accuracy["stage2"]["accuracy"],
            "swap_consistency": accuracy["stage2"]["swap_consistency"],
            "seconds": round(time.perf_counter() - started, 1),
            "processes": self.processes,
            "tensor_model_parallel_size": self.tensor_parallel,
            "held_out": accuracy,
            "commands": self.commands,
        }

    def train(self, stage: str, objective: str, train: tuple, tokenizer: Path) -> None:
        """Preprocess for one stage, train it, and export it to a Hugging Face folder."""
        out = Path(self.config.output_dir)
        name = self.config.settings or f"{CONFIGS}/{'small' if self.config.data else 'quickstart'}"
        settings = ["--config", f"{name}-{stage}.yaml", "--tokenizer-model", tokenizer, *self.seed]
        prefix = out / "preprocessed" / stage
        self.step(
            f"{stage}: preprocess", "gram", "preprocess", *settings, "--objective", objective, "--data", *train,
            "--output-prefix", prefix,
        )  # fmt: skip
        script = "examples/pretrain_gram.sh" if stage == "stage1" else "examples/finetune_gram.sh"
        start = [] if stage == "stage1" else ["--pretrained-checkpoint", out / "stage1"]
        self.step(
            f"{stage}: train", "torchrun", "--standalone", "--nproc-per-node", self.processes, script, *settings,
            "--data-path", prefix, "--tensor-model-parallel-size", self.tensor_parallel, *start, "--save", out / stage,
        )  # fmt: skip
        self.step(f"{stage}: export", "gram", "convert", "--load", out / stage, "--save", out / f"{stage}-hf")

    def score(self, stage: str, test: str | Path) -> dict[str, Any]:
        """Score the held-out pairs with a stage's export; returns the metrics."""
        out = Path(self.config.output_dir)
        report = out / f"{stage}-score.json"
        scores = out / f"{stage}-scores.jsonl"
        self.step(f"{stage}: score", "gram", "score", test, scores, "--model", out / f"{stage}-hf", "--report", report)
        return json.loads((ROOT / report).read_text(encoding="utf-8"))

    def step(self, title: str, program: str, *arguments: Any) -> None:
        """Run one command in the repository's root; its output goes to OUTPUT_DIR/logs.

        Raises:
            ConfigError: the command failed; the message ends in its last lines.
        """
        command = [self.program(program), *map(str, arguments)]
        number = len(self.commands) + 1
        log = ROOT / self.config.output_dir / "logs" / f"{number:02d}-{title.replace(': ', '-').replace(' ', '-')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"[{number}] {title}\n    $ {shlex.join(command)}", flush=True)
        started = time.perf_counter()
        status = _run_logged(command, log, self.environment())
        seconds = round(time.perf_counter() - started, 1)
        if status:
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])
            raise ConfigError(f"{title} failed (exit status {status}); the end of {log}:\n{tail}")
        print(f"    {seconds} s", flush=True)
        self.commands.append({"step": title, "command": shlex.join(command), "seconds": seconds})

    @property
    def processes(self) -> int:
        """Training processes."""
        if self.config.nproc_per_node is None:
            from gram_engine.platform.device import gpu_count

            self.config.nproc_per_node = gpu_count() or 2
        return self.config.nproc_per_node

    @property
    def tensor_parallel(self) -> int:
        """Tensor-parallel size."""
        return self.config.tensor_model_parallel_size or (1 if self.processes % 2 else 2)

    @property
    def seed(self) -> list[str]:
        """The flag --seed, where a seed is given."""
        return [] if self.config.seed is None else ["--seed", str(self.config.seed)]

    def program(self, name: str) -> str:
        """A program of this interpreter's environment, relative to the root where it lies below."""
        program = Path(sys.executable).parent / name
        return str(program.relative_to(ROOT) if program.is_relative_to(ROOT) else program)

    def environment(self) -> dict[str, str]:
        """This environment, with the processors shared out to the training processes (torchrun would give each one)."""
        threads = max(1, (os.cpu_count() or 1) // self.processes)
        return {"OMP_NUM_THREADS": str(threads), **os.environ}


def _run_logged(command: list[str], log: Path, environment: dict[str, str]) -> int:
    """Run a command, its output in a file and a trainer's step lines on the terminal too; returns the exit status."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with (
        open(log, "w", encoding="utf-8") as output,
        subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process,
    ):
        for line in process.stdout:
            output.write(line)
            if line.startswith("step "):
                print("    " + " | ".join(line.rstrip().split(" | ")[:5]), flush=True)
    return process.returncode


def main(argv: list[str] | None = None) -> None:
    """Command line: see `--help`."""
    config = tyro.cli(QuickstartConfig, args=argv, prog="gram quickstart", description=__doc__)
    try:
        report = Quickstart(config).run()
    except GramError as error:
        fail(error)
    path = ROOT / config.output_dir / "report.json"
    with write_atomically(path) as handle:
        json.dump(report, handle, indent=2)
    print(
        f"\nheld-out accuracy before labels (after stage 1): {report['accuracy_before']:.3f}\n"
        f"held-out accuracy after stage 2:                 {report['accuracy_after']:.3f}\n"
        f"same verdict with the responses swapped:         {report['swap_consistency']:.3f}\n"
        f"{report['seconds']:.0f} s with {report['processes']} processes; report: {config.output_dir}/report.json"
    )


if __name__ == "__main__":
    main()
