"""Figures about verdicts that every suite shares: intervals, order effects, calibration, what length alone would give."""

from __future__ import annotations

import math
from typing import Any, Sequence

import numpy as np

from gram_engine.evaluation.suites import Game
from gram_engine.metrics import sigmoid

BINS = 10


def wilson(successes: float, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); (nan, nan) of nothing."""
    if count == 0:
        return math.nan, math.nan
    share, square = successes / count, z * z
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    return centre - half, centre + half


def resampling_weights(count: int, repeats: int, rng: np.random.Generator) -> np.ndarray:
    """Bootstrap samples of `count` things as weights: [repeats, count], the share that each thing has of a sample."""
    return rng.multinomial(count, np.full(count, 1.0 / count), size=repeats) / count


def describe(games: Sequence[Game], rewards: np.ndarray, margins: np.ndarray) -> dict[str, Any]:
    """Figures over some games; those that need a winner leave out games without.

    Args:
        rewards: [games] Eq. 3, of a.
        margins: [games, 2] Z_A - Z_B with a, and with b, shown first.

    Returns:
        games, ties_in_labels, accuracy with its interval (an even reward is wrong, and counted in even_rewards),
        accuracy_a_first, accuracy_b_first (each order alone), swap_consistency (same winner in both orders), prefers_a
        (share of verdicts for the response shown first), longer_wins (accuracy of always taking the longer response; equal
        lengths count half), ece.  nan of nothing.
    """
    preference = np.array([game.preference for game in games])
    decided = preference != 0.5
    sign = np.where(preference > 0.5, 1.0, -1.0)
    right = ((rewards - 0.5) * sign > 0)[decided]
    longer = np.array([np.sign(len(game.a) - len(game.b)) for game in games]) * sign
    low, high = wilson(float(right.sum()), len(right))
    return {
        "games": int(decided.sum()),
        "ties_in_labels": int((~decided).sum()),
        "accuracy": _mean(right),
        "interval_low": low,
        "interval_high": high,
        "even_rewards": int((rewards == 0.5)[decided].sum()),
        "accuracy_a_first": _mean((margins[:, 0] * sign > 0)[decided]),
        "accuracy_b_first": _mean((-margins[:, 1] * sign > 0)[decided]),
        "swap_consistency": _mean(margins[:, 0] * margins[:, 1] < 0),
        "prefers_a": _mean(margins.reshape(-1) > 0),
        "longer_wins": _mean((0.5 + 0.5 * longer)[decided]),
        "ece": expected_calibration_error(rewards[decided], sign[decided] > 0),
    }


def reliability(rewards: np.ndarray, a_is_better: np.ndarray) -> list[tuple[float, float, int]]:
    """(mean confidence, accuracy, games) of ten bins of confidence max(r, 1 - r) over [0.5, 1]; empty bins are left out."""
    confidence = np.maximum(rewards, 1.0 - rewards)
    right = (rewards > 0.5) == a_is_better
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    return [
        (float(confidence[bins == number].mean()), float(right[bins == number].mean()), int((bins == number).sum()))
        for number in range(BINS)
        if (bins == number).any()
    ]


def expected_calibration_error(rewards: np.ndarray, a_is_better: np.ndarray) -> float:
    """Mean distance of confidence and accuracy over the bins, weighted by their games."""
    if not len(rewards):
        return math.nan
    return sum(abs(confidence - accuracy) * count for confidence, accuracy, count in reliability(rewards, a_is_better)) / len(
        rewards
    )


def rewards_of(margins: np.ndarray) -> np.ndarray:
    """Eq. 3 from [games, 2] margins."""
    return 0.5 * (sigmoid(margins[:, 0]) + sigmoid(-margins[:, 1]))


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan
