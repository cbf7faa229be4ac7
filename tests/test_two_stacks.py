"""A checkpoint of the older megatron-core resumes in the newer one.

GRAM_OTHER_PYTHON names the Python of an environment with the other line of megatron-core (CONTRIBUTING.md).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny import tiny_config, tiny_trainer, train_steps

OTHER = os.environ.get("GRAM_OTHER_PYTHON")
ROOT = Path(__file__).parents[1]
SAVE_AT, STEPS = 2, 4
SECONDS = 150

pytestmark = pytest.mark.skipif(OTHER is None, reason="GRAM_OTHER_PYTHON names no Python with the other megatron-core")


def versions(python: str) -> list[str]:
    """Versions of megatron-core and torch."""
    code = "from importlib.metadata import version; print(version('megatron-core'), version('torch'))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def run_in(python: str, part: str, *args) -> dict:
    """Run main(part, *args) in a process of `python`; returns what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [python, "-W", "ignore", "-c", "import sys; from tests.test_two_stacks import main; main(*sys.argv[1:])"]
    done = subprocess.run([*command, part, *args], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def main(part: str, prefix: str, tokenizer: str, flags: str, folder: str) -> None:
    """Train and save in between, or resume. Prints (loss, gradient norm) of each step."""
    import torch.distributed as dist

    from gram_engine.platform import device as platform

    platform.initialise("cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    place = f"--{'save' if part == 'save' else 'load'} {folder}"
    trainer = tiny_trainer(tiny_config(prefix, tokenizer, f"{flags} {place}"))
    curve = []
    if part == "save":
        curve = train_steps(trainer, SAVE_AT)
        trainer.save()
        trainer.saver.finish()
    position = trainer.state.iteration
    print(json.dumps({"position": position, "curve": curve + train_steps(trainer, STEPS - SAVE_AT)}))


@pytest.mark.parametrize(
    "flags",
    ["", "--use-distributed-optimizer --bf16", "--lora-rank 4 --untie-embeddings-and-output-weights True"],
    ids=["plain", "distributed-bf16", "lora"],
)
def test_a_checkpoint_of_the_older_stack_resumes_in_the_newer_one(flags, tiny_data, tmp_path):
    pythons = sorted((sys.executable, OTHER), key=lambda python: versions(python))
    old, new = (versions(python)[0].rpartition(".")[0] for python in pythons)
    assert (old, new) == ("0.16", "0.19"), "GRAM_OTHER_PYTHON has the same line of megatron-core as this Python"
    data = (tiny_data["stage2"], tiny_data["tokenizer"], flags, str(tmp_path))
    uninterrupted = run_in(pythons[0], "save", *data)
    resumed = run_in(pythons[1], "resume", *data)
    assert uninterrupted["position"] == resumed["position"] == SAVE_AT
    expected = uninterrupted["curve"][SAVE_AT:]
    assert len(expected) == len(resumed["curve"]) == STEPS - SAVE_AT
    same_torch = versions(pythons[0])[1].partition("+")[0] == versions(pythons[1])[1].partition("+")[0]
    for found, wanted in zip(resumed["curve"], expected):
        assert found == pytest.approx(wanted, rel=1e-6 if same_torch else 1e-5)
