"""A new objective is one file and one Task (tests/support/toy_objective.py): it trains at every layout without further code."""

from pathlib import Path

import pytest

from tests.support import toy_objective
from tests.support.layouts import LAYOUTS
from tests.support.tiny import tiny_config, tiny_trainer, train_steps


def curve(prefix, tokenizer_model, flags):
    from gram_engine.config.task import TASKS

    TASKS["hinge"] = toy_objective.TASK
    config = tiny_config(prefix, tokenizer_model, flags)
    config.training.objective = "hinge"
    return train_steps(tiny_trainer(config), 3)


def test_toy_objective_trains_at_every_layout(pool, tiny_data):
    assert len(Path(toy_objective.__file__).read_text().splitlines()) < 60
    data = tiny_data["stage2"], tiny_data["tokenizer"]
    (expected,) = pool.run(curve, 1, *data, "")
    assert expected[-1][0] < expected[0][0]
    for processes, flags in (LAYOUTS[name] for name in ("tp2", "tp2-sp", "pp2")):
        for found in pool.run(curve, processes, *data, flags):
            for pair, expected_pair in zip(found, expected, strict=True):
                assert pair == pytest.approx(expected_pair, rel=1e-4)  # the loss has a kink, Adam amplifies rounding
