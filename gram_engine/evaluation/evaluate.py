"""`gram evaluate`: a reward model on benchmarks and on one's own pairs, with a report to read and files for machines."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

import numpy as np
import tyro

from gram_engine.config.parse import fail
from gram_engine.errors import ConfigError, GramError
from gram_engine.evaluation.document import write_document
from gram_engine.evaluation.pairs import EvalPair, JudgedPairs
from gram_engine.evaluation.report import report_blocks
from gram_engine.evaluation.suites import SUITES, read_eval_pairs
from gram_engine.files import write_atomically
from gram_engine.metrics import accuracy, expected_calibration_error, pair_metrics, wilson
from gram_engine.scoring.command import ModelArguments, score_line, verdicts
from gram_engine.scoring.resumable import fingerprint, write_resumable


@dataclass(kw_only=True)
class EvaluateArguments(ModelArguments):
    """Measure a reward model on RewardBench, RewardBench 2, HHH, JudgeBench, RM-Bench or plain pairs."""

    files: tyro.conf.Positional[tuple[str, ...]]
    """Files of one suite, in its published format (JSONL, JSON, .gz, Parquet), or any pairs that training reads."""
    output_dir: str
    """Folder for report.html, report.md, report.json, plots, scores.jsonl and rewardbench.json. If the command is interrupted,
    rerun it to resume."""
    suite: str = "auto"
    """auto (by the first row), pairs, reward-bench, reward-bench-2, hhh, judge-bench, rm-bench."""
    limit: Optional[int] = None
    """Judge only the first N pairs (and the remaining pairs of the last one's row); the report says so."""


def main(argv: list[str] | None = None) -> None:
    """Command line of tools/evaluate.py and `gram evaluate`."""
    arguments = tyro.cli(EvaluateArguments, args=argv, prog="gram evaluate")
    try:
        report = evaluate(arguments)
    except GramError as error:
        fail(error)
    for name, value in report["figures"].items():
        print(f"{name:36} {value:.3f}")
    low, high = report["all"]["interval_low"], report["all"]["interval_high"]
    print(f"{'95 % interval of all pairs':36} {low:.3f} to {high:.3f} ({report['all']['pairs']} pairs)")
    print(f"report: {Path(arguments.output_dir) / 'report.html'}")


def evaluate(arguments: EvaluateArguments) -> dict[str, Any]:
    """Judge the pairs, compute the figures and write the report; returns the content of report.json.

    Raises:
        DataError, ConfigError, CheckpointError: a file or the model folder cannot be used.
    """
    name, pairs = read_eval_pairs(arguments.files, arguments.suite)
    suite, total, pairs = SUITES[name], len(pairs), _first(pairs, arguments.limit)
    lines = _judge(arguments, pairs)
    judged = JudgedPairs(pairs, verdicts(lines)[0], suite.ties)
    report = {
        "suite": suite.title,
        "model": arguments.model,
        "files": list(arguments.files),
        "pairs_in_files": total,
        "pairs_judged": len(pairs),
        "truncated": sum(line["truncated"] for line in lines),
        "even_rewards_count": suite.ties,
        "figures": suite.figures(judged),
        "all": describe(judged),
        "subsets": {subset: describe(own) for subset, own in judged.by(lambda pair: pair.subset).items()},
    }
    folder = Path(arguments.output_dir)
    write_document(folder, "report", f"{report['suite']}: {report['model']}", list(report_blocks(report, judged)))
    _write_json(folder / "report.json", report)
    _write_json(folder / "rewardbench.json", _as_rewardbench_writes(report))
    return report


def describe(judged: JudgedPairs) -> dict[str, Any]:
    """Figures that every suite shares; those that need a winner leave out pairs labelled as ties.

    Returns:
        pairs, ties, accuracy, swap_consistency and prefers_a of `pair_metrics`; the interval of the accuracy; even_rewards
        (number of rewards of exactly 1/2); accuracy_a_first, accuracy_b_first (of each order alone); longer_wins (accuracy of
        always taking the longer response; equal lengths count half); ece (expected calibration error).  nan of nothing.
    """
    labelled = judged.preference != 0.5
    figures = pair_metrics(judged.margins, judged.preference, judged.ties)
    low, high = wilson(float(judged.correctness.sum()), len(judged.correctness))
    a_first, b_first = judged.margins.T
    longer = np.array([len(pair.a) - len(pair.b) for pair in judged.pairs])
    return {
        "pairs": figures["pairs"],
        "ties": figures["ties"],
        "accuracy": figures["accuracy"],
        "interval_low": low,
        "interval_high": high,
        "even_rewards": int((judged.rewards == 0.5)[labelled].sum()),
        "accuracy_a_first": accuracy(a_first, judged.preference, judged.ties),
        "accuracy_b_first": accuracy(-b_first, judged.preference, judged.ties),
        "swap_consistency": figures["swap_consistency"],
        "prefers_a": figures["prefers_a"],
        "longer_wins": accuracy(longer, judged.preference),
        "ece": expected_calibration_error(judged.rewards[labelled], judged.correctness),
    }


def _first(pairs: list[EvalPair], limit: Optional[int]) -> list[EvalPair]:
    """The first `limit` pairs, and the remaining pairs of the last one's row."""
    if limit is None:
        return pairs
    if limit < 1:
        raise ConfigError(f"--limit {limit} must be at least 1.")
    while limit < len(pairs) and pairs[limit].row == pairs[limit - 1].row:
        limit += 1
    return pairs[:limit]


def _judge(arguments: EvaluateArguments, pairs: Sequence[EvalPair]) -> list[dict[str, Any]]:
    """A line of scores.jsonl for each pair, judged in both orders."""

    def make_lines(rest: Sequence[EvalPair], _first: int) -> Iterator[dict[str, Any]]:
        scores = arguments.scorer().score_pairs((pair.prompt, pair.a, pair.b) for pair in rest)
        for pair, score in zip(rest, scores, strict=True):
            yield {**score_line(score, pair.source_location, pair.preference), "subset": pair.subset}

    settings = {"suite": arguments.suite, "limit": arguments.limit, **arguments.depends_on()}
    depends_on = fingerprint(arguments.files, arguments.model, **settings)
    return write_resumable(Path(arguments.output_dir) / "scores.jsonl", depends_on, pairs, make_lines, "pairs")


def _as_rewardbench_writes(report: dict[str, Any]) -> dict[str, Any]:
    """The format of the grouped results of rewardbench: subset -> the suite's own figure for it, or else the accuracy."""
    own = report["figures"]
    accuracies = {subset: own.get(subset, figures["accuracy"]) for subset, figures in report["subsets"].items()}
    return {**accuracies, "model": report["model"], "model_type": "Custom Classifier", "chat_template": "gram_engine"}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with write_atomically(path) as handle:
        json.dump(_without_nan(content), handle, indent=1)


def _without_nan(content: Any) -> Any:
    """The content with null for nan, which JSON does not have."""
    if isinstance(content, dict):
        return {name: _without_nan(value) for name, value in content.items()}
    return None if isinstance(content, float) and math.isnan(content) else content
