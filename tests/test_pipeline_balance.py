"""What each pipeline stage costs, and the number of layers proposed for the last one."""

import pytest

from gram_engine.config.parse import parse
from gram_engine.model.shapes import resolve_shape
from gram_engine.planning.pipeline_balance import Work, balance_report, best_last_stage, stage_costs, stage_layers

# 32 samples of 1,024 tokens.
WORK = Work(tokens=32768, rows=32, squared_lengths=32 * 1024**2)


def config(flags):
    made = parse(flags.split())
    resolve_shape(made)
    return made


@pytest.mark.parametrize(
    "model, stages, expected", [("llama-3.1-8b", 2, 0.94), ("llama-3.1-8b", 4, 0.88), ("llama-3.2-3b", 4, 0.87)]
)
def test_pruned_last_stage_is_faster_than_the_others(model, stages, expected):
    made = config(f"--model {model} --pipeline-model-parallel-size {stages}")
    first, *_, last = stage_costs(made, stage_layers(made), WORK)
    assert last / first == pytest.approx(expected, abs=0.01)


def test_head_over_all_positions_makes_the_last_stage_slower():
    made = config("--model llama-3.1-8b --pipeline-model-parallel-size 4 --objective response-lm")
    first, *_, last = stage_costs(made, stage_layers(made), WORK._replace(rows=WORK.tokens))
    assert last / first == pytest.approx(1.30, abs=0.02)


def test_report_proposes_a_number_that_helps():
    flags = "--pipeline-model-parallel-size 2 --num-layers 7 --hidden-size 64 --ffn-hidden-size 192 --num-attention-heads 4"
    made = config(f"{flags} --decoder-last-pipeline-num-layers 2")
    report = balance_report(made, WORK)
    assert "layers 5 2" in report
    best, slowest = best_last_stage(made, WORK)
    assert best == 4 and "--decoder-last-pipeline-num-layers 4" in report
    assert slowest == pytest.approx(max(stage_costs(made, [3, 4], WORK)))


def test_report_proposes_nothing_where_nothing_helps():
    made = config("--model llama-3.1-8b --pipeline-model-parallel-size 4")
    assert "would" not in balance_report(made, WORK)


def test_one_layer_may_be_all_that_is_left():
    made = config(
        "--model llama-3.1-8b --pipeline-model-parallel-size 3 "
        "--decoder-first-pipeline-num-layers 11 --decoder-last-pipeline-num-layers 20"
    )
    assert stage_layers(made) == [11, 1, 20]
