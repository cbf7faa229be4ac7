"""NaN and Inf in a step: nothing changes but the counters, and too many in a row end the run with the samples' ids."""

import math

import numpy as np
import pytest
import torch

from gram_engine.config.schema import TrainingConfig
from gram_engine.errors import NumericsError
from gram_engine.training.nonfinite import FIRST_STEPS, NumericsGuard
from tests.support.layouts import LAYOUTS
from tests.support.tiny import tiny_config, tiny_trainer, train_steps

STAGE2 = "--objective pair-preference --lr 3e-3"


def poisoned(prefix, tokenizer_model, flags, bad_steps, bad_rank):
    """Six steps, of which `bad_steps` have a NaN weight on one rank. Returns the curve, and the state after each step."""
    import torch.distributed as dist

    trainer = tiny_trainer(tiny_config(prefix, tokenizer_model, f"{STAGE2} {flags}"))

    def with_nan(consumed, batch_of=trainer.loader.batch):
        batch = batch_of(consumed)
        if consumed // batch.num_samples in bad_steps and dist.get_rank() == bad_rank:
            batch.microbatches[0].weight[0] = float("nan")
        return batch

    trainer.loader.batch = with_nan
    snapshots, curve = [], []
    for _ in range(6):
        curve += train_steps(trainer, 1)
        trainer._finish_param_gather()
        trainer._resume_param_gather()
        parameters = [parameter.detach().clone() for chunk in trainer.model for parameter in chunk.parameters()]
        moments = [
            value.clone()
            for part in trainer.optimizer.chained_optimizers
            for entry in part.optimizer.state.values()
            for value in entry.values()
            if torch.is_tensor(value)
        ]
        snapshots.append([tensor.numpy() for tensor in (*parameters, *moments)])
    return curve, snapshots


@pytest.mark.parametrize("layout", ["one", "dp2-overlap"])
def test_a_step_that_is_not_finite_changes_nothing(layout, pool, tiny_data):
    processes, flags = LAYOUTS[layout]
    bad = {2, 3}
    for curve, snapshots in pool.run(
        poisoned, processes, tiny_data["stage2"], tiny_data["tokenizer"], flags, bad, processes - 1
    ):
        for step, (loss, norm) in enumerate(curve):
            assert math.isfinite(loss) == math.isfinite(norm) == (step not in bad)
        for step in range(1, 6):
            same = all(np.array_equal(a, b) for a, b in zip(snapshots[step - 1], snapshots[step]))
            assert same == (step in bad), step


def training_with_nan_weights(prefix, tokenizer_model, flags, folder):
    trainer = tiny_trainer(tiny_config(prefix, tokenizer_model, f"{STAGE2} {flags} --save {folder} --save-interval 1"))
    for chunk in trainer.model:
        for parameter in chunk.parameters():
            parameter.data[..., 0] = float("inf")
    first_ids = trainer.loader.batch(0).sample_ids
    with pytest.raises(NumericsError) as raised:
        trainer.train()
    return str(raised.value), first_ids.tolist(), trainer.state.iteration


@pytest.mark.parametrize("flags, steps", [("", 5), ("--max-skipped-steps 2", 2), ("--check-for-nan", 1)])
def test_too_many_end_the_run_and_name_the_samples(flags, steps, pool, tiny_data, tmp_path):
    text, ids, iteration = pool.run(
        training_with_nan_weights, 1, tiny_data["stage2"], tiny_data["tokenizer"], flags, str(tmp_path)
    )[0]
    assert iteration == steps and text.startswith(f"step {steps}: loss")
    if steps == 1:
        assert all(str(number) in text.partition("samples ")[2].partition(";")[0].split(", ") for number in ids)


def test_a_finite_step_restarts_the_count():
    guard = NumericsGuard(TrainingConfig(max_skipped_steps=2))
    ids = np.arange(3)
    guard.record(1, float("nan"), 1.0, ids)
    guard.record(2, 1.0, 1.0, ids)  # a finite step in between restarts the count
    guard.record(3, 1.0, float("inf"), ids)
    assert (guard.skipped, guard.skipped_in_row) == (2, 1)
    with pytest.raises(NumericsError, match="step 4: loss nan, gradient norm 1 on samples 0, 1, 2; 2 such"):
        guard.record(4, float("nan"), 1.0, ids)


def test_spikes_are_logged_with_their_samples(capsys):
    guard = NumericsGuard(TrainingConfig(loss_spike_factor=3.0))
    for step in range(FIRST_STEPS + 1):
        guard.record(step, 1.0, 1.0, np.arange(2))
    assert "warning" not in capsys.readouterr().out
    guard.record(99, 3.5, 1.0, np.array([7, 4]))
    assert "loss 3.5 at step 99 is over 3 times its recent mean 1, on samples 4, 7" in capsys.readouterr().out
