"""A long run that is killed again and again, beside one that is not: both must end with the same bits, and neither may use more
memory or open files over time.

    python -m tests.support.soak --steps 2000 --kills 20 --json runs/soak.json

Both runs train the same tiny model on the demonstration data in `processes` data-parallel processes. In the disturbed run, a
random process is killed (kill -9) at a random moment, and torchrun restarts the run. Every fourth time the whole run gets
SIGTERM instead; it saves, exits with status 0 and is started again.
"""

from __future__ import annotations

import contextlib
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import psutil
import torch
import torch.distributed.checkpoint as dcp
import tyro
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from gram_engine.benchmarks.results import write_rows
from gram_engine.benchmarks.workload import demonstration_data
from gram_engine.checkpoint.folder import latest_checkpoint
from gram_engine.config.parse import fail
from gram_engine.errors import GramError

STEP = re.compile(r"step (\d+)/")
SILENCE_SECONDS = 240
SHAPE = (
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --num-query-groups 2 --seq-length 512 "
    "--global-batch-size 8 --lr 1e-3 --log-interval 1 --use-distributed-optimizer --async-save --keep-last 3 "
    "--distributed-timeout-minutes 2"
).split()


@dataclass
class SoakConfig:
    """Kill a long run again and again, and compare it with an undisturbed one."""

    steps: int = 2000
    """Steps of each run."""
    kills: int = 20
    """Faults in the disturbed run: kill -9 of one process, every fourth time SIGTERM to the run."""
    processes: int = 2
    """Data-parallel processes."""
    save_interval: int = 25
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of the moments of the faults and of the processes that are killed."""
    output_dir: str = "runs/soak"
    """Folder for data, checkpoints and logs; emptied first."""
    json: Optional[str] = None
    """Also write the figures to this file."""


@dataclass
class Run:
    """What was observed of one run."""

    name: str
    seconds: float = 0.0
    killed: int = 0
    terminated: int = 0
    steps_done: int = 0
    """Steps trained, including those that were trained again after a kill."""
    resident_mib: list[float] = field(default_factory=list)
    open_files: list[int] = field(default_factory=list)


def main(argv: list[str] | None = None) -> None:
    """Run both, compare them and print the figures; exit status 1 if they differ."""
    config = tyro.cli(SoakConfig, args=argv, prog="python -m tests.support.soak")
    try:
        runs, equal = soak(config)
    except GramError as error:
        fail(error)
    for run in runs:
        print(
            f"{run.name}: {run.steps_done} steps in {run.seconds:.0f} s, {run.killed} kill -9, {run.terminated} SIGTERM, "
            f"resident {growth(run.resident_mib)} MiB, open files {growth(run.open_files)}"
        )
    print(f"final weights and optimizer state: {'equal to the bit' if equal else 'DIFFERENT'}")
    if config.json:
        write_rows(config.json, runs, equal=equal, command=" ".join(["python -m tests.support.soak", *sys.argv[1:]]))
    sys.exit(0 if equal else 1)


def soak(config: SoakConfig) -> tuple[list[Run], bool]:
    """The undisturbed and the disturbed run, and whether their last checkpoints hold the same tensors."""
    folder = Path(config.output_dir)
    shutil.rmtree(folder, ignore_errors=True)
    files = demonstration_data(folder)
    runs = [
        train(config, files, folder / "undisturbed", faults=0),
        train(config, files, folder / "disturbed", faults=config.kills),
    ]
    first, second = (tensors(latest_checkpoint(folder / run.name)) for run in runs)
    equal = first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    return runs, equal


def train(config: SoakConfig, files: list[str], save: Path, faults: int) -> Run:
    """Train to the end, disturbed by `faults` faults; the log goes to SAVE.log.

    Raises:
        GramError: the run failed, or printed nothing for minutes.
    """
    run, draw = Run(save.name), random.Random(config.seed)
    started = time.perf_counter()
    # The run is cut into as many parts as there are faults and one more; each fault comes at a random step of its part.
    due = [int((part + draw.random()) * config.steps / (faults + 1)) + 1 for part in range(faults)]
    command = [
        *(sys.executable, "-m", "gram_engine.training.launch", "examples/finetune_gram.sh"),
        *("--nproc-per-node", str(config.processes)),
        *("--max-restarts", str(faults), "--monitor-interval", "0.1", *SHAPE, *files, "--train-iters", str(config.steps)),
        *("--save", str(save), "--save-interval", str(config.save_interval), "--load", str(save)),
    ]
    save.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{save}.log", "w", buffering=1, encoding="utf-8") as log:
        while _start(command, run, due, draw, log) < config.steps:
            pass
    run.seconds = time.perf_counter() - started
    return run


def _start(command: list[str], run: Run, due: list[int], draw: random.Random, log) -> int:
    """Start the launcher, disturb the processes that it runs, and wait for its end; returns the last step logged."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    root = Path(__file__).resolve().parents[2]
    launcher = subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    step = 0
    try:
        for line in _lines(launcher):
            log.write(line)
            found = STEP.match(line)
            if found is None:
                continue
            step = int(found[1])
            run.steps_done += 1
            _record(launcher, run, step)
            if due and step >= due[0]:
                due.pop(0)
                time.sleep(draw.random() * 0.2)
                _disturb(launcher, run, draw)
    finally:
        for process in [*_trainers(launcher), launcher]:
            process.kill()
    if launcher.wait() != 0:
        raise GramError(f"{run.name}: the run ended with status {launcher.returncode} after step {step}; see {log.name}.")
    return step


def _lines(launcher: subprocess.Popen):
    """The launcher's output, line by line, until it ends, even if a process that outlives it keeps the pipe open."""
    lines: queue.Queue = queue.Queue()

    def read() -> None:
        for line in launcher.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    last_line = time.monotonic()
    while True:
        try:
            line = lines.get(timeout=1)
        except queue.Empty:
            if launcher.poll() is not None:
                return
            if time.monotonic() - last_line > SILENCE_SECONDS:
                raise GramError(f"no output for {SILENCE_SECONDS} s: the run hangs.") from None
            continue
        if line is None:
            launcher.wait()
            return
        last_line = time.monotonic()
        yield line


def _trainers(launcher: subprocess.Popen) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return sorted(psutil.Process(launcher.pid).children(), key=lambda process: process.pid)
    return []


def _record(launcher: subprocess.Popen, run: Run, step: int) -> None:
    """Every ten steps, note memory and open files of the first trainer process."""
    with contextlib.suppress(psutil.Error, IndexError):
        if step % 10 == 0:
            trainer = _trainers(launcher)[0]
            run.resident_mib.append(trainer.memory_info().rss / 2**20)
            run.open_files.append(trainer.num_fds())


def _disturb(launcher: subprocess.Popen, run: Run, draw: random.Random) -> None:
    if (run.killed + run.terminated) % 4 == 3:
        launcher.send_signal(signal.SIGTERM)
        run.terminated += 1
        return
    victims = _trainers(launcher)
    if victims:
        draw.choice(victims).kill()
        run.killed += 1


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint (weights and optimizer state), by key."""
    described = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    found = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in described.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(found, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    return found


def growth(figures: list[float]) -> str:
    """'a -> b': medians of the second and the last tenth of the run; in the first, libraries are still being loaded."""
    tenth = max(1, len(figures) // 10)
    early, late = figures[tenth : 2 * tenth] or figures, figures[-tenth:]
    return f"{_median(early):.0f} -> {_median(late):.0f}"


def _median(figures: list[float]) -> float:
    return sorted(figures)[len(figures) // 2] if figures else float("nan")


if __name__ == "__main__":
    main()
