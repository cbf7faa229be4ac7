"""Figures about verdicts on cases worked out by hand, and their agreement over all that report them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gram_engine.evaluation.evaluate import EvaluateArguments, evaluate
from gram_engine.metrics import by_pair, pair_metrics, reward_of_first
from gram_engine.scoring.command import ModelArguments, ScoreArguments, score_file
from gram_engine.scoring.scorer import PairScore


def metrics_of(pair_ids, orders, margins, preference):
    return pair_metrics(*by_pair(pair_ids, orders, margins, preference))


def test_consistent_right_verdicts():
    found = metrics_of([7, 7, 9, 9], [0, 1, 0, 1], [2.0, -2.0, -1.0, 1.0], [1, 0, 0, 1])
    assert (found["accuracy"], found["accuracy_single"], found["swap_consistency"]) == (1, 1, 1)
    assert found["prefers_a"] == 0.5 and found["margin"] == 1.5 and found["pairs"] == 2


def test_always_a_is_half_right_and_never_consistent():
    found = metrics_of([0, 0, 1, 1], [0, 1, 0, 1], [3.0] * 4, [1, 0, 0, 1])
    assert (found["accuracy_single"], found["swap_consistency"], found["prefers_a"]) == (0.5, 0, 1)
    assert found["accuracy"] == 0.5, "the two orders cancel: an even reward counts half"


def test_reward_weighs_both_orders():
    # As given weakly wrong, swapped strongly right: Eq. 3 is right.
    found = metrics_of([0, 0], [0, 1], [-0.5, -4.0], [1, 0])
    assert found["accuracy"] == 1 and found["swap_consistency"] == 0 and found["accuracy_single"] == 0.5


def test_rewards_of_the_two_responses_add_up_to_one():
    margins, swapped = np.array([3.0, -800.0]), np.array([1.0, 800.0])
    total = reward_of_first(margins, swapped) + reward_of_first(swapped, margins)
    assert total == pytest.approx([1, 1])


def test_ties_and_lone_orders_do_not_count_towards_accuracy():
    found = metrics_of([0, 0, 1], [0, 1, 0], [1.0, -1.0, 2.0], [0.5, 0.5, 1])
    assert (found["ties"], found["pairs"], found["accuracy_single"]) == (1, 0, 1)
    assert np.isnan(found["accuracy"])


def test_unlabelled_pairs_count_towards_consistency_alone():
    found = metrics_of([0, 0, 1, 1], [0, 1, 0, 1], [1.0, -1.0, 2.0, 2.0], [1, 0, np.nan, np.nan])
    assert (found["accuracy"], found["accuracy_single"], found["margin"]) == (1, 1, 1)
    assert (found["pairs"], found["ties"], found["swap_consistency"]) == (1, 0, 0.5)


def test_an_even_reward_counts_by_the_named_rule():
    margins, preference = np.array([[3.0, 3.0], [0.0, 0.0], [2.0, -2.0]]), np.array([1.0, 0.0, 1.0])
    assert pair_metrics(margins, preference)["accuracy"] == pytest.approx(2 / 3)
    wrong = pair_metrics(margins, preference, ties="wrong")
    assert wrong["accuracy"] == pytest.approx(1 / 3) and wrong["accuracy_single"] == pytest.approx(3 / 6)


def test_step_statistics_agree_with_the_figures_of_single_verdicts():
    from gram_engine.objectives.base import PreferenceObjective

    margins, preference = np.array([3.0, 0.0, -1.0, -2.0, 0.0]), np.array([1.0, 1.0, 1.0, 0.0, 0.5])
    context = SimpleNamespace(sample_ids=np.arange(5), preference=torch.tensor(preference))
    objective = object.__new__(PreferenceObjective)
    stats = objective.output(torch.tensor(0.0), torch.tensor(margins), context).stats
    found = objective.metrics(dict(zip(objective.stat_names, stats.tolist(), strict=True)))
    wanted = metrics_of(np.arange(5), np.zeros(5, dtype=int), margins, preference)
    assert found["accuracy"] == wanted["accuracy_single"] == 2.5 / 4
    assert (found["margin"], found["prefers_a"]) == (wanted["margin"], wanted["prefers_a"])


class FixedScorer:
    """Judges the pairs of a file by given margins."""

    def __init__(self, margins):
        self.margins = margins

    def score_pairs(self, pairs):
        for _, (given, swapped) in zip(pairs, self.margins, strict=True):
            yield PairScore(float(reward_of_first(given, swapped)), given, swapped, False)


@pytest.mark.parametrize(
    "margins, accuracy",
    [
        ([(1.5, 1.5)] * 6, 0.5),  # a judge that always says A
        ([(2.0, -1.0), (0.7, 0.7), (0.0, 0.0), (-1.0, 2.0), (3.0, 1.0), (0.0, -1.0)], 3 / 5),
    ],
)
def test_score_and_evaluate_agree_on_ties_and_even_rewards(margins, accuracy, monkeypatch, tmp_path):
    labels = ["A", "B", "A", "A", "tie", "A"]
    rows = [{"prompt": f"{n}", "response_a": "a", "response_b": "bb", "label": label} for n, label in enumerate(labels)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(ModelArguments, "scorer", lambda _: FixedScorer(margins))
    scored = score_file(ScoreArguments(input=str(file), output=str(tmp_path / "scores.jsonl"), model="model"))
    report = evaluate(EvaluateArguments(files=(str(file),), model="model", output_dir=str(tmp_path / "out")))
    assert scored["accuracy"] == report["figures"]["accuracy"] == report["all"]["accuracy"] == pytest.approx(accuracy)
    for name in ("pairs", "ties", "swap_consistency", "prefers_a"):
        assert scored[name] == report["all"][name], name
    assert scored["ties"] == 1 and "counts as half" in (tmp_path / "out/report.md").read_text()
