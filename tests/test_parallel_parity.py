"""Losses and gradient norms at any layout equal one process's: both stages, packed, tied and untied embeddings."""

from unittest import mock

import pytest

from tests.support.tiny import tiny_config, tiny_trainer, train_steps

STEPS = 10
LAYOUTS = {
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "pp2-uneven": (2, "--pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 4"),
    "pp3": (3, "--pipeline-model-parallel-size 3"),
    "pp2-vpp3": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "tp2-pp2-sp": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"),
    "dp2": (2, ""),
    "dp2-distributed-optimizer": (2, "--use-distributed-optimizer"),
    "dp2-overlap": (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    "dp2-tp2-pp1-overlap": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel "
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    "cp2": (2, "--context-parallel-size 2"),
    "cp2-tp2-sp": (4, "--context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel"),
    "cp2-pp2": (4, "--context-parallel-size 2 --pipeline-model-parallel-size 2"),
    "cp2-dp2-overlap": (
        4,
        "--context-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    "recompute": (1, "--recompute-granularity full"),
}
TIED = ("tp2-sp", "pp2", "pp2-vpp3", "tp2-pp2-sp", "dp2-overlap", "cp2-pp2")
"""Layouts that are tried with tied embeddings too: one weight then has gradients from both ends of the model."""
STAGES = {"stage1": "--objective response-lm --logits-chunk-size 50", "stage2": "--objective pair-preference"}

VARIANTS = [
    ("stage1", "--response-loss b"),
    ("stage2", "--freeze embeddings --label-softmax full-vocabulary --label-smoothing 0"),
]
"""GRAM-v3 (Table 4), G-Baseline + Freeze (Table 1)."""


def curve(prefix, tokenizer_model, flags):
    return train_steps(tiny_trainer(tiny_config(prefix, tokenizer_model, flags)), STEPS)


@pytest.fixture(scope="module")
def references(pool, tiny_data):
    """Curves of one process, made once per (stage, tied)."""
    made = {}

    def reference(stage, tied):
        if (stage, tied) not in made:
            flags = f"{STAGES[stage]} {tied}"
            made[stage, tied] = pool.run(curve, 1, tiny_data[stage], tiny_data["tokenizer"], flags)[0]
        return made[stage, tied]

    return reference


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout, tied", [*((layout, "untied") for layout in LAYOUTS), *((layout, "tied") for layout in TIED)])
def test_layout_equals_one_process(layout, stage, tied, pool, tiny_data, references):
    tying = f"--untie-embeddings-and-output-weights {tied == 'untied'}"
    compare(layout, stage, tying, pool, tiny_data, references)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", ["tp2", "tp2-pp2-sp", "recompute"])
def test_normed_queries_and_keys(layout, stage, pool, tiny_data, references):
    """As Qwen3 has them; their weights' gradients are sums over the heads of all tensor-parallel processes."""
    compare(layout, stage, "--untie-embeddings-and-output-weights False --qk-layernorm True", pool, tiny_data, references)


@pytest.mark.parametrize("stage, flags", VARIANTS)
def test_variants_of_the_paper(stage, flags, pool, tiny_data, references):
    for layout in ("tp2-sp", "pp2", "dp2-overlap"):
        compare(layout, stage, flags, pool, tiny_data, references)


def curve_in_many_buckets(*run):
    """As large models have them: each is gathered and reduced on its own."""
    from gram_engine.training import optimizer

    whole = optimizer.DistributedDataParallelConfig
    with mock.patch.object(optimizer, "DistributedDataParallelConfig", lambda **fields: whole(**fields, bucket_size=1000)):
        return curve(*run)


@pytest.mark.parametrize("stage", STAGES)
def test_overlaps_in_many_buckets(stage, pool, tiny_data, references):
    tying = "--untie-embeddings-and-output-weights True"
    compare("dp2-overlap", stage, tying, pool, tiny_data, references, curve_in_many_buckets)


def compare(layout, stage, model, pool, data, references, run=curve):
    processes, flags = LAYOUTS[layout]
    expected = references(stage, model)
    curves = pool.run(run, processes, data[stage], data["tokenizer"], f"{flags} {STAGES[stage]} {model}")
    for found in curves:
        for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            # One stage-2 step's gradients nearly cancel (norm 0.08 between 1.1 and 2.6): its rounding is that of the others.
            assert norm == pytest.approx(expected_norm, rel=1e-5, abs=1e-6)
    assert expected[-1][0] < expected[0][0]
