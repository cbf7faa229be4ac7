"""Stage 1's fused loss gives the plain one's gradients in float64, at any layout, written into main_grad."""

import numpy as np
import pytest

from tests.support.tiny import add_packs_without_labels, float64_gradients
from tests.test_label_rows import LAYOUTS, compare

SMALL = "--num-layers 2 --global-batch-size 6 --objective response-lm --logits-chunk-size 50"


def gradients(pool, data, layout, flags, change=None):
    processes, parallel = LAYOUTS[layout]
    return pool.run(
        float64_gradients, processes, data["stage1"], data["tokenizer"], f"{SMALL} {parallel} {flags}", change
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["tp1", "tp2", "tp2-sp", "pp2", "tp2-sp-pp2", "dp2", "dp2-overlap"])
def test_every_gradient_equals_the_plain_models(layout, tied, pool, tiny_data):
    tying = f"--untie-embeddings-and-output-weights {not tied}"
    fused = gradients(pool, tiny_data, layout, f"{tying} --fused-losses")
    plain = gradients(pool, tiny_data, layout, f"{tying} --no-fused-losses")
    for found, wanted in zip(fused, plain, strict=True):
        compare(found, wanted)


def test_packs_without_responses_change_nothing(pool, tiny_data):
    (found,) = gradients(pool, tiny_data, "tp1", "", add_packs_without_labels)
    (wanted,) = gradients(pool, tiny_data, "tp1", "")
    compare(found, wanted)
    assert any(np.abs(gradient).max() > 0 for gradient in found["gradients"].values())
