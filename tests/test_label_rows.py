"""Stage 2 at the label rows alone: the pruned last layer and the label head give the gradients of the whole model."""

import numpy as np
import pytest

from tests.support.cases import short_first
from tests.support.gradients import assert_same_gradients
from tests.support.layouts import LAYOUTS, TIED, UNTIED
from tests.support.tiny import add_packs_without_labels, float64_gradients

SMALL = "--num-layers 2 --global-batch-size 6 --objective pair-preference --label-smoothing 0.07"
VARIANTS = {
    "fused-pruned": "--fused-losses --prune-last-layer",
    "fused": "--fused-losses --no-prune-last-layer",
    "plain": "--no-fused-losses",
}
QWEN3 = "--qk-layernorm True"
NAMES = ("one", "tp2", "tp2-sp", "pp2", "tp2-sp-pp2", "dp2", "dp2-overlap-grad-reduce", "recompute", "recompute-selective")
WHOLE = [
    *((layout, tying, "") for layout in NAMES for tying in (TIED, UNTIED)),
    *(("tp2-sp-pp2", tying, QWEN3) for tying in (TIED, UNTIED)),
]
SHORT = [WHOLE[0], WHOLE[3], WHOLE[4], WHOLE[6], WHOLE[9], WHOLE[13], WHOLE[14], WHOLE[19]]


def gradients(pool, data, layout, flags, change=None):
    processes, parallel = LAYOUTS[layout]
    arguments = (data["stage2"], data["tokenizer"], f"{SMALL} {parallel} {flags}")
    return pool.run(float64_gradients, processes, *arguments, change)


def labels_far_apart(trainer, _batch):
    """Label tokens on the first and the last shard of the vocabulary."""
    getattr(trainer.objective, "head", trainer.objective).label_ids = (3, trainer.config.model.vocab_size - 2)


@pytest.mark.parametrize("layout, tying, model", short_first(SHORT, WHOLE))
def test_every_gradient_equals_the_plain_models(layout, tying, model, pool, tiny_data):
    runs = {name: gradients(pool, tiny_data, layout, f"{tying} {model} {flags}") for name, flags in VARIANTS.items()}
    for name in ("fused-pruned", "fused"):
        for found, wanted in zip(runs[name], runs["plain"], strict=True):
            assert_same_gradients(found, wanted)


@pytest.mark.parametrize("variant", ["fused-pruned", "fused"])
def test_the_two_rows_gradients_are_opposite_and_all_others_zero(variant, pool, tiny_data):
    (run,) = gradients(pool, tiny_data, "one", f"{UNTIED} {VARIANTS[variant]}")
    output = run["gradients"]["0.output_layer.weight"]
    rows = np.flatnonzero(np.abs(output).sum(axis=1))
    assert len(rows) == 2
    assert (output[rows[0]] + output[rows[1]] == 0).all()


@pytest.mark.parametrize("layout", short_first(["tp2-sp"], ["one", "tp2-sp", "pp2"]))
def test_micro_batches_without_labels_change_nothing(layout, pool, tiny_data):
    with_empty = gradients(pool, tiny_data, layout, VARIANTS["fused-pruned"], add_packs_without_labels)
    without = gradients(pool, tiny_data, layout, VARIANTS["fused-pruned"])
    for found, wanted in zip(with_empty, without, strict=True):
        assert_same_gradients(found, wanted)


SHARDED = [(layout, tying) for layout in ("tp2", "tp2-sp", "tp2-sp-pp2") for tying in (TIED, UNTIED)]


@pytest.mark.parametrize("layout, tying", short_first([SHARDED[2], SHARDED[5]], SHARDED))
def test_label_rows_on_different_shards(layout, tying, pool, tiny_data):
    runs = {
        name: gradients(pool, tiny_data, layout, f"{tying} {flags}", labels_far_apart) for name, flags in VARIANTS.items()
    }
    for name in ("fused-pruned", "fused"):
        for found, wanted in zip(runs[name], runs["plain"], strict=True):
            assert_same_gradients(found, wanted)
