"""Training with the fused losses equals training with the plain ones: curves within 1e-6, 200 steps and at several layouts."""

import pytest

from tests.support.tiny import tiny_config, tiny_trainer, train_steps

STEPS = {"tp1": 200}
FEWER_STEPS = 30
SMALL = "--num-layers 2 --global-batch-size 4 --lr 3e-4 --lr-warmup-fraction 0.1 --train-iters 200 --seq-length 192"
STAGES = {"stage1": "--objective response-lm --logits-chunk-size 50", "stage2": "--objective pair-preference"}
TIED, UNTIED = (f"--untie-embeddings-and-output-weights {value}" for value in (False, True))
LAYOUTS = {
    "tp1": (1, TIED),
    "tp2-sp": (2, f"{UNTIED} --tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2-tied": (2, f"{TIED} --pipeline-model-parallel-size 2"),
    "pp2-untied": (2, f"{UNTIED} --pipeline-model-parallel-size 2"),
    "dp2-overlap": (2, f"{UNTIED} --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
}


def curve(prefix, tokenizer_model, flags, steps):
    return train_steps(tiny_trainer(tiny_config(prefix, tokenizer_model, f"{SMALL} {flags}")), steps)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", STAGES)
def test_fused_equals_plain(stage, layout, pool, tiny_data):
    (processes, flags), steps = LAYOUTS[layout], STEPS.get(layout, FEWER_STEPS)
    data = (tiny_data[stage], tiny_data["tokenizer"])
    fused, plain = (
        pool.run(curve, processes, *data, f"{flags} {STAGES[stage]} {kind}", steps)[0]
        for kind in ("--fused-losses", "--no-fused-losses")
    )
    assert len({loss for loss, _ in plain}) == steps, "every step changes the weights"
    assert steps < STEPS["tp1"] or min(loss for loss, _ in plain[-20:]) < 0.95 * plain[0][0]
    for (loss, norm), (plain_loss, plain_norm) in zip(fused, plain, strict=True):
        assert loss == pytest.approx(plain_loss, rel=1e-6)
        assert norm == pytest.approx(plain_norm, rel=1e-4)
