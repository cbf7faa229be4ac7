"""Figures about verdicts on cases worked out by hand, and their agreement over all that report them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gram_engine.evaluation.evaluate import EvaluateArguments, evaluate
from gram_engine.metrics import (
    accuracy_by_length,
    accuracy_interval,
    by_pair,
    length_strata,
    pair_metrics,
    percentile_interval,
    resampled_means,
    reward_of_first,
    wilson,
)
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

    def close(self):
        pass


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
    monkeypatch.setattr(ModelArguments, "scorer", lambda *_: FixedScorer(margins))
    scored = score_file(ScoreArguments(input=str(file), output=str(tmp_path / "scores.jsonl"), model="model"))
    report = evaluate(EvaluateArguments(files=(str(file),), model="model", output_dir=str(tmp_path / "out")))
    assert scored["accuracy"] == report["figures"]["accuracy"] == report["all"]["accuracy"] == pytest.approx(accuracy)
    for name in ("pairs", "ties", "swap_consistency", "prefers_a"):
        assert scored[name] == report["all"][name], name
    assert scored["ties"] == 1 and "counts as half" in (tmp_path / "out/report.md").read_text()


def test_accuracy_interval_counts_rows_where_their_pairs_agree():
    rng = np.random.default_rng(0)
    correct = (rng.random(200) < 0.7).astype(float)
    assert accuracy_interval(correct, np.arange(200)) == wilson(correct.sum(), 200)
    tripled = accuracy_interval(np.repeat(correct, 3), np.repeat(np.arange(200), 3))
    assert tripled == pytest.approx(wilson(correct.sum(), 200), abs=3e-4), "copies add nothing"
    independent = (rng.random(600) < 0.7).astype(float)
    by_rows = accuracy_interval(independent, np.repeat(np.arange(200), 3))
    assert by_rows == pytest.approx(wilson(independent.sum(), 600), abs=8e-3)
    assert accuracy_interval(np.ones(60), np.repeat(np.arange(20), 3)) == pytest.approx(wilson(20, 20))
    assert accuracy_interval(np.array([1.0, 0.0]), np.zeros(2)) == pytest.approx(wilson(0.5, 1)), "a single row"
    assert np.isnan(accuracy_interval(np.empty(0), np.empty(0))).all()


def clustered(rng, count):
    """Verdicts of two models on rows of one to five pairs, whose difficulty both share: ([2, pairs], rows)."""
    rows = np.repeat(np.arange(count), rng.integers(1, 6, size=count))
    hardness = rng.normal(scale=2.0, size=count)[rows]
    ease = np.array([[0.8], [0.4]]) - hardness + rng.normal(scale=0.3, size=(2, len(rows)))
    return (ease > 0).astype(float), rows


def test_resampled_means_against_naive_resampling():
    rng = np.random.default_rng(3)
    values, rows = clustered(rng, 60)
    values[1, rng.random(len(rows)) < 0.4] = np.nan
    members = [np.flatnonzero(rows == row) for row in range(60)]
    drawn = []
    for _ in range(4000):
        chosen = np.concatenate([members[row] for row in rng.integers(60, size=60)])
        drawn.append(np.nanmean(values[:, chosen], axis=1))
    found = resampled_means(values, rows, np.random.default_rng(0))
    assert found.shape == (2000, 2)
    np.testing.assert_allclose(found.mean(axis=0), np.mean(drawn, axis=0), atol=0.005)
    for line in range(2):
        wanted = np.quantile([one[line] for one in drawn], [0.025, 0.975])
        np.testing.assert_allclose(percentile_interval(found[:, line]), wanted, atol=0.015)
    covariance = [np.cov(np.transpose(one))[0, 1] for one in (drawn, found)]
    assert covariance[1] == pytest.approx(covariance[0], rel=0.15) and covariance[0] > 0, "the lines share the samples"


def test_paired_intervals_of_rows_cover_the_true_difference():
    rng = np.random.default_rng(4)
    true = np.diff([own.mean() for own in clustered(rng, 200_000)[0]])[0]
    covered = {"rows": 0, "pairs": 0}
    for _ in range(120):
        values, rows = clustered(rng, 40)
        for kind, unit in (("rows", rows), ("pairs", np.arange(len(rows)))):
            samples = resampled_means(values, unit, rng)
            low, high = percentile_interval(samples[:, 1] - samples[:, 0])
            covered[kind] += low <= true <= high
    assert 0.9 <= covered["rows"] / 120 <= 0.99, covered
    assert covered["pairs"] < covered["rows"] - 6, (covered, "pairs of one row are not independent")


def test_length_figures_by_hand():
    longer = np.array([-300.0, -20.0, 0.0, 10.0, 40.0, 500.0])
    correct = np.array([0.0, 1.0, 0.5, 1.0, 1.0, 0.0])
    assert accuracy_by_length(longer, correct) == [(one, right, 1) for one, right in zip(longer, correct)]
    twice = accuracy_by_length(np.repeat(longer, 2), np.tile([1.0, 0.0], 6))
    assert twice == [(one, 0.5, 2) for one in longer] and accuracy_by_length(np.empty(0), np.empty(0)) == []
    np.testing.assert_array_equal(length_strata(longer, correct), [
        [np.nan, np.nan, np.nan, 1.0, 1.0, 0.0],
        [0.0, 1.0, np.nan, np.nan, np.nan, np.nan],
    ])  # fmt: skip
    empty = resampled_means(np.full((1, 4), np.nan), np.arange(4), np.random.default_rng(0))
    assert np.isnan(empty).all() and np.isnan(percentile_interval(empty[:, 0])).all()
