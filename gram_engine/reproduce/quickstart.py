"""`make quickstart`: all steps from data to a scored model once, each a command that can be pasted into a shell.

Data, tokenizer, preprocessing, stage 1, stage 2, export and scoring. OUTPUT_DIR/report.json holds the held-out accuracy of the
stage-1 model, which has seen no label, that of the stage-2 model, and every command.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

import tyro

from gram_engine.config.parse import fail
from gram_engine.errors import ConfigError, GramError
from gram_engine.files import write_json
from gram_engine.platform.device import gpu_count
from gram_engine.reproduce.jobs import ROOT, Job, content_hash, content_of
from gram_engine.reproduce.runner import Runner, exclusive_lock, exit_on_signals, program

CONFIGS = "examples/configs"


@dataclass
class QuickstartConfig:
    """Without flags: the demonstration task. With --data and --eval-data: the same steps on your preference pairs."""

    data: tuple[str, ...] = ()
    """Training pairs (JSONL, JSON, .gz, Parquet); default: demonstration data, made in the first step."""
    eval_data: Optional[str] = None
    """Held-out pairs; needed with --data."""
    output_dir: str = "runs/quickstart"
    """Folder for everything."""
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

    def __post_init__(self) -> None:
        self.settings = self.settings or f"{CONFIGS}/{'small' if self.data else 'quickstart'}"
        self.vocab_size = self.vocab_size or (8192 if self.data else 768)
        self.nproc_per_node = self.nproc_per_node or gpu_count() or 2
        self.tensor_model_parallel_size = self.tensor_model_parallel_size or (1 if self.nproc_per_node % 2 else 2)


def make_jobs(config: QuickstartConfig) -> dict[str, Job]:
    """The steps as jobs, each of which needs those before it."""
    out, jobs = Path(config.output_dir), {}

    def add(title: str, name: str, *words: Any, replaces: Optional[Path] = None) -> None:
        number = f"{len(jobs) + 1:02d}-{title.replace(': ', '-').replace(' ', '-')}"
        path = Path(program(name))
        command = (str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path), *map(str, words))
        job = Job(number, title.partition(": ")[2] or title, title, [], out / "logs", command, tuple(jobs), replaces)
        jobs[job.id] = job

    seed = [] if config.seed is None else ["--seed", config.seed]
    train, test, tokenizer = config.data, config.eval_data, out / "tokenizer.model"
    if not train:
        add("demonstration data", "gram", "demo-data", "--output-dir", out / "data", *seed)
        train, test = [out / "data/train.jsonl"], out / "data/test.jsonl"
    template = [] if config.data else ["--template", f"{CONFIGS}/quickstart-template.yaml"]
    size = ["--vocab-size", config.vocab_size]
    add("tokenizer", "gram", "train-tokenizer", "--data", *train, "--output", tokenizer, *size, *template)
    layout = ["--tensor-model-parallel-size", config.tensor_model_parallel_size]
    for stage, command, objective, start in (
        ("stage1", "pretrain", "response-lm", []),
        ("stage2", "finetune", "pair-preference", ["--pretrained-checkpoint", out / "stage1"]),
    ):
        settings = ["--config", f"{config.settings}-{stage}.yaml", "--tokenizer-model", tokenizer, *seed]
        prefix, checkpoint, model = out / "preprocessed" / stage, out / stage, out / f"{stage}-hf"
        add(
            f"{stage}: preprocess", "gram", "preprocess", *settings, "--objective", objective, "--data", *train,
            "--output-prefix", prefix,
        )  # fmt: skip
        add(
            f"{stage}: train", "torchrun", "--standalone", "--nproc-per-node", config.nproc_per_node,
            f"examples/{command}_gram.sh", *settings, "--data-path", prefix, *layout, *start, "--save", checkpoint,
        )  # fmt: skip
        add(f"{stage}: export", "gram", "convert", "--load", checkpoint, "--save", model, replaces=model)
        report = ["--report", out / f"{stage}-score.json"]
        add(f"{stage}: score", "gram", "score", test, out / f"{stage}-scores.jsonl", "--model", model, *report)
    return jobs


def run(config: QuickstartConfig) -> dict[str, Any]:
    """Run every step in the current folder, the repository's root, and write report.json; returns what it holds.

    Raises:
        ConfigError: --data without --eval-data, another run works in the folder, or a step failed.
    """
    if bool(config.data) != bool(config.eval_data):
        raise ConfigError("--data and --eval-data go together: pairs to train on, and held-out pairs to score.")
    out, jobs = Path(config.output_dir), make_jobs(config)
    with exclusive_lock(out) as lock:
        forget_other_runs(config, jobs)
        runner = Runner(jobs, say=lambda line: print(line, flush=True), lock=lock, echo=True)
        runner.run()
        if runner.failed:
            job = jobs[next(iter(runner.failed))]
            end = "\n".join(job.log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])
            raise ConfigError(f"{job.title} failed; the end of {job.log}:\n{end}")
        report = _report(config, jobs)
        write_json(out / "report.json", report)
    return report


def forget_other_runs(config: QuickstartConfig, jobs: dict[str, Job]) -> None:
    """An interrupted run resumes; after a finished one, or with other flags, data or settings, every job runs again."""
    out = Path(config.output_dir)
    inputs = [*config.data, config.eval_data, *(f"{config.settings}-{stage}.yaml" for stage in ("stage1", "stage2"))]
    identity, record = content_hash([asdict(config), content_of(inputs)]), out / "logs" / "identity"
    if (out / "report.json").exists() or not record.exists() or record.read_text() != identity:
        for job in jobs.values():
            job.mark.unlink(missing_ok=True)
        (out / "report.json").unlink(missing_ok=True)
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(identity)


def _report(config: QuickstartConfig, jobs: dict[str, Job]) -> dict[str, Any]:
    out = Path(config.output_dir)
    held_out = {stage: json.loads((out / f"{stage}-score.json").read_text()) for stage in ("stage1", "stage2")}
    return {
        "accuracy_before": held_out["stage1"]["accuracy"],
        "accuracy_after": held_out["stage2"]["accuracy"],
        "swap_consistency": held_out["stage2"]["swap_consistency"],
        "seconds": round(sum(job.seconds for job in jobs.values()), 1),
        "processes": config.nproc_per_node,
        "tensor_model_parallel_size": config.tensor_model_parallel_size,
        "held_out": held_out,
        "commands": [{"step": job.title, "command": str(job), "seconds": round(job.seconds, 1)} for job in jobs.values()],
    }


def main(argv: list[str] | None = None) -> None:
    """Command line: see `--help`."""
    config = tyro.cli(QuickstartConfig, args=argv, prog="gram quickstart", description=__doc__)
    os.chdir(ROOT)  # the commands name files of the repository
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // config.nproc_per_node)))
    exit_on_signals()
    try:
        report = run(config)
    except GramError as error:
        fail(error)
    print(
        f"\nheld-out accuracy before labels (after stage 1): {report['accuracy_before']:.3f}\n"
        f"held-out accuracy after stage 2:                 {report['accuracy_after']:.3f}\n"
        f"same verdict with the responses swapped:         {report['swap_consistency']:.3f}\n"
        f"{report['seconds']:.0f} s with {report['processes']} processes; report: {config.output_dir}/report.json"
    )


if __name__ == "__main__":
    main()
