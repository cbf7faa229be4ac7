"""A resumed run continues as the uninterrupted one: bit for bit in the same layout, within 1e-5 at another."""

import pytest

from tests.support.cases import short_first
from tests.support.layouts import STAGES, TIED, UNTIED
from tests.support.resume import resumed, uninterrupted

DISTRIBUTED = "--use-distributed-optimizer"
RUNS = [(stage, flags) for stage in STAGES for flags in ("", DISTRIBUTED)]


@pytest.mark.parametrize("stage, distributed", short_first([RUNS[1], RUNS[2]], RUNS))
def test_resume_at_other_layouts(stage, distributed, pool, tiny_data, tmp_path):
    common = f"{STAGES[stage]} --num-layers 2 {UNTIED if stage == 'stage1' else TIED} {distributed}"
    data = (tiny_data[stage], tiny_data["tokenizer"])
    saved_with = f"{common} --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
    expected = pool.run(uninterrupted, 4, *data, saved_with, str(tmp_path))[0]

    assert pool.run(resumed, 4, *data, saved_with, str(tmp_path))[0] == expected, "same layout: bit for bit"
    for processes, layout in ((2, ""), (2, "--pipeline-model-parallel-size 2"), (1, "")):
        found = pool.run(resumed, processes, *data, f"{common} {layout}", str(tmp_path))[0]
        for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-5)


def test_async_save_and_bf16_resume_bit_for_bit(pool, tiny_data, tmp_path):
    flags = "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    data = (tiny_data["stage2"], tiny_data["tokenizer"])
    expected = pool.run(uninterrupted, 2, *data, f"{flags} --async-save", str(tmp_path))[0]
    assert pool.run(resumed, 2, *data, flags, str(tmp_path))[0] == expected


def test_virtual_stages_resume_without_them(pool, tiny_data, tmp_path):
    flags = "--num-layers 6 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
    data = (tiny_data["stage2"], tiny_data["tokenizer"])
    expected = pool.run(uninterrupted, 2, *data, flags, str(tmp_path))[0]
    assert pool.run(resumed, 2, *data, flags, str(tmp_path))[0] == expected
    other = pool.run(resumed, 3, *data, "--num-layers 6 --pipeline-model-parallel-size 3", str(tmp_path))[0]
    assert [loss for loss, _ in other] == pytest.approx([loss for loss, _ in expected], rel=1e-5)


@pytest.mark.parametrize("tying", short_first([TIED], [TIED, UNTIED]))
def test_uneven_stages_with_fused_losses_resume_in_one_process_with_plain_ones(tying, pool, tiny_data, tmp_path):
    """Tied: the last stage saved no copy of the output rows, and the plain run has one."""
    flags = f"{tying} --num-layers 6 --pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 2"
    data = (tiny_data["stage2"], tiny_data["tokenizer"])
    expected = pool.run(uninterrupted, 2, *data, flags, str(tmp_path))[0]
    assert pool.run(resumed, 2, *data, flags, str(tmp_path))[0] == expected
    for processes, layout in ((1, ""), (3, "--pipeline-model-parallel-size 3")):
        found = pool.run(resumed, processes, *data, f"{tying} --num-layers 6 {layout} --no-fused-losses", str(tmp_path))[0]
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
