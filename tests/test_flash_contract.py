"""Every layout trains through an emulation of flash attention's contract: nothing that its kernel leaves unwritten is used."""

import pytest

from tests.support import flash_emulation
from tests.support.tiny import tiny_config, tiny_trainer, train_steps
from tests.test_parallel_parity import LAYOUTS, STAGES

STEPS = 2
PADDED = "--untie-embeddings-and-output-weights True --transformer-config bias_activation_fusion=true"
"""Also the fused SwiGLU that a GPU takes, which refuses a process without label rows."""


def curve(prefix, tokenizer_model, flags, emulated):
    """(losses and gradient norms, numbers of rows behind the last bound in each attention call, whether packs were padded)"""
    trainer = tiny_trainer(tiny_config(prefix, tokenizer_model, f"{flags} {PADDED}"))
    trainer.loader.pad_multiple *= 40  # packs end in padding, as they do under FP8 or sequence parallelism
    padded = any(len(pack.cu_seqlens) - 1 > len(pack.sample_ids) for pack in trainer.loader.batch(0).microbatches)
    if not emulated:
        return train_steps(trainer, STEPS), [], padded
    with flash_emulation.flash_attention():
        return train_steps(trainer, STEPS), list(flash_emulation.calls), padded


@pytest.fixture(scope="module")
def references(pool, tiny_data):
    return {
        stage: pool.run(curve, 1, tiny_data[stage], tiny_data["tokenizer"], flags, False)[0][0]
        for stage, flags in STAGES.items()
    }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", ["one", *LAYOUTS])
def test_layout_uses_nothing_unwritten(layout, stage, pool, tiny_data, references):
    processes, flags = {"one": (1, ""), **LAYOUTS}[layout]
    for found, calls, padded in pool.run(
        curve, processes, tiny_data[stage], tiny_data["tokenizer"], f"{flags} {STAGES[stage]}", True
    ):
        assert padded and calls and not any(calls)
        for (loss, norm), (expected_loss, expected_norm) in zip(found, references[stage], strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-5)
