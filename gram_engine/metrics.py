"""Every figure about pairwise verdicts, as pure functions of numpy arrays.

Validation during training, `gram score`, `gram evaluate`, `gram compare` and `gram reproduce` all count with these functions.
A pair has a first and a second response, and the judge's margins Z_A - Z_B in both orders: with the first response shown as
A, and with it shown as B.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

TieRule = Literal["half", "wrong"]
"""What a verdict counts that prefers neither response (an even reward): "half" a correct verdict, or as a "wrong" one."""
CALIBRATION_BINS = 10
LENGTH_BINS = 6
BOOTSTRAP_SAMPLES, SAMPLES_AT_ONCE = 2000, 100


def sigmoid(values: np.ndarray) -> np.ndarray:
    """Logistic function that does not overflow; float64."""
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(values, dtype=np.float64)))


def reward_of_first(margins: np.ndarray, swapped_margins: np.ndarray) -> np.ndarray:
    """Eq. 3: mean of p(A | y1, y2) and p(B | y2, y1), the reward of y1 against y2, in [0, 1].

    `margins` and `swapped_margins` are Z_A - Z_B with y1 shown first and with y2 shown first, of equal shape.
    """
    return 0.5 * (sigmoid(margins) + sigmoid(-np.asarray(swapped_margins)))


def correctness(towards_first: np.ndarray, preference: np.ndarray, ties: TieRule = "half") -> np.ndarray:
    """How far each verdict is correct: [pairs with a winner] float64, 1 correct, 0 wrong, an even verdict by the tie rule.

    Args:
        towards_first: [pairs] any number above 0 prefers the first response, below 0 the second; 0 is an even verdict.
        preference: [pairs] above 1/2 where the first response is better, below 1/2 where the second is.  Pairs without a
            winner (1/2: a tie, nan: no label) are left out.
    """
    winner = np.sign(np.asarray(preference, dtype=np.float64) - 0.5)
    labelled = np.abs(winner) > 0
    towards_winner = np.sign(towards_first)[labelled] * winner[labelled]
    return np.where(towards_winner == 0, 0.5 if ties == "half" else 0.0, towards_winner > 0)


def accuracy(towards_first: np.ndarray, preference: np.ndarray, ties: TieRule = "half") -> float:
    """Mean of `correctness`; nan where no pair has a winner."""
    return mean(correctness(towards_first, preference, ties))


def pair_metrics(margins: np.ndarray, preference: np.ndarray, ties: TieRule = "half") -> dict[str, float]:
    """Figures over pairs.

    Args:
        margins: [pairs, 2] Z_A - Z_B with the first response shown as A, and with it shown as B; nan where the pair was not
            judged in that order.  Pairs judged in one order count in accuracy_single, margin and prefers_a alone.
        preference: [pairs] probability that the first response is better; nan without a label.

    Returns:
        accuracy (of the reward, Eq. 3), accuracy_single (of each verdict alone), swap_consistency (share of pairs with the
        same winner in both orders), prefers_a (share of verdicts for the response shown as A), margin (mean towards the
        better response), pairs (number of pairs with a winner), ties (number of pairs labelled as ties).  nan over nothing.
    """
    margins, preference = np.asarray(margins, dtype=np.float64), np.asarray(preference, dtype=np.float64)
    judged = ~np.isnan(margins)
    single = (margins * (1.0, -1.0))[judged]
    single_preference = np.broadcast_to(preference[:, None], margins.shape)[judged]
    labelled = np.abs(single_preference - 0.5) > 0
    both = judged.all(axis=1)
    given, swapped = margins[both].T
    return {
        "accuracy_single": accuracy(single, single_preference, ties),
        "margin": mean((single * (2.0 * single_preference - 1.0))[labelled]),
        "prefers_a": mean(margins[judged] > 0),
        "accuracy": accuracy(reward_of_first(given, swapped) - 0.5, preference[both], ties),
        "swap_consistency": mean(given * swapped < 0),
        "pairs": int((np.abs(preference[both] - 0.5) > 0).sum()),
        "ties": int((preference[both] == 0.5).sum()),
    }


def by_pair(
    pair_ids: np.ndarray, orders: np.ndarray, margins: np.ndarray, preference: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What `pair_metrics` takes, from single verdicts: (margins [pairs, 2], preference [pairs] of the first response).

    Args:
        pair_ids: [verdicts] which pair a verdict belongs to.
        orders: [verdicts] 0 where the first response was shown as A, 1 where the second was.
        margins: [verdicts] Z_A - Z_B in that order.
        preference: [verdicts] of the response shown as A.
    """
    ids, row = np.unique(pair_ids, return_inverse=True)
    orders, preference = np.asarray(orders), np.asarray(preference, dtype=np.float64)
    margins_of_pairs, preference_of_pairs = np.full((len(ids), 2), np.nan), np.full(len(ids), np.nan)
    margins_of_pairs[row, orders] = margins
    preference_of_pairs[row] = np.where(orders == 1, 1.0 - preference, preference)
    return margins_of_pairs, preference_of_pairs


def wilson(successes: float, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); (nan, nan) of nothing."""
    if count == 0:
        return math.nan, math.nan
    share, square = successes / count, z * z
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    return centre - half, centre + half


def accuracy_interval(correct: np.ndarray, rows: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of `correct`: Wilson's, of the effective number of pairs; (nan, nan) of nothing.

    Pairs of one row are not independent. The variance of the mean by rows over that of independent pairs is the design effect
    (Kish 1965), and n pairs are worth n / effect independent ones (Korn and Graubard 1998). Where each row gives one pair, this
    is Wilson's interval itself.

    Args:
        correct: [pairs] their `correctness`.
        rows: [pairs] which row each pair comes from.
    """
    count = effective_count(correct, rows)
    return wilson(mean(correct) * count, count)


def effective_count(correct: np.ndarray, rows: np.ndarray) -> float:
    """How many independent pairs tell as much as these, at most their number; arguments as `accuracy_interval`."""
    row = np.unique(rows, return_inverse=True)[1]
    pairs, count = len(correct), int(row.max(initial=-1)) + 1
    variance = mean(correct) * (1.0 - mean(correct)) / max(pairs, 1)
    if count in (1, pairs) or not variance > 0:
        return float(count)
    residuals = np.bincount(row, correct - mean(correct))
    by_rows = count / (count - 1) * (residuals**2).sum() / pairs**2
    return pairs / max(1.0, by_rows / variance)


def resampling_weights(count: int, rng: np.random.Generator, samples: int = BOOTSTRAP_SAMPLES) -> np.ndarray:
    """Bootstrap samples of `count` things as weights: [samples, count], the share of a sample that is each thing."""
    return rng.multinomial(count, np.full(count, 1.0 / count), size=samples) / count


def resampled_means(values: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of lines of values over bootstrap samples of rows: [BOOTSTRAP_SAMPLES, lines].

    All lines share the samples, so that the difference of two columns is the paired bootstrap of their difference. A row is
    drawn with all its pairs, because these are not independent.

    Args:
        values: [lines, pairs]; nan leaves the pair out of the line's mean. A sample without any value has the mean nan.
        rows: [pairs] which row each pair comes from.
    """
    row = np.unique(rows, return_inverse=True)[1]
    known = ~np.isnan(values)
    totals = np.array([np.bincount(row, line) for line in np.where(known, values, 0.0)]).T
    counts = np.array([np.bincount(row, line) for line in known]).T
    means = []
    with np.errstate(invalid="ignore"):
        for _ in range(0, BOOTSTRAP_SAMPLES, SAMPLES_AT_ONCE):
            weights = resampling_weights(len(totals), rng, SAMPLES_AT_ONCE)
            means.append((weights @ totals) / (weights @ counts))
    return np.concatenate(means)


def percentile_interval(samples: np.ndarray) -> tuple[float, float]:
    """95 % interval of bootstrap samples [samples]; those that are nan are left out, (nan, nan) if all are."""
    samples = samples[~np.isnan(samples)]
    low, high = np.quantile(samples, [0.025, 0.975]) if len(samples) else (math.nan, math.nan)
    return float(low), float(high)


def accuracy_by_length(longer: np.ndarray, correct: np.ndarray) -> list[tuple[float, float, int]]:
    """(median length difference, accuracy, pairs) of LENGTH_BINS bins with equally many pairs; fewer bins of fewer pairs.

    Args:
        longer: [pairs] how much longer the better response is; negative where it is the shorter one.
        correct: [pairs] their `correctness`.
    """
    bins = np.array_split(np.argsort(longer, kind="stable"), min(LENGTH_BINS, len(longer))) if len(longer) else []
    return [(float(np.median(longer[own])), float(correct[own].mean()), len(own)) for own in bins]


def length_strata(longer: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """[2, pairs] `correct` where the better response is longer, and where it is shorter; nan elsewhere.

    The mean of the two lines' means is the length-controlled accuracy: that on pairs whose better response is as often the
    longer as the shorter one, so that always taking the longer has 1/2. Length-Controlled AlpacaEval (Dubois et al. 2024,
    arXiv:2404.04475) removes the influence of length by a regression instead. Arguments as `accuracy_by_length`.
    """
    return np.array([np.where(longer > 0, correct, np.nan), np.where(longer < 0, correct, np.nan)])


def reliability(rewards: np.ndarray, correct: np.ndarray) -> list[tuple[float, float, int]]:
    """(mean confidence, accuracy, pairs) of ten bins of confidence max(r, 1 - r) over [0.5, 1], without the empty bins.

    Args:
        rewards: [pairs] in [0, 1].
        correct: [pairs] their `correctness`.
    """
    confidence = np.maximum(rewards, 1.0 - rewards)
    bins = np.minimum(((confidence - 0.5) * 2 * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    return [
        (float(confidence[bins == number].mean()), float(correct[bins == number].mean()), int((bins == number).sum()))
        for number in np.unique(bins)
    ]


def expected_calibration_error(rewards: np.ndarray, correct: np.ndarray) -> float:
    """Mean distance between confidence and accuracy over the bins of `reliability`, weighted by their pairs; nan of nothing."""
    distances = [abs(confidence - share) * count for confidence, share, count in reliability(rewards, correct)]
    return sum(distances) / len(rewards) if len(rewards) else math.nan


def mean(values: np.ndarray) -> float:
    """Mean as a Python float; nan of nothing."""
    return float(np.mean(values)) if len(values) else math.nan
