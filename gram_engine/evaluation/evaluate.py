"""`gram evaluate`: a reward model on benchmarks and on one's own pairs, with a report to read and files for machines."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

import tyro

from gram_engine.config.parse import fail
from gram_engine.errors import ConfigError, GramError
from gram_engine.evaluation.document import write_document
from gram_engine.evaluation.pairs import EvalPair, JudgedPairs
from gram_engine.evaluation.report import report_blocks
from gram_engine.evaluation.saved import FORMAT, REPORT, SCORES, line_of, pair_ids
from gram_engine.evaluation.suites import SUITES, read_eval_pairs
from gram_engine.files import write_json
from gram_engine.log import is_main_process, log
from gram_engine.metrics import accuracy, expected_calibration_error, pair_metrics
from gram_engine.scoring.command import ModelArguments, verdicts, write_judged
from gram_engine.scoring.resumable import fingerprint
from gram_engine.scoring.scorer import Judge


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
        log(f"{name:36} {value:.3f}")
    low, high = report["all"]["interval_low"], report["all"]["interval_high"]
    log(f"{'95 % interval of all pairs':36} {low:.3f} to {high:.3f} ({report['all']['pairs']} pairs)")
    log(f"report: {Path(arguments.output_dir) / 'report.html'}")


def evaluate(arguments: EvaluateArguments) -> dict[str, Any]:
    """Judge the pairs, compute the figures and write the report; returns the content of report.json.

    Raises:
        DataError, ConfigError, CheckpointError: a file or the model folder cannot be used.
    """
    name, pairs = read_eval_pairs(arguments.files, arguments.suite)
    suite, total, pairs = SUITES[name], len(pairs), _first(pairs, arguments.limit)
    lines, timing = _judge(arguments, pairs)
    judged = JudgedPairs(pairs, verdicts(lines)[0], suite.ties)
    tokens = [line["tokens"] for line in lines]
    report = {
        "format": FORMAT,
        "suite": suite.title,
        "model": arguments.model,
        "kind": "scalar" if "rewards" in lines[0] else "pairwise",
        "files": list(arguments.files),
        "pairs_in_files": total,
        "pairs_judged": len(pairs),
        "truncated": sum(line["truncated"] for line in lines),
        "unparsable": sum(line.get("unparsable", 0) for line in lines),
        "tokens": None if None in tokens else sum(tokens),
        **timing,
        "even_rewards_count": suite.ties,
        "figures": suite.figures(judged),
        "all": describe(judged),
        "subsets": {subset: describe(own) for subset, own in judged.by(lambda pair: pair.subset).items()},
    }
    if is_main_process():
        _write(Path(arguments.output_dir), report, judged)
    return report


def _write(folder: Path, report: dict[str, Any], judged: JudgedPairs) -> None:
    write_document(folder, "report", f"{report['suite']}: {report['model']}", list(report_blocks(report, judged)))
    write_json(folder / REPORT, report)
    write_json(folder / "rewardbench.json", _as_rewardbench_writes(report))


def describe(judged: JudgedPairs) -> dict[str, Any]:
    """Figures that every suite shares; those that need a winner leave out pairs labelled as ties.

    Returns:
        pairs, ties, accuracy, swap_consistency and prefers_a of `pair_metrics`; the interval of the accuracy; even_rewards
        (number of rewards of exactly 1/2); accuracy_a_first, accuracy_b_first (of each order alone); longer_wins (accuracy of
        always taking the longer response; equal lengths count half); ece (expected calibration error).  nan of nothing.
    """
    figures = pair_metrics(judged.margins, judged.preference, judged.ties)
    low, high = judged.interval()
    a_first, b_first = judged.margins.T
    return {
        "pairs": figures["pairs"],
        "ties": figures["ties"],
        "accuracy": figures["accuracy"],
        "interval_low": low,
        "interval_high": high,
        "even_rewards": int((judged.rewards == 0.5)[judged.has_winner].sum()),
        "accuracy_a_first": accuracy(a_first, judged.preference, judged.ties),
        "accuracy_b_first": accuracy(-b_first, judged.preference, judged.ties),
        "swap_consistency": figures["swap_consistency"],
        "prefers_a": figures["prefers_a"],
        "longer_wins": accuracy(judged.length_differences, judged.preference),
        "ece": expected_calibration_error(judged.rewards[judged.has_winner], judged.correctness),
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


def _judge(arguments: EvaluateArguments, pairs: Sequence[EvalPair]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A line of scores.jsonl for each pair, judged in both orders; and the seconds that judging `pairs_timed` of them took.

    These are the pairs that this process judged now: without those of an interrupted command and those of other processes.
    """
    ids, timing = list(pair_ids(pairs)), {"seconds": 0.0, "pairs_timed": 0}
    output = Path(arguments.output_dir) / SCORES

    def make_lines(judge: Judge, own: Sequence[EvalPair], numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        start = time.perf_counter()
        scores = judge.score_pairs((pair.prompt, pair.a, pair.b) for pair in own)
        for pair, number, score in zip(own, numbers, scores, strict=True):
            yield line_of(pair, ids[number], score)
        timing.update(seconds=round(time.perf_counter() - start, 3), pairs_timed=len(own))

    settings = {"suite": arguments.suite, "limit": arguments.limit, **arguments.depends_on()}
    depends_on = fingerprint(arguments.files, arguments.model, evaluation_format=FORMAT, **settings)
    return write_judged(arguments, output, depends_on, pairs, make_lines, "pairs", lambda pair: pair.size), timing


def _as_rewardbench_writes(report: dict[str, Any]) -> dict[str, Any]:
    """The format of the grouped results of rewardbench: subset -> the suite's own figure for it, or else the accuracy."""
    own = report["figures"]
    accuracies = {subset: own.get(subset, figures["accuracy"]) for subset, figures in report["subsets"].items()}
    return {**accuracies, "model": report["model"], "model_type": "Custom Classifier", "chat_template": "gram_engine"}
