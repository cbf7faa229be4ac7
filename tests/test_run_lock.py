"""A --save folder belongs to one run at a time, and a run that was killed locks nobody out."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from gram_engine.checkpoint import run_lock
from gram_engine.checkpoint.folder import TRACKER, latest_checkpoint
from gram_engine.checkpoint.integrity import verify
from gram_engine.checkpoint.run_lock import LOCK, RunLock, only_run_in
from gram_engine.errors import CheckpointError, ConfigError
from tests.support.hand_made import save, with_flags
from tests.support.tiny import SHAPE, tiny_config

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {"host": "node-7", "machine": ["node-7", "another boot", "pid:[1]", 0]}


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """A holder counts every 0.02 s, and other runs watch its record for a second."""
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(run_lock, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(run_lock, "LOOKS", 50)
    monkeypatch.setattr(run_lock, "RETRY_SECONDS", 0.001)


def acquired(folder, **process):
    """A lock that is held; `process` replaces properties of this process in its record."""
    lock = RunLock(folder)
    lock.process |= process
    lock.acquire()
    return lock


def abandoned(folder, **process):
    """A lock whose holder has stopped counting and does not release it."""
    lock = acquired(folder, **process)
    lock.ended.set()
    lock.thread.join()
    return lock


def records(folder):
    return [path.name for path in (folder / LOCK).iterdir()]


def test_release_leaves_nothing_and_the_next_run_can_acquire(tmp_path):
    for _ in range(3):
        lock = acquired(tmp_path / "run")
        assert records(tmp_path / "run") == [lock.name]
        lock.check()
        lock.release()
        lock.release()
        assert list((tmp_path / "run").iterdir()) == []


def test_a_living_run_of_this_machine_is_noticed_at_once_and_keeps_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "LOOK_SECONDS", 1000)
    holder, second = acquired(tmp_path), RunLock(tmp_path)
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on {socket.gethostname()} .*stop it, or give another --save"):
        second.acquire()
    second.release()
    assert records(tmp_path) == [holder.name] and list(tmp_path.iterdir()) == [tmp_path / LOCK]
    holder.check()


@pytest.mark.parametrize("changed", [{"pid": 4194305}, {"started": 1}])
def test_a_dead_process_or_a_new_one_with_its_pid_is_no_holder(changed, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "LOOK_SECONDS", 1000)
    abandoned(tmp_path, **changed)
    lock = acquired(tmp_path)
    assert records(tmp_path) == [lock.name]


def test_a_zombie_is_no_holder():
    with subprocess.Popen(["sleep", "600"]) as process:
        assert run_lock.started(process.pid) is not None
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
        assert run_lock.started(process.pid) is None


def test_a_run_of_another_machine_is_refused_while_it_counts(tmp_path, capsys):
    holder = acquired(tmp_path, **ELSEWHERE)
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on node-7"):
        RunLock(tmp_path).acquire()
    assert "its record is watched, for up to 1 s" in capsys.readouterr().out
    holder.check()


@pytest.mark.parametrize("machine", [ELSEWHERE["machine"], None])
def test_a_run_of_another_machine_is_replaced_when_it_stops_counting(machine, tmp_path, capsys):
    dead = abandoned(tmp_path, host="node-7", machine=machine)
    lock = acquired(tmp_path)
    assert records(tmp_path) == [lock.name]
    output = capsys.readouterr().out
    assert "its record is watched" in output and "on node-7" in output and "has ended" in output
    dead.release()
    lock.check()
    assert records(tmp_path) == [lock.name]


@pytest.mark.parametrize("content", [b"", b'{"counter": "0000', b"[1]", b"\xff" * 300, b'{"pid": "x"}', b"{}"])
def test_a_record_that_cannot_be_read_is_watched(content, tmp_path, capsys):
    (tmp_path / LOCK).mkdir()
    (tmp_path / LOCK / "record").write_bytes(content)
    lock = acquired(tmp_path)
    assert records(tmp_path) == [lock.name]
    assert "whose record cannot be read has saved here" in capsys.readouterr().out


def test_leftovers_of_a_kill_between_two_calls_lock_nobody_out(tmp_path):
    """The three states between two calls of a claim and of a removal."""
    (tmp_path / LOCK).mkdir()
    (tmp_path / f"{LOCK}.0123.tmp").mkdir()
    (tmp_path / f"{LOCK}.4567.tmp").write_text("a dead record")
    lock = acquired(tmp_path)
    lock.check()
    lock.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dead", [{"started": 1}, ELSEWHERE])
def test_one_of_many_runs_that_find_a_dead_one_wins(dead, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "LOOKS", 2)
    rivals, rounds = 4, 60
    start = threading.Barrier(rivals)

    def rival(folder):
        start.wait(timeout=60)
        try:
            return acquired(folder)
        except ConfigError:
            return None

    with ThreadPoolExecutor(rivals) as pool:
        for number in range(rounds):
            folder = tmp_path / str(number)
            abandoned(folder, **dead)
            winners = [lock for lock in pool.map(rival, [folder] * rivals) if lock]
            assert len(winners) == 1, number
            winners[0].check()
            assert records(folder) == [winners[0].name] and list(folder.iterdir()) == [folder / LOCK]
            winners[0].release()


def test_a_slow_rival_does_not_remove_a_new_holder(tmp_path):
    """It has seen the dead run, and acts only after another run has replaced it."""
    dead, slow = abandoned(tmp_path, started=1), RunLock(tmp_path)
    (seen,) = slow._records()
    holder = acquired(tmp_path)
    slow._remove(seen)
    assert seen.name == dead.name and records(tmp_path) == [holder.name]
    with pytest.raises(ConfigError):
        slow.acquire()


def test_a_holder_notices_that_it_was_replaced_and_does_not_come_back(tmp_path):
    stood_still = abandoned(tmp_path, **ELSEWHERE)
    holder = acquired(tmp_path)
    holder.check()
    stood_still.ended.clear()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="has taken the folder over.* another --save"):
            stood_still.check()
        holder.release()


def test_a_record_that_somebody_removed_is_written_again(tmp_path):
    holder = acquired(tmp_path / "run")
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    holder.check()
    assert records(tmp_path / "run") == [holder.name]
    with pytest.raises(ConfigError):
        RunLock(tmp_path / "run").acquire()


def test_the_record_says_who_and_holds_no_token(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gram", "finetune", "--name", "hf_" + "a" * 34, "x" * 1000])
    lock = acquired(tmp_path)
    found = json.loads(lock.record.read_text())
    assert (found["host"], found["pid"]) == (socket.gethostname(), os.getpid())
    assert found["command"].startswith("gram finetune --name [hidden] x") and len(found["command"]) <= 120
    before = found["counter"]
    lock.check()
    assert json.loads(lock.record.read_text())["counter"] > before


@pytest.fixture(scope="module")
def config(tiny_data):
    return tiny_config(tiny_data["stage2"], tiny_data["tokenizer"], "--num-layers 1")


def refused_in(folder):
    with pytest.raises((ConfigError, CheckpointError)) as error, only_run_in(folder):
        pass
    return f"{error.type.__name__}: {error.value}"


def test_every_process_learns_of_a_refusal(pool, tmp_path):
    holder = acquired(tmp_path)
    for told in pool.run(refused_in, 2, str(tmp_path)):
        assert told.startswith("ConfigError") and f"process {os.getpid()} on" in told
    holder.check()


def test_a_folder_that_cannot_be_written_is_refused_by_every_process(pool, tmp_path):
    (tmp_path / "file").write_text("")
    for told in pool.run(refused_in, 2, str(tmp_path / "file" / "run")):
        assert told.startswith("CheckpointError: --save ") and "cannot be written" in told and "give another folder" in told


def save_after_a_theft(config, folder, stolen_when_written):
    """Save two steps; another run takes the lock before the second, or when that is written but not published yet."""
    import torch.distributed as dist

    from gram_engine.training.initialise import start_model_parallel

    start_model_parallel(config)
    with only_run_in(folder) as lock:
        saver = save(with_flags(config, folder), 1)
        saver.lock, saver.config.checkpoint.async_save = lock, True
        if stolen_when_written:
            save(config, 2, saver=saver)
        if dist.get_rank() == 0:
            lock._remove(lock.record)
            acquired(folder, host="thief")
            (Path(folder) / "iter_0000009.other.tmp").mkdir()
        dist.barrier()
        with pytest.raises(CheckpointError) as error:
            saver.finish() if stolen_when_written else save(config, 2, saver=saver)
    return str(error.value)


@pytest.mark.parametrize("stolen_when_written", [False, True])
def test_a_run_that_lost_its_folder_saves_nothing_more(stolen_when_written, pool, config, tmp_path):
    errors = pool.run(save_after_a_theft, 2, with_flags(config, tmp_path), str(tmp_path), stolen_when_written)
    assert all("on thief" in error and "another --save" in error for error in errors)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000001", "iter_0000009.other.tmp"]
    assert (tmp_path / TRACKER).read_text().strip() == "1" and len(records(tmp_path)) == 1


@contextmanager
def started(tiny_data, folder, *flags, launcher=()):
    """A training process that saves to `folder` and does not end by itself."""
    shape = (*SHAPE.split(), "--train-iters", "100000", "--log-interval", "1")
    files = ("--data-path", tiny_data["stage2"], "--tokenizer-model", tiny_data["tokenizer"], "--save", str(folder))
    process = subprocess.Popen(
        [sys.executable, *launcher, "examples/finetune_gram.sh", *shape, *files, *flags],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_until(process, pattern):
    """(first line that matches, all lines before it)"""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return line, "".join(lines)
    raise AssertionError(f"no line fits {pattern}: {''.join(lines)}")


@pytest.mark.long
def test_two_runs_on_a_folder_and_a_kill(tiny_data, tmp_path):
    with started(tiny_data, tmp_path, "--save-interval", "5") as first:
        read_until(first, "^step 1/")
        with started(tiny_data, tmp_path) as second:
            told = second.communicate(timeout=240)[0]
        assert second.returncode == 2 and "Traceback" not in told and "step 1/" not in told
        assert f"process {first.pid} on {socket.gethostname()} (examples/finetune_gram.sh" in told
        read_until(first, "^saved .* at step")
        first.send_signal(signal.SIGTERM)
        _, left = read_until(first, "received SIGTERM")
        assert first.wait(timeout=60) == 0, left
    assert verify(latest_checkpoint(tmp_path), 0, 1) and not (tmp_path / LOCK).exists()

    with started(tiny_data, tmp_path, "--load", str(tmp_path)) as killed:
        read_until(killed, "^step ")
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert len(records(tmp_path)) == 1
    with started(tiny_data, tmp_path, "--load", str(tmp_path), "--exit-interval", "1") as next_one:
        told = next_one.communicate(timeout=240)[0]
    assert next_one.returncode == 0 and f"process {killed.pid} on" in told and "has ended" in told
    assert "is watched" not in told and "resumed" in told and not (tmp_path / LOCK).exists()


@pytest.mark.long
def test_torchrun_starts_a_killed_run_again(tiny_data, tmp_path):
    flags = ("--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "0.1")
    launcher = ("-m", "gram_engine.training.launch", *flags)
    with started(tiny_data, tmp_path, "--save-interval", "2", "--exit-interval", "12", launcher=launcher) as run:
        read_until(run, "^step 5/")
        (record,) = (tmp_path / LOCK).iterdir()
        os.kill(json.loads(record.read_text())["pid"], signal.SIGKILL)
        _, told = read_until(run, "^step 12/")
        assert re.search("which saved here, has ended", told) and "resumed" in told
        assert run.wait(timeout=60) == 0
    assert (tmp_path / TRACKER).read_text().strip() == "12" and not (tmp_path / LOCK).exists()
