"""What a comparison says: for each model and test set its figures, on the pairs that all models judged, as plain data.

All models of a test set are counted on the same pairs and share the bootstrap samples, so that every difference is paired.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Mapping, Optional, Sequence

import numpy as np

from gram_engine.errors import ConfigError, DataError
from gram_engine.evaluation.pairs import JudgedPairs
from gram_engine.evaluation.saved import SavedEvaluation
from gram_engine.metrics import (
    accuracy_by_length,
    expected_calibration_error,
    length_strata,
    pair_metrics,
    percentile_interval,
    reliability,
    resampled_means,
)

Evaluations = Mapping[str, Mapping[str, SavedEvaluation]]
"""Model -> test set -> evaluation."""
LONGER_WINS, CHANCE = "longer wins", "chance"
"""Rows of every comparison: always taking the longer response (equal lengths count half), and a coin."""
ACCURACY, LENGTH_CONTROLLED = 0, 1


@dataclass(frozen=True)
class CommonPairs:
    """A test set on the pairs that all its models judged."""

    judged: Mapping[str, JudgedPairs]
    """By model, and for LONGER_WINS."""
    samples: Mapping[str, np.ndarray]
    """Bootstrap samples of each model: [samples, 2], ACCURACY and LENGTH_CONTROLLED."""

    @property
    def any(self) -> JudgedPairs:
        """The verdicts of LONGER_WINS, for what does not depend on the model."""
        return self.judged[LONGER_WINS]


def compare(models: Evaluations, baseline: Optional[str] = None) -> dict[str, Any]:
    """The content of comparison.json.

    Args:
        baseline: the model that the others are compared with, or LONGER_WINS; None: the best one by the mean over the test sets
            that all models have.

    Returns:
        baseline; models: by rank, each with its path and kind; mean: figures over the test sets that all models have, None if
        there is none; sets: by title, each with its pairs and, by model, the figures of `_figures`.

    Raises:
        DataError: the models of a test set have no pair in common.
        ConfigError: the baseline is unknown, or shares no test set with a model.
    """
    names = sorted(models)
    titles = sorted({title for own in models.values() for title in own})
    by_set = {title: {name: models[name][title] for name in names if title in models[name]} for title in titles}
    common = {title: common_pairs(title, evaluations) for title, evaluations in by_set.items()}
    shared = [title for title in titles if all(title in own for own in models.values())]
    means = {name: np.mean([common[title].judged[name].accuracy() for title in shared]) if shared else 0.0 for name in names}
    ranked = sorted(names, key=lambda name: (-means[name], name))
    baseline = _baseline(models, baseline, ranked, shared)
    return {
        "baseline": baseline,
        "models": {name: _description(models[name]) for name in ranked},
        "mean": _means({title: common[title] for title in shared}, [*ranked, LONGER_WINS], baseline) if shared else None,
        "sets": {title: _set(models, title, common[title], ranked, baseline) for title in titles},
    }


def common_pairs(title: str, evaluations: Mapping[str, SavedEvaluation]) -> CommonPairs:
    """The verdicts on the rows that all models judged whole; raises DataError where there is none, or none with a winner."""
    common = set.intersection(*({pair.id for pair in one.judged.pairs} for one in evaluations.values()))
    for one in evaluations.values():
        cut = {pair.row for pair in one.judged.pairs if pair.id not in common}
        common -= {pair.id for pair in one.judged.pairs if pair.row in cut}
    first = evaluations[min(evaluations)]
    ids = [pair.id for pair in first.judged.pairs if pair.id in common]
    if not ids:
        places = "; ".join(f"{name}: {one.folder} of {', '.join(one.files)}" for name, one in evaluations.items())
        raise DataError(
            f"{title}: no pair was judged by all models ({places}). Evaluate them on the same files, or leave one of them out."
        )
    judged = {name: one.select(ids) for name, one in evaluations.items()}
    pairs = first.select(ids)
    if not pairs.has_winner.any():
        raise DataError(f"{title}: all {len(ids)} common pairs are labelled as ties; accuracy needs pairs with a winner.")
    longer = pairs.length_differences.astype(np.float64)
    judged[LONGER_WINS] = JudgedPairs(pairs.pairs, np.stack([longer, -longer], axis=1))
    lines = [line for one in judged.values() for line in (one.correctness, *_strata(one))]
    means = resampled_means(np.array(lines), pairs.rows, np.random.default_rng(list(title.encode())))
    by_model = means.reshape(len(means), len(judged), 3)
    samples = np.stack([by_model[..., 0], by_model[..., 1:].mean(axis=2)], axis=2)
    return CommonPairs(judged, {name: samples[:, number] for number, name in enumerate(judged)})


def _strata(judged: JudgedPairs) -> np.ndarray:
    return length_strata(judged.better_is_longer_by, judged.correctness)


def _baseline(models: Evaluations, baseline: Optional[str], ranked: Sequence[str], shared: Sequence[str]) -> str:
    have = "; ".join(f"{name}: {', '.join(sorted(models[name]))}" for name in ranked)
    if baseline is None:
        if not shared:
            raise ConfigError(
                f"no test set was judged by all models ({have}). Evaluate them on a common one (own pairs: in files of the "
                "same names), or choose with --baseline a model that has one in common with each of the others."
            )
        return ranked[0] if len(ranked) > 1 else LONGER_WINS
    if baseline not in (*models, LONGER_WINS):
        raise ConfigError(f"--baseline {baseline}: no such model. Choose among {', '.join([*ranked, LONGER_WINS])}.")
    apart = [name for name in ranked if baseline != LONGER_WINS and not set(models[name]) & set(models[baseline])]
    if apart:
        raise ConfigError(
            f"--baseline {baseline}: has no test set in common with {', '.join(apart)} ({have}). Evaluate them on a common one "
            "(own pairs: in files of the same names), or leave those models out."
        )
    return baseline


def _description(evaluations: Mapping[str, SavedEvaluation]) -> dict[str, Any]:
    by_title = dict(sorted(evaluations.items()))
    return {
        "model": " or ".join(dict.fromkeys(one.model for one in by_title.values())),
        "kind": " or ".join(dict.fromkeys(one.kind for one in by_title.values())),
        "reports": {title: one.folder for title, one in by_title.items()},
    }


def _means(sets: Mapping[str, CommonPairs], names: Sequence[str], baseline: str) -> dict[str, Any]:
    """Accuracy, length-controlled accuracy and difference of each model, as means over test sets."""
    common = list(sets.values())
    value = {name: np.mean([one.judged[name].accuracy() for one in common]) for name in names}
    controlled = {name: np.mean([_length_controlled(one.judged[name]) for one in common]) for name in names}
    samples = {name: np.mean([one.samples[name] for one in common], axis=0) for name in names}
    return {
        "sets": list(sets),
        "accuracy": {name: _estimate(value[name], samples[name][:, ACCURACY]) for name in names},
        "length_controlled": {name: _estimate(controlled[name], samples[name][:, LENGTH_CONTROLLED]) for name in names},
        "difference": {
            name: _difference(value[name] - value[baseline], samples[name] - samples[baseline])
            for name in names
            if name != baseline
        },
    }


def _set(models: Evaluations, title: str, common: CommonPairs, ranked: Sequence[str], baseline: str) -> dict[str, Any]:
    evaluations = {name: models[name][title] for name in ranked if title in models[name]}
    any_model, any_pairs = next(iter(evaluations.values())), common.any
    return {
        "suite": any_model.suite.title,
        "pairs": len(any_pairs.correctness),
        "ties": int((~any_pairs.has_winner).sum()),
        "rows": len(np.unique(any_pairs.rows)),
        "even_rewards_count": any_model.suite.ties,
        "pairs_judged": {name: len(one.judged.pairs) for name, one in evaluations.items()},
        "models": {
            name: _figures(common, name, baseline)
            | {"figures": any_model.suite.figures(common.judged[name])}
            | (_cost(evaluations[name]) if name in evaluations else {})
            for name in (*evaluations, LONGER_WINS)
        },
    }


def _figures(common: CommonPairs, name: str, baseline: str) -> dict[str, Any]:
    """Figures of a model on a test set.

    Returns:
        accuracy, length_controlled: {mean, low, high}; difference: the same and `clear`, None for the baseline and where it has
        not judged the set; accuracy_longer, accuracy_shorter: where the better response is the longer, the shorter one;
        by_length, reliability: bins; swap_consistency, prefers_a: as `pair_metrics`; ece: expected calibration error.
        Those of verdicts' order and confidence are None for LONGER_WINS, which has neither.
    """
    judged, samples = common.judged[name], common.samples[name]
    low, high = judged.interval()
    longer, shorter = (_mean_of_known(line) for line in _strata(judged))
    figures = {
        "accuracy": {"mean": judged.accuracy(), "low": low, "high": high},
        "difference": None,
        "length_controlled": _estimate(_length_controlled(judged), samples[:, LENGTH_CONTROLLED]),
        "accuracy_longer": longer,
        "accuracy_shorter": shorter,
        "by_length": accuracy_by_length(judged.better_is_longer_by, judged.correctness),
        "swap_consistency": None,
        "prefers_a": None,
        "ece": None,
        "reliability": [],
    }
    if name != baseline and baseline in common.judged:
        difference = judged.accuracy() - common.judged[baseline].accuracy()
        figures["difference"] = _difference(difference, samples - common.samples[baseline])
    if name != LONGER_WINS:
        metrics, rewards = pair_metrics(judged.margins, judged.preference, judged.ties), judged.rewards[judged.has_winner]
        figures |= {key: metrics[key] for key in ("swap_consistency", "prefers_a")}
        figures["ece"] = expected_calibration_error(rewards, judged.correctness)
        figures["reliability"] = reliability(rewards, judged.correctness)
    return figures


def _cost(evaluation: SavedEvaluation) -> dict[str, Any]:
    """Of all pairs that the model judged: mean seconds and tokens of a pair, and the share of shortened ones."""
    return {
        "seconds_per_pair": evaluation.seconds_per_pair,
        "tokens_per_pair": evaluation.tokens_per_pair,
        "shortened": float(evaluation.shortened.mean()),
    }


def _length_controlled(judged: JudgedPairs) -> float:
    return sum(_mean_of_known(line) for line in _strata(judged)) / 2


def _mean_of_known(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _estimate(value: float, samples: np.ndarray) -> dict[str, float]:
    low, high = percentile_interval(samples)
    return {"mean": float(value), "low": low, "high": high}


def _difference(value: float, samples: np.ndarray) -> dict[str, Any]:
    """An estimate that is clear if its interval leaves out zero."""
    estimate = _estimate(value, samples[:, ACCURACY])
    return {**estimate, "clear": bool(estimate["low"] > 0 or estimate["high"] < 0)}
