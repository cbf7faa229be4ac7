"""Faults that checkpoints must survive: how each is injected, and what must be loaded after it.

    python -m tests.support.faults                     tries every fault and prints the table of examples/docs/faults.md
    GRAM_FAULTS=long python -m tests.support.faults    more of each, and runs of two processes
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Callable, Iterator

from tests.support.fault_lab import LONG, Fault, Lab, Trap, calls_of, die, disk_full, io_error
from tests.support.hand_made import in_child, in_world, load, save, start_world


def kill_while_saving(lab: Lab) -> Iterator[str]:
    """Saves a new step, with pruning and with leftovers of an earlier kill; then step 2 again, with another state."""
    for step, seed, every in ((3, 0, 1 if LONG else 6), (2, 1, 1 if LONG else 16)):

        def task(folder: Path, step=step, seed=seed) -> None:
            (folder / "iter_0000003.1.tmp").mkdir()
            (folder / "iter_0000003.1.tmp" / "__0_0.distcp").touch()
            save(lab.flags(folder, keep_last=2), step, seed)

        def killed(folder: Path, at: int, task=task) -> None:
            Trap(folder).set(folder, at, die)
            task(folder)

        cases = []
        for at in range(1, calls_of(lab, task) + 1, every):
            folder = lab.copy()
            status, _ = in_child(killed, folder, at)
            assert status == -signal.SIGKILL
            cases.append((folder, lab.before_or_new(step, seed)))
        yield from lab.check_all(cases)


def kill_at_random(lab: Lab) -> Iterator[str]:
    """The process saves one step after the other; what it has reported as saved must exist."""
    context = multiprocessing.get_context("fork")

    def run(folder: Path, said, async_save: bool) -> None:
        os.setsid()
        start_world()
        saver = None
        said.send(2)
        for step in range(3, 9):
            saver = save(lab.flags(folder, async_save=async_save), step, saver=saver)
            saver.finish()
            said.send(step)

    cases = []
    for case in range(200 if LONG else 4):
        folder, draw = lab.copy(), random.Random(case)
        heard, said = context.Pipe(duplex=False)
        process = context.Process(target=run, args=(folder, said, case % 2 == 1))
        process.start()
        said.close()
        last = heard.recv()
        time.sleep(draw.uniform(0, 0.4))
        os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(EOFError):
            while True:
                last = heard.recv()
        process.join()
        allowed = {lab.meant[last, 0]: "the last step that it reported as saved"}
        cases.append((folder, {lab.meant[last + 1, 0]: "the step after that"} | allowed))
    yield from lab.check_all(cases)


def kill_the_writer(lab: Lab) -> Iterator[str]:
    """--async-save: the writer process is killed; training gets an error, and can save again."""
    yield from _in_the_writer(lab, die, "ended with -9")


def full_disk_in_the_writer(lab: Lab) -> Iterator[str]:
    """--async-save: the disk of the writer process is full."""
    yield from _in_the_writer(lab, disk_full, "No space left on device")


def _in_the_writer(lab: Lab, spring: Callable[[str], None], message: str) -> Iterator[str]:
    from gram_engine.errors import CheckpointError

    def attempt(at: int) -> str | None:
        folder = lab.copy()
        trap = Trap(folder, only_in_children=True)
        trap.set(folder, at, spring)
        saver = save(lab.flags(folder, async_save=True), 3)
        try:
            saver.finish()
        except CheckpointError as error:
            assert message in str(error) and "iter_0000003 cannot be saved" in str(error), error
            assert not list(folder.glob("*.tmp"))
            trap.set(folder, None, None)
            return lab.check(folder, {lab.meant[2, 0]: "CheckpointError, the step before"})
        return None

    for at in itertools.count(1, 1 if LONG else 9):
        _, outcome = in_child(attempt, at)
        if outcome is None:  # after the writer's last call
            return
        yield outcome


def kill_the_trainer_while_the_writer_works(lab: Lab) -> Iterator[str]:
    """--async-save: the writer process continues alone but publishes nothing, and does not disturb the next run."""
    from gram_engine.checkpoint import writer as checkpoint_writer

    def run(folder: Path, seconds: float) -> None:
        write = checkpoint_writer.PendingCheckpoint._write

        def slowly(*arguments):
            time.sleep(0.1)
            write(*arguments)

        checkpoint_writer.PendingCheckpoint._write = slowly
        save(lab.flags(folder, async_save=True), 3)
        time.sleep(seconds)
        die("")

    cases = []
    for seconds in (0, 0.05, 0.1, 0.15) * (5 if LONG else 1):
        folder = lab.copy()
        assert in_child(run, folder, seconds)[0] == -signal.SIGKILL
        cases.append((folder, {lab.meant[2, 0]: "the step before"}))
    yield from lab.check_all(cases)


def kill_one_of_two(lab: Lab) -> Iterator[str]:
    """Two processes save; one is killed, the other gets an error of gloo. A run of one process resumes."""

    def run(folder: Path, victim: int, at: int) -> None:
        if int(os.environ["RANK"]) == victim:
            Trap(folder).set(folder, at, die)
        with contextlib.suppress(RuntimeError):  # gloo: connection closed by peer
            save(lab.flags(folder), 3)

    cases = []
    for at in range(1, 40, 1 if LONG else 20):
        for victim in (0, 1):
            folder = lab.copy()
            in_world(2, folder.parent / "store", run, folder, victim, at)
            cases.append((folder, lab.before_or_new()))
    yield from lab.check_all(cases)


def failing_calls(lab: Lab) -> Iterator[str]:
    """A full disk from some call on; a device error at one call."""
    from gram_engine.errors import CheckpointError

    def task(folder: Path) -> None:
        save(lab.flags(folder, keep_last=2), 3)

    def attempt(cases: list[tuple]) -> list[str]:
        trap, outcomes = Trap(lab.folder), []
        for at, spring in cases:
            folder = lab.copy()
            trap.set(folder, at, spring)
            allowed = {lab.meant[3, 0]: "saved all the same"}
            try:
                task(folder)
            except CheckpointError as error:
                assert "cannot be saved" in str(error) and "resume with --load" in str(error), error
                allowed = {digest: f"CheckpointError, {name}" for digest, name in lab.before_or_new().items()}
            trap.set(folder, None, None)
            outcomes.append(lab.check(folder, allowed))
        return outcomes

    calls = calls_of(lab, task)
    every = 1 if LONG else 9
    cases = [(at, disk_full) for at in range(1, calls + 1, every)] + [(at, io_error) for at in range(2, calls + 1, every)]
    yield from in_child(attempt, cases)[1]


def file_size_limit(lab: Lab) -> Iterator[str]:
    """The operating system refuses writes beyond a file size, or kills the process for them."""
    from gram_engine.errors import CheckpointError

    def run(folder: Path, limit: int, kills: bool, async_save: bool) -> str:
        if kills:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            save(lab.flags(folder, async_save=async_save), 3).finish()
        except CheckpointError as error:
            assert "cannot be saved" in str(error), error
            return "CheckpointError"
        return "saved"

    cases = []
    for limit in (0, 1, 500, 1_000, 2_000, 10_000, 20_000, 22_000, 24_000, 26_000, 28_000)[:: 1 if LONG else 3]:
        for kills in (False, True):
            for async_save in (False, True):
                folder = lab.copy()
                status, outcome = in_child(run, folder, limit, kills, async_save)
                assert outcome == "CheckpointError" or (outcome is None and status == -signal.SIGXFSZ), (status, outcome)
                cases.append((folder, {lab.meant[2, 0]: f"{outcome or 'killed'}, the step before"}))
    yield from lab.check_all(cases)


def damaged_files(lab: Lab) -> Iterator[str]:
    """Every file of the newest checkpoint, damaged in every way."""
    newest = lab.base / "iter_0000002"
    names = [str(path.relative_to(newest)) for path in sorted(newest.rglob("*")) if path.is_file()]
    cases = [(name, how, seed) for name in names for how in DAMAGE for seed in range(10 if LONG else 1)][:: 1 if LONG else 2]

    def attempt() -> list[str]:
        return [_damage_and_load(lab, *case) for case in cases]

    yield from in_child(attempt)[1]


def _damage_and_load(lab: Lab, name: str, how: str, seed: int) -> str:
    folder = lab.copy()
    path = folder / "iter_0000002" / name
    DAMAGE[how](path, random.Random(f"{name} {how} {seed}"))
    found, lines, used = load(lab.flags(folder))
    if (name, how) == ("integrity.json", "missing"):
        assert found == lab.meant[2, 0] and "without integrity.json" in "".join(lines)
        outcome = "read unchecked, with a note"
    else:
        assert found == lab.meant[1, 0] and used.name == "iter_0000001", (name, how, lines)
        assert lines[0].startswith("WARNING: DAMAGED CHECKPOINT") and path.name in lines[0], lines
        assert "iter_0000001 is used instead" in lines[1], lines
        outcome = "file named, the step before"
    shutil.rmtree(folder.parent)
    return outcome


def _flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path, random.Random], object]] = {
    "missing": lambda path, _: path.unlink(),
    "empty": lambda path, _: path.write_bytes(b""),
    "cut off": lambda path, draw: os.truncate(path, draw.randrange(1, path.stat().st_size)),
    "one bit flipped": _flip,
    "zeros": lambda path, _: path.write_bytes(bytes(path.stat().st_size)),
}


def damaged_folders(lab: Lab) -> Iterator[str]:
    """The tracker and the folders themselves."""

    def attempt() -> list[str]:
        outcomes = []
        for name, (change, step) in FOLDER_DAMAGE.items():
            folder = lab.copy()
            change(folder)
            found, lines, _ = load(lab.flags(folder))
            assert found == lab.meant[step, 0], (name, lines)
            assert step == 2 or "WARNING: DAMAGED CHECKPOINT" in lines[0], (name, lines)
            outcomes.append("the newest whole step")
        return outcomes

    yield from in_child(attempt)[1]


TRACKER = "latest_checkpointed_iteration.txt"
FOLDER_DAMAGE: dict[str, tuple[Callable[[Path], object], int]] = {
    "newest removed": (lambda run: shutil.rmtree(run / "iter_0000002"), 1),
    "newest empty": (lambda run: [shutil.rmtree(run / "iter_0000002"), (run / "iter_0000002").mkdir()], 1),
    "newest a file": (lambda run: [shutil.rmtree(run / "iter_0000002"), (run / "iter_0000002").touch()], 1),
    "files moved in from an older step": (
        lambda run: shutil.copy(run / "iter_0000001/__0_0.distcp", run / "iter_0000002/__0_0.distcp"),
        1,
    ),
    "tracker missing": (lambda run: (run / TRACKER).unlink(), 2),
    "tracker empty": (lambda run: (run / TRACKER).write_text(""), 2),
    "tracker garbage": (lambda run: (run / TRACKER).write_bytes(b"\xff\x00two"), 2),
    "tracker names nothing": (lambda run: (run / TRACKER).write_text("7"), 2),
    "replaced step left aside": (lambda run: (run / "iter_0000002").rename(run / "iter_0000002.old"), 2),
}

FAULTS = (
    Fault("killed while it saves", "SIGKILL at every call that opens, writes, syncs, renames, removes", 17, kill_while_saving),
    Fault("killed at any time", "SIGKILL of all processes after a random time", 3, kill_at_random),
    Fault("`--async-save`: writer killed", "SIGKILL at every third call of the writer", 3, kill_the_writer),
    Fault("`--async-save`: disk full", "ENOSPC from every third call of the writer on", 3, full_disk_in_the_writer),
    Fault("`--async-save`: training killed", "SIGKILL while the writer works", 4, kill_the_trainer_while_the_writer_works),
    Fault("two processes, one killed", "SIGKILL at every tenth call of the main process, or of the other", 4, kill_one_of_two),
    Fault("disk full, device error", "ENOSPC from a call on, EIO at a call; every third call", 12, failing_calls),
    Fault("write refused", "the kernel's limit on file sizes: EFBIG, or death by SIGXFSZ", 8, file_size_limit),
    Fault("damaged file", "each file missing, empty, cut off, one bit flipped, zeros", 20, damaged_files),
    Fault("damaged folder", "folder missing or mixed, tracker missing, empty, wrong", 9, damaged_folders),
)


def try_fault(fault_name: str, folder: Path, data: dict) -> Counter:
    """Try all cases of one fault; returns how often each outcome occurred. Call it in a process without process groups."""
    from gram_engine.platform import device as platform

    platform.initialise("cpu")
    from gram_engine.checkpoint import save_load as checkpoint  # noqa: F401  imported once, here, and not in every child
    from tests.support.tiny import tiny_config

    lab = Lab(folder, tiny_config(data["stage2"], data["tokenizer"], "--num-layers 1"))
    (fault,) = (fault for fault in FAULTS if fault.name == fault_name)
    outcomes = Counter(fault.inject(lab))
    assert outcomes.total() >= fault.at_least, outcomes
    return outcomes


def fault_rows() -> list[str]:
    """Try all faults; returns a Markdown table: fault, how it was injected, times tried, outcomes."""
    from tests.conftest import make_tiny_data

    rows = ["| fault | how it is injected | times | what is loaded afterwards |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        data = make_tiny_data(Path(folder))
        for number, fault in enumerate(FAULTS):
            (place := Path(folder) / str(number)).mkdir()
            outcomes = try_fault(fault.name, place, data)
            told = "; ".join(f"{count} x {outcome}" for outcome, count in outcomes.most_common())
            rows.append(f"| {fault.name} | {fault.how} | {outcomes.total()} | {told} |")
    return rows


if __name__ == "__main__":
    print("\n".join(fault_rows()))
