"""The GPU suite and the GPU benchmarks in one command of bounded time, with a dated results file.

Every step is a command of its own, that a user could run, with a time limit; what was measured is written after each, so
that an interrupted run keeps it.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
import tyro

from gram_engine.benchmarks.measure import versions
from gram_engine.benchmarks.page import RESULTS, write_page
from gram_engine.command_line import fail
from gram_engine.errors import ConfigError, GramError
from gram_engine.fileio import write_atomically

ROOT = Path(__file__).parents[2]
KERNEL_TESTS = ("tests/test_pair_loss.py", "tests/test_kernels_cross_entropy.py", "tests/test_linear_cross_entropy.py")
PACKS = "--bf16 --seq-length 8192 --global-batch-size 64 --steps 4 --warmup 2"
TAIL = 3000


@dataclass
class Check:
    """Run the GPU tests and benchmarks, and write tools/benchmarks/results/DATE-GPU.json and the page of all results."""

    minutes: float = 10.0
    """Time for everything; steps that would begin later are left out, and named."""
    output: Optional[str] = None
    """Results file instead of the dated one."""
    only: Optional[str] = None
    """Run the steps whose name contains this text."""


@dataclass
class Step:
    """A command (arguments of this Python), with its time limit; benchmarks get `--json FILE` appended."""

    name: str
    command: list[str]
    limit: float
    benchmark: bool = True


def main(argv: list[str] | None = None) -> None:
    """Entry point of tools/gpu_check.sh."""
    options = tyro.cli(Check, args=sys.argv[1:] if argv is None else argv, prog="gpu_check")
    try:
        if not torch.cuda.is_available():
            raise ConfigError("torch finds no GPU here. Check the driver (nvidia-smi), and that torch is a CUDA build.")
        path = run(options)
    except GramError as error:
        fail(error)
    print(f"results: {path}\npage: {write_page()}")


def steps(has_transformer_engine: bool) -> list[Step]:
    """What to run, the most telling first."""
    found = [Step("tests", ["-m", "pytest", "-q", "tests/gpu", *KERNEL_TESTS], 240, benchmark=False)]
    for model in ("llama-3.2-1b", "llama-3.2-3b"):
        for stage in ("2", "1"):
            flags = f"tools/benchmark_throughput.py --stage {stage} --model {model} {PACKS}".split()
            found.append(Step(f"throughput {model} stage {stage}", flags, 90))
            if has_transformer_engine:
                found.append(Step(f"throughput {model} stage {stage} fp8", [*flags, "--fp8-format", "hybrid"], 90))
    peers = ["tools/benchmark_peers.py", "--shape=--model llama-3.2-1b", "--no-parts", "--pack", "4", "--steps", "3"]
    found.append(Step("peers llama-3.2-1b", peers, 150))
    losses = "tools/benchmark_losses.py --device cuda --dtype bfloat16 --shapes llama-3.2-1b llama-3.1-8b".split()
    found.append(Step("losses", losses, 60))
    return found


def run(options: Check) -> Path:
    """Run the steps that there is time for; returns the results file."""
    started = time.perf_counter()
    gpu = torch.cuda.get_device_name()
    content: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": gpu,
        "driver": _driver(),
        "versions": versions(),
        "steps": [],
        "rows": [],
    }
    name = f"{content['date'][:10]}-{gpu.lower().replace(' ', '-')}.json"
    path = Path(options.output) if options.output else RESULTS / name
    for step in steps(importlib.util.find_spec("transformer_engine") is not None):
        if options.only and options.only not in step.name:
            continue
        left = 60 * options.minutes - (time.perf_counter() - started)
        outcome, rows = run_step(step, min(step.limit, left)) if left > 10 else ({"name": step.name, "left_out": "no time"}, [])
        content["steps"].append(outcome)
        content["rows"] += rows
        _write(path, content)
        print(f"{step.name}: {outcome.get('exit_status', 'left out')} after {outcome.get('seconds', 0):.0f} s", flush=True)
    return path


def run_step(step: Step, limit: float) -> tuple[dict[str, Any], list]:
    """(what happened, the benchmark's rows)."""
    with tempfile.TemporaryDirectory() as folder:
        rows_file = Path(folder) / "rows.json"
        command = [*step.command, *(["--json", str(rows_file)] if step.benchmark else [])]
        started = time.perf_counter()
        try:
            done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=limit)
            status, output = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired as stopped:
            status, output = f"stopped after {limit:.0f} s", "".join(
                part.decode() if isinstance(part, bytes) else part or "" for part in (stopped.stdout, stopped.stderr)
            )
        rows = json.loads(rows_file.read_text())["rows"] if rows_file.is_file() else []
    outcome = {"name": step.name, "command": "python " + " ".join(step.command), "exit_status": status}
    outcome["seconds"] = round(time.perf_counter() - started, 1)
    summary = [line for line in output.splitlines() if " passed" in line or " failed" in line]
    if not step.benchmark:
        outcome["summary"] = summary[-1].strip("= ") if summary else ""
    if status != 0:
        outcome["output"] = output[-TAIL:]
    return outcome, rows


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as handle:
        json.dump(content, handle, indent=1)


if __name__ == "__main__":
    main()
