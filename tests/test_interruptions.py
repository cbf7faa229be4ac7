"""Signals, time limits, killed and hanging processes: the run ends as documented, and nothing is lost."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gram_engine.benchmarks.workload import demonstration_data
from gram_engine.checkpoint.folder import TRACKER
from tests.support.cases import short_first
from tests.support.soak import SHAPE, SoakConfig, soak
from tests.support.tiny import tiny_config, tiny_trainer

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def stopped_run(prefix, tokenizer_model, folder, flags, signal_number, signal_step):
    """Train; rank 1 (or the only one) gets the signal in the middle of a step. Returns the state that was reached."""
    import torch.distributed as dist

    trainer = tiny_trainer(tiny_config(prefix, tokenizer_model, f"{flags} --save {folder} --async-save"))
    step = trainer.step

    def step_with_signal(batch):
        if signal_number and trainer.state.iteration + 1 == signal_step and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal_number)
        return step(batch)

    trainer.step = step_with_signal
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    trainer.train()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    return trainer.state.iteration


@pytest.mark.parametrize("number", short_first([signal.SIGUSR1], [signal.SIGUSR1, signal.SIGTERM]))
def test_a_signal_to_one_process_stops_all_after_the_same_step_with_a_checkpoint(number, pool, tiny_data, tmp_path):
    reached = pool.run(
        stopped_run, 2, tiny_data["stage2"], tiny_data["tokenizer"], str(tmp_path), "--objective pair-preference", number, 3
    )
    assert reached == [3, 3]
    assert (tmp_path / TRACKER).read_text().strip() == "3"


@pytest.mark.long
def test_the_time_limit_stops_all_with_a_checkpoint(pool, tiny_data, tmp_path):
    flags = "--objective pair-preference --train-iters 100000 --exit-duration-in-mins 0.02"
    reached = pool.run(stopped_run, 2, tiny_data["stage2"], tiny_data["tokenizer"], str(tmp_path), flags, 0, 0)
    assert 1 <= reached[0] == reached[1] < 100000
    assert (tmp_path / TRACKER).read_text().strip() == str(reached[0])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return demonstration_data(tmp_path_factory.mktemp("interrupted"))


def test_sigterm_to_the_launcher_saves_and_exits_0(files, tmp_path):
    """As cluster managers send it; torchrun itself would kill the trainers and exit with 1."""
    flags = [*SHAPE, *files, "--train-iters", "100000", "--save", str(tmp_path / "run"), "--nproc-per-node", "2"]
    launcher = subprocess.Popen(
        ["bash", "examples/finetune_gram.sh", *flags],
        cwd=ROOT, env={**ENVIRONMENT, "PYTHON": sys.executable}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    output = []
    try:
        for line in launcher.stdout:
            output.append(line)
            if line.startswith("step 5/"):
                launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=120) == 0, "".join(output)
    finally:
        launcher.kill()
    left = re.search(r"received SIGTERM: leaving after step (\d+)/100000, saved", "".join(output))
    assert (tmp_path / "run" / TRACKER).read_text().strip() == left[1]


@pytest.mark.long
def test_a_run_with_two_killed_processes_ends_with_the_same_bits(tmp_path):
    runs, equal = soak(SoakConfig(steps=30, kills=2, save_interval=5, output_dir=str(tmp_path)))
    assert equal
    assert [(run.killed, run.terminated) for run in runs] == [(0, 0), (2, 0)]
    assert runs[1].steps_done > runs[0].steps_done == 30


def test_a_hang_prints_the_stacks_of_every_process(files):
    flags = [*SHAPE, *files, "--train-iters", "20", "--distributed-timeout-minutes", "0.25"]
    done = subprocess.run(
        [sys.executable, "-m", "gram_engine.training.launch", "tests/support/hanging_run.py", "--nproc-per-node", "2", *flags],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    for rank in range(2):
        assert f"error: rank {rank} hangs: no progress for 15 s in step 5" in done.stderr
    assert re.search(r"^\[rank 1\] .* in batch_or_sleep$", done.stderr, re.MULTILINE), done.stderr
    assert re.search(r"^\[rank 0\] .* in finalize_model_grads$", done.stderr, re.MULTILINE), done.stderr
