"""`gram evaluate`: a reward model on benchmarks and on one's own pairs, with a report to read and files for machines."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

import numpy as np
import tyro
from tqdm import tqdm

from gram_engine.config.parse import fail
from gram_engine.errors import ConfigError, GramError
from gram_engine.evaluation.report import write_report
from gram_engine.evaluation.statistics import describe, rewards_of
from gram_engine.evaluation.suites import SUITES, Game, read_games
from gram_engine.files import write_atomically
from gram_engine.scoring.resumable import ResumableLines, origin
from gram_engine.scoring.scorer import Dtype, RewardModelScorer


@dataclass
class EvaluateArguments:
    """Measure a reward model on RewardBench, RewardBench 2, HHH, JudgeBench, RM-Bench or plain pairs."""

    files: tyro.conf.Positional[tuple[str, ...]]
    """Files of one suite, in its published format (JSONL, JSON, .gz, Parquet), or any pairs that training reads."""
    model: str
    """Folder written by `gram convert`."""
    output_dir: str
    """Folder for report.html, report.json, plots, scores.jsonl and rewardbench.json. A killed command goes on where it was."""
    suite: str = "auto"
    """auto (by the first row), pairs, reward-bench, reward-bench-2, hhh, judge-bench, rm-bench."""
    limit: Optional[int] = None
    """Judge the first so many pairs only (and the rest of the last one's row); the report says so."""
    dtype: Dtype = "auto"
    """Dtype of the weights; auto: as stored."""
    batch_tokens: Optional[int] = None
    """Tokens that run at once; default: 4,096 on a CPU, 65,536 on a GPU."""


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
    print(f"{'95 % interval of all games':36} {low:.3f} to {high:.3f} ({report['all']['games']} games)")
    print(f"report: {Path(arguments.output_dir) / 'report.html'}")


def evaluate(arguments: EvaluateArguments) -> dict[str, Any]:
    """Judge, count, and write the report; returns what report.json holds.

    Raises:
        DataError, ConfigError, CheckpointError: a file or the model folder cannot be used.
    """
    suite, games = read_games(arguments.files, arguments.suite)
    total, games = len(games), _first(games, arguments.limit)
    lines = _judge(arguments, games)
    margins = np.array([[line["margin"], line["exchanged_margin"]] for line in lines])
    rewards = rewards_of(margins)
    report = {
        "suite": SUITES[suite].title,
        "model": arguments.model,
        "files": list(arguments.files),
        "games_in_files": total,
        "games_judged": len(games),
        "truncated": sum(line["truncated"] for line in lines),
        "figures": SUITES[suite].figures(games, rewards, margins),
        "all": describe(games, rewards, margins),
        "subsets": {
            subset: describe([games[number] for number in own], rewards[own], margins[own])
            for subset, own in _subsets(games).items()
        },
    }
    folder = Path(arguments.output_dir)
    write_report(folder, report, games, rewards, margins)
    _write_json(folder / "report.json", report)
    _write_json(folder / "rewardbench.json", _as_rewardbench_writes(report))
    return report


def _first(games: list[Game], limit: Optional[int]) -> list[Game]:
    """The first games, no row of the suite cut in two."""
    if limit is None:
        return games
    if limit < 1:
        raise ConfigError(f"--limit {limit} must be at least 1.")
    while limit < len(games) and (games[limit].place, games[limit].item) == (games[limit - 1].place, games[limit - 1].item):
        limit += 1
    return games[:limit]


def _judge(arguments: EvaluateArguments, games: Sequence[Game]) -> list[dict[str, Any]]:
    """Both orders of every game, going on behind those of an earlier, killed command."""
    made_of = origin(arguments.files, arguments.model, suite=arguments.suite, dtype=arguments.dtype, limit=arguments.limit)
    output = ResumableLines(Path(arguments.output_dir) / "scores.jsonl", made_of)
    lines, rest = output.earlier(), games[output.done :]

    def judged() -> Iterator[dict[str, Any]]:
        if not rest:
            return
        load = partial(RewardModelScorer.from_pretrained, arguments.model, arguments.dtype)
        scores = load(batch_tokens=arguments.batch_tokens).score_pairs((game.prompt, game.a, game.b) for game in rest)
        for game, score in zip(rest, scores, strict=True):
            lines.append(
                {
                    "place": game.place,
                    "subset": game.subset,
                    "preference": game.preference,
                    "reward_a": score.reward_a,
                    "margin": score.margin,
                    "exchanged_margin": score.exchanged_margin,
                    "truncated": score.truncated,
                }
            )
            bar.update()
            yield lines[-1]

    with tqdm(total=len(games), initial=output.done, unit=" pairs", disable=None) as bar:
        output.append(judged())
    return lines


def _subsets(games: Sequence[Game]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, game in enumerate(games):
        found.setdefault(game.subset, []).append(number)
    return found


def _as_rewardbench_writes(report: dict[str, Any]) -> dict[str, Any]:
    """The shape of rewardbench's grouped results: subset -> the suite's own figure for it, else accuracy."""
    own = report["figures"]
    accuracies = {subset: own.get(subset, figures["accuracy"]) for subset, figures in report["subsets"].items()}
    return {**accuracies, "model": report["model"], "model_type": "Custom Classifier", "chat_template": "gram_engine"}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with write_atomically(path) as handle:
        json.dump(_without_nan(content), handle, indent=1)


def _without_nan(content: Any) -> Any:
    """JSON knows no nan: null."""
    if isinstance(content, dict):
        return {name: _without_nan(value) for name, value in content.items()}
    return None if isinstance(content, float) and math.isnan(content) else content
