"""`gram score` and `gram rank`: preference files and lists of responses to rewards, line by line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, Callable, Iterator, Optional, Sequence, TypeVar

import numpy as np
import tyro
from tqdm import tqdm

from gram_engine.config.parse import fail
from gram_engine.config.schema import DataConfig
from gram_engine.data.fields import row_to_list
from gram_engine.data.readers import read_items, read_rows
from gram_engine.data.schema import Pair, ResponseList
from gram_engine.errors import DataError, GramError
from gram_engine.files import write_atomically
from gram_engine.metrics import pair_metrics
from gram_engine.scoring.resumable import ResumableLines, origin
from gram_engine.scoring.scorer import Best, Dtype, Method, RewardModelScorer

T = TypeVar("T")


@dataclass
class ModelArguments:
    """Flags of every command that scores."""

    input: tyro.conf.Positional[str]
    """Preference file in any format that training reads; for lists rows of {prompt, responses}."""
    output: tyro.conf.Positional[str]
    """JSONL to write, a line for each row. A killed command that is given again goes on where it was."""
    model: str
    """Folder written by `gram convert`."""
    dtype: Dtype = "auto"
    """Dtype of the weights; auto: as stored."""
    batch_tokens: Optional[int] = None
    """Tokens that run at once; default: 4,096 on a CPU, 65,536 on a GPU."""
    prompt_key: Optional[str] = None
    """Field of the prompt, where it has a name of its own."""

    def scorer(self) -> RewardModelScorer:
        return RewardModelScorer.from_pretrained(self.model, self.dtype, batch_tokens=self.batch_tokens)


@dataclass
class ScoreArguments(ModelArguments):
    """Score the pairs of a preference file: the reward of each response against the other (Eq. 3)."""

    chosen_key: Optional[str] = None
    """Field of the better response, where it has a name of its own."""
    rejected_key: Optional[str] = None
    """Field of the other response, where it has a name of its own."""
    report: Optional[str] = None
    """Also write the printed figures (accuracy over labelled pairs, swap consistency ...) to this JSON file."""


@dataclass
class RankArguments(ModelArguments):
    """Rank lists of responses, or find the best of each (section 4.4)."""

    method: Method = "reference"
    """reference: rewards of all against one (the row's `reference`, or one drawn); linear, tournament: the best alone."""
    seed: int = 0
    """Draws the reference."""


def main(argv: list[str] | None = None) -> None:
    """Command line of tools/score.py and `gram score`."""
    arguments = tyro.cli(ScoreArguments, args=argv, prog="gram score")
    try:
        report = score_file(arguments)
    except GramError as error:
        fail(error)
    print(json.dumps(report, indent=1))


def rank_main(argv: list[str] | None = None) -> None:
    """Command line of `gram rank`."""
    arguments = tyro.cli(RankArguments, args=argv, prog="gram rank")
    try:
        count = rank_file(arguments)
    except GramError as error:
        fail(error)
    print(f"{count} lists ranked: {arguments.output}")


def score_file(arguments: ScoreArguments) -> dict[str, float | None]:
    """Score a file; returns the metrics over its pairs.

    Raises:
        DataError, ConfigError, CheckpointError: the file or the model folder cannot be used.
    """
    names = {name: getattr(arguments, name) for name in ("prompt_key", "chosen_key", "rejected_key")}
    pairs = list(read_rows([arguments.input], DataConfig(**names)))
    for pair in pairs:
        if not isinstance(pair, Pair):
            raise DataError(
                f"{pair.source_location}: a ready-made row; scoring needs prompt and two responses in fields of their own."
            )
    lines = _run(arguments, pairs, _score_lines, "pairs")
    report = line_metrics(lines)
    if arguments.report:
        with write_atomically(arguments.report) as handle:
            json.dump(report, handle, indent=1)
    return report


def rank_file(arguments: RankArguments) -> int:
    """Rank a file's lists; returns how many. Raises as `score_file`."""
    lists = list(read_items([arguments.input], partial(row_to_list, data=DataConfig(prompt_key=arguments.prompt_key))))
    return len(_run(arguments, lists, partial(_rank_lines, method=arguments.method, seed=arguments.seed), "lists"))


def _run(
    arguments: ModelArguments,
    items: Sequence[T],
    make_lines: Callable[[RewardModelScorer, Sequence[T], int], Iterator[dict[str, Any]]],
    unit: str,
) -> list[dict[str, Any]]:
    """All lines, those of an earlier, killed run first; the rest is made and written now."""
    irrelevant = ("input", "output", "model", "batch_tokens", "report")
    settings = {name.name: getattr(arguments, name.name) for name in fields(arguments) if name.name not in irrelevant}
    output = ResumableLines(arguments.output, origin([arguments.input], arguments.model, **settings))
    lines = output.earlier()
    rest = items[output.done :]
    bar = tqdm(total=len(items), initial=output.done, unit=f" {unit}", disable=None)

    def made() -> Iterator[dict[str, Any]]:
        for line in make_lines(arguments.scorer(), rest, output.done) if rest else ():
            lines.append(line)
            bar.update()
            yield line

    with bar:
        output.append(made())
    return lines


def _score_lines(scorer: RewardModelScorer, pairs: Sequence[Pair], _first: int) -> Iterator[dict[str, Any]]:
    scores = scorer.score_pairs((pair.prompt, pair.response_a, pair.response_b) for pair in pairs)
    for pair, score in zip(pairs, scores, strict=True):
        yield {
            "place": pair.source_location,
            **asdict(score),
            "reward_b": 1.0 - score.reward_a,
            "preference": None if np.isnan(pair.preference) else pair.preference,
        }


def _rank_lines(
    scorer: RewardModelScorer, lists: Sequence[ResponseList], first: int, method: Method, seed: int
) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(lists, first):
        if method == "reference":
            ranking = scorer.rank(row.prompt, row.responses, row.reference, seed + number)
            best = Best(ranking.order[0], ranking.comparisons)
            found = {"rewards": ranking.rewards, "order": ranking.order, "reference": ranking.reference}
        else:
            best, found = scorer.best_of_n(row.prompt, row.responses, method), {}
        yield {"place": row.source_location, "best": best.index, "comparisons": best.comparisons, **found}


def line_metrics(lines: list[dict[str, Any]]) -> dict[str, float | None]:
    """`pair_metrics` of lines of `gram score` or `gram evaluate`, and how many were shortened; None (null) of nothing."""
    preference = np.array([np.nan if line["preference"] is None else line["preference"] for line in lines])
    margins = np.array([line["margin"] for line in lines] + [line["exchanged_margin"] for line in lines])
    number, orders = np.arange(len(lines)), np.repeat([0, 1], len(lines))
    metrics = pair_metrics(np.tile(number, 2), orders, margins, np.concatenate([preference, 1.0 - preference]))
    report = {name: None if np.isnan(value) else value for name, value in metrics.items()}
    return {**report, "truncated": sum(line["truncated"] for line in lines)}
