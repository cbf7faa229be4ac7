"""A session starts and ends a run in one process, several times; single steps give the same bits as `train`."""

import json
import os
import subprocess
import sys
from pathlib import Path

CODE = """
import json
import torch.distributed as dist
from tests.gpu.runs import trainer_of

flags = "--num-layers 1 --train-iters 3 --tensorboard-dir {folder}"
with trainer_of("2", flags) as trainer:
    found = [trainer.advance() for _ in range(3)][-1].metrics
    position = trainer.state.position()
ended = not dist.is_initialized()
with trainer_of("2", flags) as trainer:
    expected = trainer.train()
print(json.dumps([found, expected, position, ended]))
"""


def test_steps_without_train_are_those_of_train(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command, root = [sys.executable, "-c", CODE.format(folder=tmp_path)], Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found, expected, position, ended = json.loads(done.stdout.splitlines()[-1])
    assert found == expected and ended
    assert position == {"iteration": 3, "consumed_samples": 24}
    assert len(list(tmp_path.glob("events.*"))) == 2, "metric writers of both sessions"
