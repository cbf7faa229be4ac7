"""The GPU suite and the GPU benchmarks in one command of bounded time, with a dated results file.

Every step is a command of its own, that a user could run, with a time limit; what was measured is written after each, so
that an interrupted run keeps it. What did not run is listed with its reason: skipped tests, benchmarks left out, packages
that are missing or of another version than the pins.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
import tyro

from gram_engine.benchmarks.measure import versions
from gram_engine.benchmarks.offline import differences
from gram_engine.benchmarks.page import RESULTS, write_page, write_page_of
from gram_engine.config.parse import fail
from gram_engine.errors import ConfigError, GramError
from gram_engine.files import write_atomically

ROOT = Path(__file__).parents[2]
KERNEL_TESTS = ("tests/test_pair_loss.py", "tests/test_kernels_cross_entropy.py", "tests/test_linear_cross_entropy.py")
PACKS = "--bf16 --seq-length 8192 --global-batch-size 64 --steps 4 --warmup 2"
TAIL = 3000
PACKAGES = ("transformer_engine", "flash_attn")
GRACE = 20
"""Seconds that an interrupted step has to write what it found."""


@dataclass
class Check:
    """Run the GPU tests and benchmarks, and write tools/benchmarks/results/DATE-GPU.json and the page of all results."""

    minutes: float = 15.0
    """Time for everything; steps that would begin later are left out, and named."""
    test_seconds: float = 420.0
    """Most time for the tests."""
    benchmark_seconds: float = 90.0
    """Most time for each benchmark of throughput; the other ones have limits of their own."""
    output: Optional[str] = None
    """Results file instead of the dated one; its page, with the same name and .md, is written beside it."""
    only: Optional[str] = None
    """Run the steps whose name contains this text."""
    offline: bool = False
    """Say in the results that the machine's own packages were used (tools/gpu_check.sh --offline sets it)."""


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
    print(f"results: {path}\npage: {write_page_of(path) if options.output else write_page()}")


def steps(options: Check, has_transformer_engine: bool) -> list[Step]:
    """What to run, the most telling first. The 3B model recomputes its layers: without that it does not fit into 80 GB."""
    tests = ["-m", "pytest", "-q", "tests/gpu", *KERNEL_TESTS]
    found = [Step("tests", tests, options.test_seconds, benchmark=False)]
    for model, memory in (("llama-3.2-1b", ""), ("llama-3.2-3b", "--recompute-granularity full")):
        for stage in ("2", "1"):
            flags = f"tools/benchmark_throughput.py --stage {stage} --model {model} {PACKS} {memory}".split()
            found.append(Step(f"throughput {model} stage {stage}", flags, options.benchmark_seconds))
            if has_transformer_engine:
                fp8 = [*flags, "--fp8-format", "hybrid"]
                found.append(Step(f"throughput {model} stage {stage} fp8", fp8, options.benchmark_seconds))
    peers = ["tools/benchmark_peers.py", "--shape=--model llama-3.2-1b", "--no-parts", "--pack", "4", "--steps", "3"]
    found.append(Step("peers llama-3.2-1b", peers, 150))
    losses = "tools/benchmark_losses.py --device cuda --dtype bfloat16 --shapes llama-3.2-1b llama-3.1-8b".split()
    found.append(Step("losses", losses, 60))
    return found


def missing_packages() -> list[dict[str, str]]:
    """Transformer Engine and flash-attn, where they are absent: what is not measured without them."""
    meaning = {
        "transformer_engine": "its tests are skipped, its FP8 benchmarks left out; local layers are measured",
        "flash_attn": "attention runs by torch's own flash kernels",
    }
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return [{"what": name, "why": f"not installed (make gpu builds it): {meaning[name]}"} for name in absent]


def run(options: Check) -> Path:
    """Run the steps that there is time for; returns the results file."""
    started = time.perf_counter()
    gpu = torch.cuda.get_device_name()
    content: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": gpu,
        "driver": _driver(),
        "versions": versions(),
        "offline": options.offline,
        "steps": [],
        "skipped": missing_packages() + [{"what": name, "why": f"version {told}"} for name, told in differences().items()],
        "rows": [],
    }
    name = f"{content['date'][:10]}-{gpu.lower().replace(' ', '-')}.json"
    path = Path(options.output) if options.output else RESULTS / name
    for step in steps(options, importlib.util.find_spec("transformer_engine") is not None):
        left = 60 * options.minutes - (time.perf_counter() - started)
        add(content, step, left, options)
        _write(path, content)
    return path


def add(content: dict[str, Any], step: Step, left: float, options: Check) -> None:
    """Run one step in the seconds that are left, or leave it out, and note in `content` which, and why."""
    reason = None
    if options.only and options.only not in step.name:
        reason = f"--only {options.only}"
    elif left <= 10:
        reason = f"no time was left of --minutes {options.minutes:g}"
    if reason is not None:
        content["skipped"].append({"what": step.name, "why": reason})
        print(f"{step.name}: left out, {reason}", flush=True)
        return
    outcome, rows = run_step(step, min(step.limit, left))
    content["steps"].append(outcome)
    content["skipped"] += outcome.pop("skipped", [])
    content["rows"] += rows
    print(f"{step.name}: {outcome['exit_status']} after {outcome['seconds']:.0f} s", flush=True)


def run_step(step: Step, limit: float) -> tuple[dict[str, Any], list]:
    """(what happened, the benchmark's rows); of tests also the skipped ones, with their reasons."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / ("rows.json" if step.benchmark else "tests.xml")
        command = [*step.command, *(["--json", str(written)] if step.benchmark else [f"--junitxml={written}"])]
        started = time.perf_counter()
        status, output = _run(command, limit)
        seconds = round(time.perf_counter() - started, 1)
        rows = json.loads(written.read_text())["rows"] if step.benchmark and written.is_file() else []
        skipped = skipped_tests(written) if not step.benchmark and written.is_file() else []
    outcome: dict[str, Any] = {"name": step.name, "command": "python " + " ".join(step.command), "exit_status": status}
    outcome["seconds"] = seconds
    if not step.benchmark:
        summary = [line for line in output.splitlines() if " passed" in line or " failed" in line or " skipped" in line]
        outcome |= {"summary": summary[-1].strip("= ") if summary else "", "skipped": skipped}
    if status != 0:
        outcome["output"] = output[-TAIL:]
    return outcome, rows


def skipped_tests(report: Path) -> list[dict[str, str]]:
    """From pytest's JUnit file: how many tests of which file were skipped for which reason."""
    found = Counter(
        (case.get("classname", "").replace(".", "/"), skipped.get("message", ""))
        for case in xml.parse(report).getroot().iter("testcase")
        for skipped in case.iter("skipped")
    )
    return [
        {"what": f"{count} {'test' if count == 1 else 'tests'} of {file}.py", "why": reason}
        for (file, reason), count in found.items()
    ]


def _run(command: list[str], limit: float) -> tuple[int | str, str]:
    """(exit status, or that it was stopped; output). At the limit it is interrupted, as by Ctrl-C, then killed with the rest.

    The output goes through a file: a child that outlives the command would hold a pipe open. A shell's background jobs ignore
    interrupts, and so would the command, were it not reset.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        status: int | str
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        return status, log.read()


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
