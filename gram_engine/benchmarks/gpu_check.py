"""The GPU tests and the GPU benchmarks in one command with a time limit, and a dated file of their results.

Every step is a separate command with a time limit, which a user could run too. Results are written after each step, so that an
interrupted run keeps what it has measured. The file also lists what did not run, and why: skipped tests, benchmarks that were
left out, packages that are missing or not of the pinned version.
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

from gram_engine.benchmarks.offline import differences
from gram_engine.benchmarks.results import RESULTS, versions, write_page, write_page_of
from gram_engine.config.parse import fail
from gram_engine.errors import ConfigError, GramError
from gram_engine.files import write_json

ROOT = Path(__file__).parents[2]
KERNEL_TESTS = ("tests/test_pair_loss.py", "tests/test_kernels_cross_entropy.py", "tests/test_linear_cross_entropy.py")
BENCHMARK = "-m gram_engine.cli benchmark"
PACKS = "--bf16 --seq-length 8192 --global-batch-size 64 --steps 4 --warmup 2"
TAIL = 3000
PACKAGES = ("transformer_engine", "flash_attn")
GRACE = 20
"""Seconds that an interrupted step gets to write its report."""


@dataclass
class Check:
    """Run the GPU tests and benchmarks, and write tools/benchmarks/results/DATE-GPU.json and the page of all results."""

    minutes: float = 15.0
    """Time limit for all steps; those that would begin later are left out and listed."""
    test_seconds: float = 420.0
    """Time limit for the tests."""
    benchmark_seconds: float = 90.0
    """Time limit for each throughput benchmark; the other benchmarks have fixed limits."""
    output: Optional[str] = None
    """Results file, in place of the dated one; its page is written beside it, with the ending .md."""
    only: Optional[str] = None
    """Run only the steps whose name contains this text."""
    offline: bool = False
    """Note in the results that the machine's own packages were used (set by tools/gpu_check.sh --offline)."""


@dataclass
class Step:
    """One command."""

    name: str
    command: list[str]
    """Arguments of this Python; of a benchmark without `--json FILE`, which is appended."""
    limit: float
    """Seconds."""
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
    """What to run, the most important first. The 3B model recomputes its layers, or it would not fit into 80 GB."""
    tests = ["-m", "pytest", "-q", "-m", "", "tests/gpu", *KERNEL_TESTS]
    found = [Step("tests", tests, options.test_seconds, benchmark=False)]
    for model, memory in (("llama-3.2-1b", ""), ("llama-3.2-3b", "--recompute-granularity full")):
        for stage in ("2", "1"):
            flags = f"{BENCHMARK} throughput --stage {stage} --model {model} {PACKS} {memory}".split()
            found.append(Step(f"throughput {model} stage {stage}", flags, options.benchmark_seconds))
            if has_transformer_engine:
                fp8 = [*flags, "--fp8-format", "hybrid"]
                found.append(Step(f"throughput {model} stage {stage} fp8", fp8, options.benchmark_seconds))
    peers = [*BENCHMARK.split(), "peers", "--shape=--model llama-3.2-1b", "--no-parts", "--pack", "4", "--steps", "3"]
    found.append(Step("peers llama-3.2-1b", peers, 150))
    losses = f"{BENCHMARK} losses --device cuda --dtype bfloat16 --shapes llama-3.2-1b llama-3.1-8b".split()
    found.append(Step("losses", losses, 60))
    return found


def missing_packages() -> list[dict[str, str]]:
    """For Transformer Engine and flash-attn, where one is not installed: what is not measured without it."""
    meaning = {
        "transformer_engine": "its tests are skipped, its FP8 benchmarks left out; local layers are measured",
        "flash_attn": "attention runs by torch's own flash kernels",
    }
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return [{"what": name, "why": f"not installed (make gpu builds it): {meaning[name]}"} for name in missing]


def run(options: Check) -> Path:
    """Run the steps for which there is time; returns the path of the results file."""
    started = time.perf_counter()
    gpu = torch.cuda.get_device_name()
    content: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": gpu,
        "driver": _driver(),
        "versions": versions(),
        "offline": options.offline,
        "steps": [],
        "skipped": missing_packages() + [{"what": name, "why": f"version {text}"} for name, text in differences().items()],
        "rows": [],
    }
    name = f"{content['date'][:10]}-{gpu.lower().replace(' ', '-')}.json"
    path = Path(options.output) if options.output else RESULTS / name
    for step in steps(options, importlib.util.find_spec("transformer_engine") is not None):
        left = 60 * options.minutes - (time.perf_counter() - started)
        add(content, step, left, options)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
    return path


def add(content: dict[str, Any], step: Step, left: float, options: Check) -> None:
    """Run a step within the `left` seconds, or leave it out; `content` gets its outcome, or the reason."""
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
    """(outcome, rows of a benchmark). The outcome of tests also lists the skipped ones, with their reasons."""
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
    """How many tests of which file were skipped, and why, from pytest's JUnit file."""
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
    """(exit status, or a text that it was stopped; output) of a command. After `limit` seconds it is interrupted as by Ctrl-C;
    GRACE seconds later it is killed with all its children.

    Output goes to a file, because a child that outlives the command would keep a pipe open. SIGINT is reset to its default,
    because a background job of a shell ignores it, and its children would too.
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


if __name__ == "__main__":
    main()
