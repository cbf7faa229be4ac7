"""`gram score` and `gram rank`: preference files and lists of responses to rewards, line by line."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, Sequence, TypeVar

import numpy as np
import tyro

from gram_engine.config.parse import fail
from gram_engine.config.schema import DataConfig
from gram_engine.data.fields import row_to_list
from gram_engine.data.readers import read_items, read_rows
from gram_engine.data.schema import Pair, ResponseList
from gram_engine.data.template import JudgeTemplate
from gram_engine.errors import DataError, GramError
from gram_engine.files import write_json
from gram_engine.log import is_main_process, log
from gram_engine.metrics import pair_metrics
from gram_engine.scoring.judges import open_judge
from gram_engine.scoring.resumable import fingerprint, write_resumable
from gram_engine.scoring.scorer import Best, Dtype, Judge, Method, PairScore, ScalarPairScore, ServerPairScore
from gram_engine.scoring.server.options import ServerOptions, answers_file, is_address

T = TypeVar("T")


@dataclass(kw_only=True)
class ModelArguments:
    """Flags of every command that scores."""

    model: str
    """Folder written by `gram convert`; or a Hugging Face folder of any language model (a zero-shot judge) or of a reward model
    with one label; or the address of a server."""
    template: Optional[str] = None
    """Judge prompt of a model that has none of its own: gram-code (default), gram-eval (the authors' evaluation script),
    gram-paper (Figure 7), or a YAML file."""
    dtype: Dtype = "auto"
    """Dtype of the weights; auto: as stored."""
    seq_length: Optional[int] = None
    """Tokens of a text, to which longer ones are shortened; default: what the model was trained with, or takes at most."""
    batch_tokens: Optional[int] = None
    """Tokens of a batch; default: 4,096 on a CPU, 65,536 on a GPU."""
    server: tyro.conf.OmitArgPrefixes[ServerOptions] = field(default_factory=ServerOptions)

    def scorer(self, output: Optional[str | Path] = None) -> Judge:
        """The model, loaded; a server's answers are kept beside `output`."""
        server = self.server.keeping_answers_beside(output) if output else self.server
        return open_judge(self.model, **{**self.model_flags(), "server": server})

    def model_flags(self) -> dict[str, Any]:
        """The flags of this class beside --model."""
        return {name.name: getattr(self, name.name) for name in fields(ModelArguments) if name.name != "model"}

    def depends_on(self) -> dict[str, Any]:
        """What rewards depend on beside the model's files, for `fingerprint`."""
        template = JudgeTemplate.load(self.template).sha256 if self.template else None
        server = {"address": self.model, **self.server.depends_on()} if is_address(self.model) else None
        return {"template": template, "dtype": self.dtype, "seq_length": self.seq_length, "server": server}


@dataclass(kw_only=True)
class FileArguments(ModelArguments):
    """Flags of the commands that write a line for each row of a file."""

    input: tyro.conf.Positional[str]
    """Preference file in any format that training reads; for `gram rank` rows of {prompt, responses}."""
    output: tyro.conf.Positional[str]
    """JSONL file to write, a line for each row. If the command is interrupted, rerun it to resume. Several processes share the
    rows: torchrun --nproc-per-node N --no-python gram score ..."""
    prompt_key: Optional[str] = None
    """Field of the prompt, if it has another name than the usual ones."""


@dataclass(kw_only=True)
class ScoreArguments(FileArguments):
    """Score the pairs of a preference file: the reward of each response against the other (Eq. 3)."""

    chosen_key: Optional[str] = None
    """Field of the better response, if it has another name than the usual ones."""
    rejected_key: Optional[str] = None
    """Field of the other response, if it has another name than the usual ones."""
    report: Optional[str] = None
    """JSON file to write the printed figures to (accuracy over labelled pairs, swap consistency and others)."""


@dataclass(kw_only=True)
class RankArguments(FileArguments):
    """Rank lists of responses, or find the best of each (section 4.4)."""

    method: Method = "reference"
    """reference: rewards of all responses against one (the row's `reference`, or one drawn at random); linear, tournament:
    only the best response."""
    seed: int = 0
    """Seed of drawing the reference."""


def main(argv: list[str] | None = None) -> None:
    """Command line of tools/score.py and `gram score`."""
    arguments = tyro.cli(ScoreArguments, args=argv, prog="gram score")
    try:
        report = score_file(arguments)
    except GramError as error:
        fail(error)
    log(json.dumps(report, indent=1))


def rank_main(argv: list[str] | None = None) -> None:
    """Command line of `gram rank`."""
    arguments = tyro.cli(RankArguments, args=argv, prog="gram rank")
    try:
        count = rank_file(arguments)
    except GramError as error:
        fail(error)
    log(f"{count} lists ranked: {arguments.output}")


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
                f"{pair.source_location}: a preformatted row; scoring needs prompt and two responses in fields of their own."
            )
    lines = _run(arguments, pairs, _score_lines, "pairs", pair_size)
    figures = pair_metrics(*verdicts(lines))
    report = {name: None if np.isnan(value) else value for name, value in figures.items()}
    report["truncated"] = sum(line["truncated"] for line in lines)
    report["unparsable"] = sum(line.get("unparsable", 0) for line in lines)
    if arguments.report and is_main_process():
        write_json(arguments.report, report)
    return report


def rank_file(arguments: RankArguments) -> int:
    """Rank the lists of a file; returns how many there are. Raises as `score_file`."""
    lists = list(read_items([arguments.input], partial(row_to_list, data=DataConfig(prompt_key=arguments.prompt_key))))
    make_lines = partial(_rank_lines, method=arguments.method, seed=arguments.seed)
    return len(_run(arguments, lists, make_lines, "lists", list_size))


def score_line(score: PairScore, source_location: str, preference: float) -> dict[str, Any]:
    """The JSON line of a scored pair, as `gram score` and `gram evaluate` write it."""
    line = {
        "place": source_location,
        "preference": None if np.isnan(preference) else preference,
        "reward_a": score.reward_a,
        "reward_b": 1.0 - score.reward_a,
        "margin": score.margin,
        "exchanged_margin": score.swapped_margin,
        "truncated": score.truncated,
    }
    if isinstance(score, ServerPairScore):
        line["unparsable"] = score.unparsable
    return {**line, "rewards": score.rewards} if isinstance(score, ScalarPairScore) else line


def pair_size(pair: Pair) -> int:
    """Characters of a pair, by which several processes share pairs out."""
    return len(pair.prompt) + len(pair.response_a) + len(pair.response_b)


def list_size(row: ResponseList) -> int:
    """Characters of a list, by which several processes share lists out."""
    return len(row.prompt) + sum(map(len, row.responses))


def verdicts(lines: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """(margins [pairs, 2], preference [pairs]) of such lines, as `pair_metrics` takes them."""
    margins = np.array([[line["margin"], line["exchanged_margin"]] for line in lines], dtype=np.float64).reshape(-1, 2)
    return margins, np.array([line["preference"] for line in lines], dtype=np.float64)  # None becomes nan


def _run(
    arguments: FileArguments,
    items: Sequence[T],
    make_lines: Callable[[Judge, Sequence[T], Sequence[int]], Iterator[dict[str, Any]]],
    unit: str,
    size: Callable[[T], int],
) -> list[dict[str, Any]]:
    irrelevant = {"input", "output", "report"} | {name.name for name in fields(ModelArguments)}
    settings = {name.name: getattr(arguments, name.name) for name in fields(arguments) if name.name not in irrelevant}
    depends_on = fingerprint([arguments.input], arguments.model, **arguments.depends_on(), **settings)
    return write_judged(arguments, arguments.output, depends_on, items, make_lines, unit, size)


def write_judged(
    arguments: ModelArguments,
    output: str | Path,
    depends_on: dict[str, Any],
    items: Sequence[T],
    make_lines: Callable[[Judge, Sequence[T], Sequence[int]], Iterator[dict[str, Any]]],
    unit: str,
    size: Callable[[T], int],
) -> list[dict[str, Any]]:
    """`write_resumable` with the judge, opened when it is needed, as the first argument of `make_lines`.

    A server's answers are kept beside `output` until that is complete.
    """

    def lines_of(own: Sequence[T], numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        with closing(arguments.scorer(output)) as judge:
            yield from make_lines(judge, own, numbers)

    lines = write_resumable(output, depends_on, items, lines_of, unit, size)
    if is_main_process():
        answers_file(output).unlink(missing_ok=True)
    return lines


def _score_lines(scorer: Judge, pairs: Sequence[Pair], _numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    scores = scorer.score_pairs((pair.prompt, pair.response_a, pair.response_b) for pair in pairs)
    for pair, score in zip(pairs, scores, strict=True):
        yield score_line(score, pair.source_location, pair.preference)


def _rank_lines(
    scorer: Judge, lists: Sequence[ResponseList], numbers: Sequence[int], method: Method, seed: int
) -> Iterator[dict[str, Any]]:
    for number, row in zip(numbers, lists, strict=True):
        if method == "reference":
            ranking = scorer.rank(row.prompt, row.responses, row.reference, seed + number)
            best = Best(ranking.order[0], ranking.comparisons)
            found = {"rewards": ranking.rewards, "order": ranking.order, "reference": ranking.reference}
        else:
            best, found = scorer.best_of_n(row.prompt, row.responses, method), {}
        yield {"place": row.source_location, "best": best.index, "comparisons": best.comparisons, **found}
