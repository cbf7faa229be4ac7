"""Packing changes nothing: loss and gradients of packed samples equal those of the same samples one by one."""

import pytest
import torch

from tests.support.tiny import tiny_config, tiny_trainer


def loss_and_gradients(prefix, tokenizer_model, flags, micro_batch_size):
    """(loss, {parameter: gradient}) of one global batch, gradients divided by the number of labels as in training."""
    config = tiny_config(prefix, tokenizer_model, f"{flags} --micro-batch-size {micro_batch_size}")
    trainer = tiny_trainer(config)
    batch = trainer.loader.batch(0)
    metrics = trainer.forward_backward(batch)
    gradients = {name: p.main_grad.clone() for name, p in trainer.model[0].module.named_parameters()}
    return metrics["loss"], gradients, len(batch.microbatches)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_packed_equals_alone(stage, pool, tiny_data):
    objective = {"stage1": "response-lm", "stage2": "pair-preference"}[stage]
    flags = f"--objective {objective}"
    # At --seq-length of the longest sample almost every sample is alone in its pack; four times that packs several.
    longest = tiny_data["longest"][stage]
    alone = pool.run(
        loss_and_gradients, 1, tiny_data[stage], tiny_data["tokenizer"], f"{flags} --seq-length {longest}", 1
    )[0]
    packed = pool.run(
        loss_and_gradients, 1, tiny_data[stage], tiny_data["tokenizer"], f"{flags} --seq-length {longest}", 4
    )[0]
    assert alone[2] >= 7 and packed[2] <= 3, "the two runs must be packed differently"
    assert packed[0] == pytest.approx(alone[0], rel=1e-6)
    for name, gradient in alone[1].items():
        torch.testing.assert_close(packed[1][name], gradient, rtol=0, atol=1e-6)
