"""Runs jobs: several side by side, each one once, and in a new run only those that no earlier run has finished.

A job that fails takes with it the jobs that need it, and no others.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import functools
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Callable, Iterable, Iterator, Mapping, Optional

from gram_engine.config.parse import parse
from gram_engine.errors import ConfigError
from gram_engine.files import write_json
from gram_engine.reproduce.jobs import Job
from gram_engine.training.stopping import LEAVING


class Runner:
    """Runs jobs. Afterwards `failed` holds the reason for each job without a result.

    Args:
        jobs: by id, each after those it needs.
        at_once: commands that run side by side; they share the processors.
        say: receives lines of progress.
        lock: file descriptor of `exclusive_lock`, which the commands inherit and so hold as well.
        echo: also say each command when it starts, and the training steps that it prints.
    """

    def __init__(
        self, jobs: Mapping[str, Job], at_once: int = 1, say: Callable[[str], None] = print, lock: Optional[int] = None,
        echo: bool = False,
    ):  # fmt: skip
        self.jobs, self.at_once, self.say, self.lock, self.echo = jobs, at_once, say, lock, echo
        self.failed: dict[str, str] = {}
        self._processes: set[subprocess.Popen] = set()
        self._stopping = False

    def run(self) -> None:
        """Run all jobs that are not done. An interrupt stops the running commands and is raised again."""
        waiting = [job for job in self.jobs.values() if not job.done]
        self.say(f"{len(self.jobs)} jobs, {len(self.jobs) - len(waiting)} of them done already")
        for name, reason in flag_problems(waiting).items():
            self.failed[name] = reason
            self.say(f"FAILED {self.jobs[name].title}: {reason}")
        running: dict[Future, Job] = {}
        with ThreadPoolExecutor(self.at_once) as pool:
            try:
                while waiting or running:
                    waiting = self._without_failed(waiting)
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

    def _without_failed(self, waiting: list[Job]) -> list[Job]:
        """The jobs that can still run; those that need a failed job have failed, too."""
        kept = []
        for job in waiting:
            missing = next((name for name in job.needs if name in self.failed), None)
            if missing is not None:
                self.failed[job.id] = f"needs: {self.jobs[missing].title}"
            if job.id not in self.failed:
                kept.append(job)
        return kept

    def _is_ready(self, job: Job) -> bool:
        return all(self.jobs[name].done for name in job.needs)

    def _run(self, job: Job) -> tuple[str, float]:
        """(reason of the failure, or ""; seconds)."""
        if self._stopping:
            return "stopped", 0.0
        if job.replaces is not None:
            shutil.rmtree(job.replaces, ignore_errors=True)
        job.folder.mkdir(parents=True, exist_ok=True)
        if self.echo:
            self.say(f"{job.title}\n    $ {job}")
        started = time.perf_counter()
        try:
            status = self._execute(job)
        except OSError as error:
            return f"{job.command[0]}: {error}", 0.0
        seconds = time.perf_counter() - started
        if status:
            return f"exit status {status}: {_error_of(job.log)} (the whole output: {job.log})", seconds
        if left_early := next((line for line in _lines(job.log) if LEAVING in line), None):
            return f"{left_early}. Rerun the command to resume.", seconds
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_json(job.mark, {"command": str(job), "seconds": round(seconds, 2), "date": date})
        return "", seconds

    def _execute(self, job: Job) -> int:
        """Run the command, its output in the log; returns the exit status."""
        with (
            open(job.log, "w", encoding="utf-8", buffering=1) as log,
            subprocess.Popen(
                [program(job.command[0]), *job.command[1:]], text=True, errors="replace",
                stdout=subprocess.PIPE if self.echo else log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=self._environment(), pass_fds=() if self.lock is None else (self.lock,),
            ) as process,
        ):  # fmt: skip
            self._processes.add(process)
            if self._stopping:  # since this job was taken up
                process.terminate()
            for line in process.stdout or ():
                log.write(line)
                if line.startswith("step "):
                    self.say("    " + " | ".join(line.rstrip().split(" | ")[:5]))
            status = process.wait()
        self._processes.discard(process)
        return status

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
        """An estimate: the mean time of finished jobs of the same kind, else of all; running jobs count in full."""
        took: dict[str, list[float]] = {}
        for job in self.jobs.values():
            if job.done:
                took.setdefault(job.kind, []).append(job.seconds)
        everything = [seconds for kind in took.values() for seconds in kind]
        means = {kind: sum(values) / len(values) for kind, values in {**took, "": everything or [0.0]}.items()}
        return sum(means.get(job.kind, means[""]) for job in left) / self.at_once

    def _stop(self) -> None:
        self._stopping = True
        for process in list(self._processes):
            process.terminate()


def exit_on_signals() -> None:
    """Make SIGINT (Ctrl-C) and SIGTERM end this process by SystemExit, so that a runner stops its commands first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: sys.exit(128 + received))


@contextlib.contextmanager
def exclusive_lock(folder: Path) -> Iterator[int]:
    """Hold a folder's lock while the block, or any command that has inherited the descriptor, runs.

    A command that a killed runner has left behind holds it too, so that a new run does not work beside that command.

    Raises:
        ConfigError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder}: another run, or a command that a killed run has left behind, works here. Wait for it or stop it."
            ) from None
        except OSError:  # a file system without locks
            pass
        yield handle.fileno()


def flag_problems(jobs: Iterable[Job]) -> dict[str, str]:
    """Trainings with flags that the trainer refuses -> the reason; known before anything starts, not hours later."""
    return {job.id: reason for job in jobs if job.trainer_flags and (reason := flag_problem(job.trainer_flags))}


@functools.cache
def flag_problem(flags: tuple[str, ...]) -> str:
    """The trainer's error about the names and types of its flags; "" where there is none."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            parse(list(flags))
    except ConfigError as error:
        return str(error)
    except SystemExit:
        lines = [line.strip() for line in output.getvalue().splitlines()]
        rules = [number for number, line in enumerate(lines) if line and not line.strip("-─│╭╮╰╯ ")]
        return " ".join(lines[rules[0] + 1 : rules[1]]).strip("│ ") if len(rules) > 1 else " ".join(lines)
    return ""


def program(name: str) -> str:
    """The program of this name beside the running Python, else in the PATH."""
    path = Path(sys.executable).parent / name
    return str(path) if path.is_file() else name


def _lines(log: Path) -> list[str]:
    return [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def _error_of(log: Path) -> str:
    """The last line that begins with `error: `, else the last line."""
    lines = _lines(log)
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it printed nothing"])[-1]
