"""Training with the fused losses equals training with the plain ones.

That each gradient is the same, at any layout, is shown in float64 by test_label_rows.py and test_stage1_gradients.py.
"""

import pytest

from tests.support.cases import short_first
from tests.support.layouts import STAGES, TIED
from tests.support.tiny import tiny_config, tiny_trainer, train_steps

SMALL = f"--num-layers 2 --global-batch-size 4 --lr 3e-4 --lr-warmup-fraction 0.1 --train-iters 200 {TIED}"


def curve(prefix, tokenizer_model, flags, steps):
    return train_steps(tiny_trainer(tiny_config(prefix, tokenizer_model, f"{SMALL} {flags}")), steps)


@pytest.mark.parametrize("steps", short_first([10], [10, 200]))
@pytest.mark.parametrize("stage", STAGES)
def test_fused_equals_plain(stage, steps, pool, tiny_data):
    data = (tiny_data[stage], tiny_data["tokenizer"])
    fused, plain = (
        pool.run(curve, 1, *data, f"{STAGES[stage]} {kind}", steps)[0] for kind in ("--fused-losses", "--no-fused-losses")
    )
    assert len({loss for loss, _ in plain}) == steps, "every step changes the weights"
    assert steps < 200 or min(loss for loss, _ in plain[-20:]) < 0.95 * plain[0][0], "the model learns"
    for (loss, norm), (plain_loss, plain_norm) in zip(fused, plain, strict=True):
        assert loss == pytest.approx(plain_loss, rel=1e-6)
        assert norm == pytest.approx(plain_norm, rel=1e-4)
