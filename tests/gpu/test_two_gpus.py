"""Layouts of two GPUs over NCCL equal one GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.conftest import TE

LAYOUTS = {
    "tp2-sp": "--tensor-model-parallel-size 2 --sequence-parallel",
    "tp2-comm-overlap": "--tensor-model-parallel-size 2 --sequence-parallel --tp-comm-overlap",
    "pp2": "--pipeline-model-parallel-size 2",
    "cp2": "--context-parallel-size 2",
    "dp2-overlap": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
}
RUN = """
import json, sys
from gram_engine.log import is_main_process
from tests.gpu.runs import curve
stage, flags, path = sys.argv[1:]
losses = curve(stage, flags, 5)
if is_main_process():
    open(path, "w").write(json.dumps(losses))
"""


def run(processes, stage, flags, tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(tmp_path / "run.py"), stage, flags, str(tmp_path / "losses.json")]
    subprocess.run(command, check=True, timeout=240, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    return [loss for loss, _ in json.loads((tmp_path / "losses.json").read_text())]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("stage", ["1", "2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_equal_one(layout, stage, tmp_path):
    if "comm-overlap" in layout and not TE:
        pytest.skip("transformer-engine is not installed")
    wanted = run(1, stage, "--bf16", tmp_path)
    assert run(2, stage, f"--bf16 {LAYOUTS[layout]}", tmp_path) == pytest.approx(wanted, rel=2e-2)
