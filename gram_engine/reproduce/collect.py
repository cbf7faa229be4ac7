"""Finished evaluations -> accuracies with intervals over seeds and test pairs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator, Mapping, Optional, Sequence

import numpy as np

from gram_engine.evaluation.suites import read_eval_pairs
from gram_engine.metrics import (
    accuracy,
    correctness,
    pair_metrics,
    percentile_interval,
    resampled_means,
    resampling_weights,
    reward_of_first,
)
from gram_engine.reproduce.jobs import JobGraph
from gram_engine.scoring.command import verdicts


@dataclass(frozen=True)
class Estimate:
    """A mean over `seeds` trainings, and its 95 % interval."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval of a difference leaves zero out; that of one training does not know what another would give."""
        return self.seeds > 1 and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Scores:
    """A variant on one set."""

    seeds: tuple[int, ...]
    correct: np.ndarray
    """[seeds, pairs with a winner] 1 where the reward finds the better response, 1/2 where it is even, else 0."""
    swap_consistency: float
    """Share of pairs with the same winner in both orders."""
    prefers_a: float
    """Share of verdicts for the response shown first."""
    shortened: float
    """Share of pairs whose texts did not fit the model's sequence length."""


@dataclass
class Results:
    """All measurements so far: variant -> set -> scores; and the accuracy of always taking the longer response."""

    scores: dict[str, dict[str, Scores]] = field(default_factory=dict)
    longer_wins: dict[str, float] = field(default_factory=dict)
    """Set -> accuracy."""
    pairs: dict[str, int] = field(default_factory=dict)
    """Set -> pairs with a winner."""
    best_of_n: dict[str, dict[int, list[dict[str, float]]]] = field(default_factory=dict)
    """Variant -> seed -> curve, as `gram best-of-n` writes it."""

    def accuracy(self, variant: str, sets: Sequence[str]) -> Optional[Estimate]:
        """Mean of the sets' accuracies; None where one has not been measured."""
        found = self._matrices(variant, sets, None)
        return bootstrap(list(found)) if found else None

    def difference(self, variant: str, reference: str, sets: Sequence[str]) -> Optional[Estimate]:
        """Accuracy of a variant less that of another, by the seeds and the pairs that both have; None where there are none."""
        seeds = [set(self._seeds(name, sets)) for name in (variant, reference)]
        common = sorted(seeds[0] & seeds[1])
        if not common:
            return None
        one, other = (self._matrices(name, sets, common) for name in (variant, reference))
        return bootstrap([mine - theirs for mine, theirs in zip(one, other, strict=True)])

    def _seeds(self, variant: str, sets: Sequence[str]) -> tuple[int, ...]:
        measured = self.scores.get(variant, {})
        return measured[sets[0]].seeds if sets and all(name in measured for name in sets) else ()

    def _matrices(self, variant: str, sets: Sequence[str], seeds: Optional[Sequence[int]]) -> list[np.ndarray]:
        own = self._seeds(variant, sets)
        rows = [own.index(seed) for seed in (own if seeds is None else seeds)]
        return [self.scores[variant][name].correct[rows] for name in sets] if rows else []


def bootstrap(matrices: Sequence[np.ndarray]) -> Estimate:
    """Mean over matrices (sets) of their means, with a percentile interval that resamples seeds and pairs independently.

    Seeds are a sample of trainings, pairs a sample of questions. Resampling both, crossed, is Owen's pigeonhole bootstrap
    (Annals of Applied Statistics 1, 2007). All sets share the resampled seeds, since these name the same models; with one
    seed the interval is that of the pairs alone.

    Args:
        matrices: each [seeds, pairs].
    """
    rng = np.random.default_rng(0)
    by_seed = resampling_weights(len(matrices[0]), rng)
    means = np.zeros(len(by_seed))
    for matrix in matrices:
        over_pairs = resampled_means(matrix, np.arange(matrix.shape[1]), rng)
        means += np.einsum("rs,rs->r", by_seed, over_pairs) / len(matrices)
    mean = np.mean([matrix.mean() for matrix in matrices])
    return Estimate(float(mean), *percentile_interval(means), seeds=len(matrices[0]))


def collect(graph: JobGraph) -> Results:
    """Everything that is finished in the folders of a recipe's jobs."""
    results = Results()
    for name, file in graph.test_files.items():
        pairs = read_eval_pairs([str(file)], "pairs")[1]
        preference = np.array([pair.preference for pair in pairs])
        results.longer_wins[name] = accuracy(np.array([len(pair.a) - len(pair.b) for pair in pairs]), preference)
        results.pairs[name] = int((preference != 0.5).sum())
    for name, variant in graph.recipe.variants.items():
        done = {seed: lines for seed, lines in _evaluations(graph, name)}
        if done:
            results.scores[name] = {one: _scores(done, graph.test_files[one].name) for one in variant.evaluate}
        if curves := dict(_curves(graph, name)):
            results.best_of_n[name] = curves
    return results


def _evaluations(graph: JobGraph, variant: str) -> Iterator[tuple[int, list[dict]]]:
    for seed in graph.recipe.seeds:
        job = graph.evaluations.get(graph.models[variant, seed])
        if job is not None and job.done:
            text = (job.folder / job.name / "scores.jsonl").read_text(encoding="utf-8")
            yield seed, [json.loads(line) for line in text.splitlines()]


def _curves(graph: JobGraph, variant: str) -> Iterator[tuple[int, list[dict[str, float]]]]:
    for seed in graph.recipe.seeds:
        job = graph.best_of_n.get(graph.models[variant, seed])
        if job is not None and job.done and variant in graph.recipe.best_of_n.variants:
            yield seed, json.loads((job.folder / job.name / "best_of_n.json").read_text(encoding="utf-8"))["curve"]


def _scores(done: Mapping[int, list[dict]], file: str) -> Scores:
    own = [[line for line in lines if Path(line["place"].rpartition(":")[0]).name == file] for lines in done.values()]
    judged = [verdicts(lines) for lines in own]
    metrics = [pair_metrics(*one) for one in judged]
    return Scores(
        tuple(done),
        np.array([correctness(reward_of_first(*margins.T) - 0.5, preference) for margins, preference in judged]),
        float(np.mean([one["swap_consistency"] for one in metrics])),
        float(np.mean([one["prefers_a"] for one in metrics])),
        float(np.mean([[line["truncated"] for line in lines] for lines in own])),
    )
