"""Stage 2 at the label rows alone: the pruned last layer and the label head give the gradients of the whole model."""

import itertools

import numpy as np
import pytest

from tests.support.cases import short_first
from tests.support.gradients import assert_same_gradients
from tests.support.layouts import LAYOUTS, TIED, UNTIED
from tests.support.tiny import add_packs_without_labels, float64_gradients

SMALL = "--num-layers 2 --global-batch-size 6 --objective pair-preference --label-smoothing 0.07"
LOSSES = {
    "pruned": "--fused-losses --prune-last-layer",
    "fused": "--fused-losses --no-prune-last-layer",
    "plain": "--no-fused-losses",
}
MODELS = {"tied": TIED, "untied": UNTIED} | {
    "tied-qwen3": f"{TIED} --qk-layernorm True", "untied-qwen3": f"{UNTIED} --qk-layernorm True"
}  # fmt: skip
PLACES = ("one", "tp2", "tp2-sp", "pp2", "tp2-sp-pp2", "dp2", "dp2-overlap-grad-reduce", "recompute", "recompute-selective")
EVERY = [
    *itertools.product(PLACES, ("untied", "tied"), ("pruned", "fused")),
    *itertools.product(["tp2-sp-pp2"], ["untied-qwen3", "tied-qwen3"], ["pruned", "fused"]),
]
SHORT = [
    *((layout, "untied", "pruned") for layout in PLACES),
    *((layout, "tied", "pruned") for layout in ("one", "tp2-sp", "pp2", "tp2-sp-pp2")),
    *((layout, "untied", "fused") for layout in ("one", "tp2-sp", "tp2-sp-pp2")),
    ("tp2-sp-pp2", "untied-qwen3", "pruned"),
]


def labels_far_apart(trainer, _batch):
    """Label tokens on the first and the last shard of the vocabulary."""
    getattr(trainer.objective, "head", trainer.objective).label_ids = (3, trainer.config.model.vocab_size - 2)


@pytest.fixture(scope="module")
def gradients(pool, tiny_data):
    """gradients(layout, model, losses, change=None): what each process of a run found; each run is made once."""
    made = {}

    def run(layout, model, losses, change=None):
        if (layout, model, losses, change) not in made:
            processes, parallel = LAYOUTS[layout]
            flags = f"{SMALL} {parallel} {MODELS[model]} {LOSSES[losses]}"
            arguments = (tiny_data["stage2"], tiny_data["tokenizer"], flags, change)
            made[layout, model, losses, change] = pool.run(float64_gradients, processes, *arguments)
        return made[layout, model, losses, change]

    return run


@pytest.mark.parametrize("layout, model, losses", short_first(SHORT, EVERY))
def test_every_gradient_equals_the_plain_models(layout, model, losses, gradients):
    for found, wanted in zip(gradients(layout, model, losses), gradients(layout, model, "plain"), strict=True):
        assert_same_gradients(found, wanted)


@pytest.mark.parametrize("losses", ["pruned", "fused"])
def test_the_two_rows_gradients_are_opposite_and_all_others_zero(losses, gradients):
    (run,) = gradients("one", "untied", losses)
    output = run["gradients"]["0.output_layer.weight"]
    rows = np.flatnonzero(np.abs(output).sum(axis=1))
    assert len(rows) == 2
    assert (output[rows[0]] + output[rows[1]] == 0).all()


@pytest.mark.parametrize("layout", ["one", "tp2-sp", "pp2"])
def test_micro_batches_without_labels_change_nothing(layout, gradients):
    with_empty = gradients(layout, "untied", "pruned", add_packs_without_labels)
    for found, wanted in zip(with_empty, gradients(layout, "untied", "pruned"), strict=True):
        assert_same_gradients(found, wanted)


FAR_APART = itertools.product(("tp2", "tp2-sp", "tp2-sp-pp2"), ("untied", "tied"), ("pruned", "fused"))


@pytest.mark.parametrize(
    "layout, model, losses",
    short_first([("tp2", "untied", "pruned"), ("tp2-sp", "tied", "pruned"), ("tp2-sp-pp2", "untied", "pruned")], FAR_APART),
)
def test_label_rows_on_different_shards(layout, model, losses, gradients):
    wanted = gradients(layout, model, "plain", labels_far_apart)
    for found, plain in zip(gradients(layout, model, losses, labels_far_apart), wanted, strict=True):
        assert_same_gradients(found, plain)
