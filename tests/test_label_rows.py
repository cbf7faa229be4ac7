"""Stage 2 at the label rows alone: the pruned last layer and the label head give the gradients of the whole model."""

import numpy as np
import pytest

from tests.support.tiny import add_packs_without_labels, float64_gradients

SMALL = "--num-layers 2 --global-batch-size 6 --objective pair-preference --label-smoothing 0.07"
VARIANTS = {
    "fused-pruned": "--fused-losses --prune-last-layer",
    "fused": "--fused-losses --no-prune-last-layer",
    "plain": "--no-fused-losses",
}
LAYOUTS = {
    "tp1": (1, ""),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "tp2-sp-pp2": (4, "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"),
    "tp2-sp-pp2-qwen3": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 --qk-layernorm True",
    ),
    "dp2": (2, ""),
    "dp2-overlap": (2, "--overlap-grad-reduce"),
    "recompute": (1, "--recompute-granularity full"),
    "selective-recompute": (1, "--recompute-granularity selective"),
}


def relative_difference(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-300))


def compare(found, wanted, tolerance=1e-12):
    """All gradients that both hold; a borrowed or tied copy of the embedding may be missing in one."""
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    common = found["gradients"].keys() & wanted["gradients"].keys()
    assert found["gradients"].keys() == common
    differences = {
        name: relative_difference(found["gradients"][name], wanted["gradients"][name]) for name in common
    }
    assert max(differences.values()) < tolerance, differences


def gradients(pool, data, layout, flags, change=None):
    processes, parallel = LAYOUTS[layout]
    arguments = (data["stage2"], data["tokenizer"], f"{SMALL} {parallel} {flags}")
    return pool.run(float64_gradients, processes, *arguments, change)


def labels_far_apart(trainer, _batch):
    """Label tokens on the first and the last shard of the vocabulary."""
    getattr(trainer.objective, "head", trainer.objective).label_ids = (3, trainer.config.model.vocab_size - 2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_gradient_equals_the_plain_models(layout, tied, pool, tiny_data):
    tying = f"--untie-embeddings-and-output-weights {not tied}"
    runs = {name: gradients(pool, tiny_data, layout, f"{tying} {flags}") for name, flags in VARIANTS.items()}
    for name in ("fused-pruned", "fused"):
        for found, wanted in zip(runs[name], runs["plain"], strict=True):
            compare(found, wanted)


@pytest.mark.parametrize("variant", ["fused-pruned", "fused"])
def test_the_two_rows_gradients_are_opposite_and_all_others_zero(variant, pool, tiny_data):
    tying = "--untie-embeddings-and-output-weights True"
    (run,) = gradients(pool, tiny_data, "tp1", f"{tying} {VARIANTS[variant]}")
    output = run["gradients"]["0.output_layer.weight"]
    rows = np.flatnonzero(np.abs(output).sum(axis=1))
    assert len(rows) == 2
    assert (output[rows[0]] + output[rows[1]] == 0).all()


@pytest.mark.parametrize("layout", ["tp1", "tp2-sp", "pp2"])
def test_micro_batches_without_labels_change_nothing(layout, pool, tiny_data):
    with_empty = gradients(pool, tiny_data, layout, VARIANTS["fused-pruned"], add_packs_without_labels)
    without = gradients(pool, tiny_data, layout, VARIANTS["fused-pruned"])
    for found, wanted in zip(with_empty, without, strict=True):
        compare(found, wanted)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["tp2", "tp2-sp", "tp2-sp-pp2"])
def test_label_rows_on_different_shards(layout, tied, pool, tiny_data):
    tying = f"--untie-embeddings-and-output-weights {not tied}"
    runs = {
        name: gradients(pool, tiny_data, layout, f"{tying} {flags}", labels_far_apart) for name, flags in VARIANTS.items()
    }
    for name in ("fused-pruned", "fused"):
        for found, wanted in zip(runs[name], runs["plain"], strict=True):
            compare(found, wanted)
