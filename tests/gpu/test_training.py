"""Training on a GPU: local layers and Transformer Engine's, BF16 and FP8, against fp32 and against each other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.runs import curve, trainer_of
from tests.support.tiny import train_steps

STEPS = 6
RECIPES = {"tensorwise": (8, 9), "delayed": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["local", "transformer_engine"], indirect=True)
STAGES = pytest.mark.parametrize("stage", ["1", "2"])

@STAGES
def test_fp32_equals_the_cpu(stage):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    code = f"from tests.gpu.runs import curve; print(curve({stage!r}, '', {STEPS}))"
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    wanted = eval(done.stdout.strip().splitlines()[-1])
    found = curve(stage, "--transformer-impl local", STEPS)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=2e-3, atol=1e-5)


@STAGES
@IMPLEMENTATIONS
def test_bf16_follows_fp32(stage, implementation):
    wanted = curve(stage, "--transformer-impl local", STEPS)
    found = curve(stage, f"--bf16 --transformer-impl {implementation}", STEPS)
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in wanted], rel=3e-2)
    assert found[0][1] == pytest.approx(wanted[0][1], rel=5e-2)


@STAGES
@pytest.mark.parametrize("flags", ["", "--fp8-param-gather --use-distributed-optimizer"], ids=["weights bf16", "weights fp8"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("implementation", ["transformer_engine"], indirect=True)
def test_fp8_follows_bf16(stage, recipe, flags, implementation):
    if torch.cuda.get_device_capability() < RECIPES[recipe]:
        pytest.skip(f"{recipe} needs compute capability {RECIPES[recipe]}")
    wanted = curve(stage, "--bf16", STEPS)
    found = curve(stage, f"--bf16 --fp8-format hybrid --fp8-recipe {recipe} {flags}", STEPS)
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in wanted], rel=8e-2)


@STAGES
@pytest.mark.parametrize("reader", ["local", "transformer_engine"])
@pytest.mark.parametrize("implementation", ["transformer_engine"], indirect=True)
def test_checkpoints_pass_between_implementations(stage, reader, implementation, tiny_data, tmp_path):
    writer = {"local": "transformer_engine", "transformer_engine": "local"}[reader]
    with trainer_of(stage, f"--bf16 --transformer-impl {writer} --save {tmp_path}", tiny_data) as first:
        train_steps(first, 2)
        first.save()
        wanted = train_steps(first, 3)
    found = curve(stage, f"--bf16 --transformer-impl {reader} --load {tmp_path}", 3, tiny_data)
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in wanted], rel=3e-2)


@STAGES
@IMPLEMENTATIONS
def test_deterministic_resume_is_bit_for_bit(stage, implementation, tiny_data, tmp_path):
    from gram_engine.platform.device import make_deterministic

    make_deterministic()
    try:
        flags = f"--bf16 --deterministic-mode --transformer-impl {implementation}"
        with trainer_of(stage, f"{flags} --save {tmp_path}", tiny_data) as first:
            train_steps(first, 2)
            first.save()
            wanted = train_steps(first, 3)
        assert curve(stage, f"{flags} --load {tmp_path}", 3, tiny_data) == wanted
    finally:
        torch.use_deterministic_algorithms(False)


@STAGES
@pytest.mark.parametrize("flags", ["--recompute-granularity full", "--recompute-granularity selective"])
@IMPLEMENTATIONS
def test_recompute_changes_nothing(stage, flags, implementation):
    wanted = curve(stage, f"--bf16 --transformer-impl {implementation}", 3)
    found = curve(stage, f"--bf16 --transformer-impl {implementation} {flags}", 3)
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in wanted], rel=1e-3)
