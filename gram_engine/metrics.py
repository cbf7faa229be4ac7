"""Figures of merit of pairwise verdicts: pure functions of arrays, shared by training's evaluation and the scorer."""

from __future__ import annotations

import numpy as np


def reward_of_first(margins: np.ndarray, swapped_margins: np.ndarray) -> np.ndarray:
    """Eq. 3: mean of p(A | y1, y2) and p(B | y2, y1), the reward of y1 against y2, in [0, 1].

    `margins` and `swapped_margins` are Z_A - Z_B with y1 shown first and with y2 shown first.
    """
    return 0.5 * (sigmoid(margins) + sigmoid(-swapped_margins))


def sigmoid(values: np.ndarray) -> np.ndarray:
    """Logistic function that does not overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(values, dtype=np.float64)))


def pair_metrics(pair_ids: np.ndarray, orders: np.ndarray, margins: np.ndarray, preference: np.ndarray) -> dict[str, float]:
    """Metrics over verdicts in both orders.

    Args:
        pair_ids: [verdicts] which pair a verdict belongs to.
        orders: [verdicts] 0 as given, 1 swapped.  Pairs seen in one order only count in `accuracy_single` alone.
        margins: [verdicts] Z_A - Z_B in that order.
        preference: [verdicts] 1 where the response shown as A is better, 0 where B is, 1/2 for a tie, nan unlabelled.

    Returns:
        accuracy (of Eq. 3 over both orders; an even reward counts half), accuracy_single (each verdict alone),
        swap_consistency (share of pairs with the same winner in both orders), prefers_a (share of verdicts for A),
        margin (mean, towards the winner), pairs (how many pairs have a winner), ties (how many have none).  A figure
        over nothing is nan.
    """
    margins = np.asarray(margins, dtype=np.float64)
    sign = 2.0 * np.asarray(preference, dtype=np.float64) - 1.0
    decided = np.abs(sign) > 0
    result = {
        "accuracy_single": _mean(_credit(margins * sign)[decided]),
        "margin": _mean((margins * sign)[decided]),
        "prefers_a": _mean(margins > 0),
    }
    given, swapped = _both_orders(np.asarray(pair_ids), np.asarray(orders))
    rewards = reward_of_first(margins[given], margins[swapped])
    winners = decided[given]
    result["accuracy"] = _mean(_credit((rewards - 0.5) * sign[given])[winners])
    result["swap_consistency"] = _mean(margins[given] * margins[swapped] < 0)
    result["pairs"] = int(winners.sum())
    result["ties"] = int((sign[given] == 0).sum())
    return result


def _credit(towards_winner: np.ndarray) -> np.ndarray:
    return np.where(towards_winner == 0, 0.5, towards_winner > 0)


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _both_orders(pair_ids: np.ndarray, orders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the verdicts of each pair seen in both orders: (as given, swapped)."""
    _, given, swapped = np.intersect1d(pair_ids[orders == 0], pair_ids[orders == 1], return_indices=True)
    return np.flatnonzero(orders == 0)[given], np.flatnonzero(orders == 1)[swapped]
