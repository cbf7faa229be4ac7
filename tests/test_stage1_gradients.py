"""Stage 1's fused loss gives the plain one's gradients in float64, at any layout, written into main_grad."""

import itertools

import numpy as np
import pytest

from tests.support.cases import short_first
from tests.support.gradients import assert_same_gradients
from tests.support.layouts import LAYOUTS, STAGES, TIED, UNTIED
from tests.support.tiny import add_packs_without_labels, float64_gradients

SMALL = f"--num-layers 2 --global-batch-size 6 {STAGES['stage1']}"
MODELS = {"tied": TIED, "untied": UNTIED}
PLACES = ("one", "tp2", "tp2-sp", "pp2", "tp2-sp-pp2", "dp2", "dp2-overlap-grad-reduce")
SHORT = [
    *(("one", model) for model in MODELS),
    *(("pp2", model) for model in MODELS),
    *(("tp2", "untied"), ("tp2-sp", "tied"), ("tp2-sp-pp2", "untied"), ("dp2-overlap-grad-reduce", "tied")),
]


def gradients(pool, data, layout, flags, change=None):
    processes, parallel = LAYOUTS[layout]
    return pool.run(
        float64_gradients, processes, data["stage1"], data["tokenizer"], f"{SMALL} {parallel} {flags}", change
    )


@pytest.mark.parametrize("layout, model", short_first(SHORT, itertools.product(PLACES, MODELS)))
def test_every_gradient_equals_the_plain_models(layout, model, pool, tiny_data):
    fused = gradients(pool, tiny_data, layout, f"{MODELS[model]} --fused-losses")
    plain = gradients(pool, tiny_data, layout, f"{MODELS[model]} --no-fused-losses")
    for found, wanted in zip(fused, plain, strict=True):
        assert_same_gradients(found, wanted)


def test_packs_without_responses_change_nothing(pool, tiny_data):
    (found,) = gradients(pool, tiny_data, "one", "", add_packs_without_labels)
    (wanted,) = gradients(pool, tiny_data, "one", "")
    assert_same_gradients(found, wanted)
    assert any(np.abs(gradient).max() > 0 for gradient in found["gradients"].values())
