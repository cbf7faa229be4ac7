"""Runs a recipe's jobs: several at once, each once, going on behind what an earlier run has finished.

A job that fails takes along those that need it, and no others.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Callable, Iterable, Iterator, Mapping, Optional

from gram_engine.config.parse import parse
from gram_engine.errors import ConfigError
from gram_engine.files import write_atomically
from gram_engine.reproduce.jobs import Job
from gram_engine.training.stopping import LEAVING


class Runner:
    """Runs jobs. `failed` tells afterwards why a job gave no result.

    Args:
        jobs: by id, each behind those it needs.
        at_once: commands that run side by side; they share the processors.
        say: takes a line of progress.
        lock: descriptor of `alone_in`, for the commands to hold as well.
    """

    def __init__(
        self, jobs: Mapping[str, Job], at_once: int = 1, say: Callable[[str], None] = print, lock: Optional[int] = None
    ):
        self.jobs, self.at_once, self.say, self.lock = jobs, at_once, say, lock
        self.failed: dict[str, str] = {}
        self._processes: set[subprocess.Popen] = set()
        self._stopping = False

    def run(self) -> None:
        """Run all that is not done. An interrupt stops the running commands and is raised again."""
        waiting = [job for job in self.jobs.values() if not job.done]
        self.say(f"{len(self.jobs)} jobs, {len(self.jobs) - len(waiting)} of them done already")
        for name, reason in refused(waiting).items():
            self.failed[name] = reason
            self.say(f"FAILED {self.jobs[name].title}: {reason}")
        running: dict[Future, Job] = {}
        with ThreadPoolExecutor(self.at_once) as pool:
            try:
                while waiting or running:
                    waiting = self._without_hopeless(waiting)
                    ready = [job for job in waiting if self._is_ready(job)][: self.at_once - len(running)]
                    for job in ready:
                        waiting.remove(job)
                        running[pool.submit(self._run, job)] = job
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        job, (reason, seconds) = running.pop(future), future.result()
                        if reason:
                            self.failed[job.id] = reason
                        self._report(job, reason, seconds, [*waiting, *running.values()])
            finally:
                self._stop()

    def _without_hopeless(self, waiting: list[Job]) -> list[Job]:
        """The jobs that can still run; the others have failed with what they need."""
        kept = []
        for job in waiting:
            lost = next((name for name in job.needs if name in self.failed), None)
            if lost is not None:
                self.failed[job.id] = f"needs: {self.jobs[lost].title}"
            if job.id not in self.failed:
                kept.append(job)
        return kept

    def _is_ready(self, job: Job) -> bool:
        return all(self.jobs[name].done for name in job.needs)

    def _run(self, job: Job) -> tuple[str, float]:
        """(why it failed or "", seconds)."""
        if self._stopping:
            return "stopped", 0.0
        if job.replaces is not None:
            shutil.rmtree(job.replaces, ignore_errors=True)
        job.folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        try:
            with (
                open(job.log, "w", encoding="utf-8") as log,
                subprocess.Popen(
                    [_program(job.command[0]), *job.command[1:]],
                    stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=self._environment(),
                    pass_fds=() if self.lock is None else (self.lock,),
                ) as process,
            ):  # fmt: skip
                self._processes.add(process)
                status = process.wait()
            self._processes.discard(process)
        except OSError as error:
            return f"{job.command[0]}: {error}", 0.0
        seconds = time.perf_counter() - started
        if status:
            return f"exit status {status}: {_last_words(job.log)} (all of it: {job.log})", seconds
        if told := next((line for line in _lines(job.log) if LEAVING in line), None):
            return f"{told}. Give the command again to go on.", seconds
        with write_atomically(job.mark) as handle:
            date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            json.dump({"command": str(job), "seconds": round(seconds, 2), "date": date}, handle, indent=1)
        return "", seconds

    def _environment(self) -> dict[str, str]:
        threads = max(1, (os.cpu_count() or 1) // self.at_once)
        return {"OMP_NUM_THREADS": str(threads), **os.environ}

    def _report(self, job: Job, reason: str, seconds: float, left: list[Job]) -> None:
        finished = sum(one.done or one.id in self.failed for one in self.jobs.values())
        line = f"[{finished}/{len(self.jobs)}] {job.title}: {seconds:.0f} s"
        if left:
            line += f" | ETA {datetime.timedelta(seconds=round(self._seconds_left(left)))}"
        self.say(f"FAILED {job.title}: {reason}" if reason else line)

    def _seconds_left(self, left: list[Job]) -> float:
        """By what jobs of the same kind took, or else all jobs; those that are running count in full."""
        took: dict[str, list[float]] = {}
        for job in self.jobs.values():
            if job.done:
                took.setdefault(job.kind, []).append(seconds_of(job))
        everything = [seconds for kind in took.values() for seconds in kind]
        means = {kind: sum(values) / len(values) for kind, values in {**took, "": everything or [0.0]}.items()}
        return sum(means.get(job.kind, means[""]) for job in left) / self.at_once

    def _stop(self) -> None:
        self._stopping = True
        for process in list(self._processes):
            process.terminate()


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[int]:
    """Hold a folder's lock while the block, or any command that has inherited the descriptor, runs.

    So a runner that is started again does not meet the commands that a killed one has left.

    Raises:
        ConfigError: somebody else holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder}: another `gram reproduce`, or a command that a killed one has left, works here. Wait or stop it."
            ) from None
        except OSError:  # a file system without locks
            pass
        yield handle.fileno()


def seconds_of(job: Job) -> float:
    """What a finished job took."""
    return json.loads(job.mark.read_text(encoding="utf-8"))["seconds"]


def refused(jobs: Iterable[Job]) -> dict[str, str]:
    """Trainings whose flags the trainer does not take, and why: told before anything starts, not hours later."""
    problems: dict[tuple[str, ...], str] = {}
    found = {}
    for job in jobs:
        if job.trainer_flags and job.trainer_flags not in problems:
            problems[job.trainer_flags] = flag_problem(job.trainer_flags)
        if reason := problems.get(job.trainer_flags):
            found[job.id] = reason
    return found


def flag_problem(flags: tuple[str, ...]) -> str:
    """What the trainer would say against its flags' names and types; "" where nothing."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            parse(list(flags))
    except ConfigError as error:
        return str(error)
    except SystemExit:
        lines = [line.strip() for line in told.getvalue().splitlines()]
        rules = [number for number, line in enumerate(lines) if line and not line.strip("-─│╭╮╰╯ ")]
        return " ".join(lines[rules[0] + 1 : rules[1]]).strip("│ ") if len(rules) > 1 else " ".join(lines)
    return ""


def _program(name: str) -> str:
    """A program of this interpreter's environment, else of the PATH."""
    program = Path(sys.executable).parent / name
    return str(program) if program.is_file() else name


def _lines(log: Path) -> list[str]:
    return [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def _last_words(log: Path) -> str:
    lines = _lines(log)
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it printed nothing"])[-1]
