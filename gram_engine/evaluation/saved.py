"""Evaluations on disk: the lines that `gram evaluate` writes to scores.jsonl, and reading such a folder again."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

import numpy as np

from gram_engine.errors import DataError, one_line
from gram_engine.evaluation.pairs import EvalPair, JudgedPairs, LabelledPair
from gram_engine.evaluation.suites import SUITES, Suite
from gram_engine.files import read_json
from gram_engine.scoring.command import score_line, verdicts
from gram_engine.scoring.scorer import PairScore

FORMAT = 1
"""Of report.json and scores.jsonl together; raise it where the meaning of a field changes. Older folders have none."""
REPORT, SCORES = "report.json", "scores.jsonl"


@dataclass(frozen=True)
class SavedPair(LabelledPair):
    """A pair as it is read back."""

    id: str
    """The same wherever the same two responses to the same prompt with the same label were judged."""
    length_a: int
    """Characters."""
    length_b: int

    @property
    def lengths(self) -> tuple[int, int]:
        """Characters of a and of b."""
        return self.length_a, self.length_b


@dataclass(frozen=True)
class SavedEvaluation:
    """A model's verdicts on a suite, as `gram evaluate` wrote them to a folder."""

    folder: str
    model: str
    """As it was given to `gram evaluate`."""
    kind: str
    """"pairwise" or "scalar"."""
    suite: Suite
    files: tuple[str, ...]
    judged: JudgedPairs
    """Of SavedPairs, in the order of the files."""
    shortened: np.ndarray
    """[pairs] bool: whether texts were shortened to fit the model's sequence length."""
    seconds_per_pair: Optional[float]
    """Both orders, in one process; loading the model is left out."""
    tokens_per_pair: Optional[float]
    """Tokens that the model read, in both orders."""

    def select(self, ids: Sequence[str]) -> JudgedPairs:
        """The verdicts on some pairs, in the order of `ids`."""
        place = {pair.id: number for number, pair in enumerate(self.judged.pairs)}
        return self.judged.select([place[one] for one in ids])


def pair_ids(pairs: Sequence[EvalPair]) -> Iterator[str]:
    """An id for each pair, made of its texts and label; pairs that occur again are numbered."""
    seen: Counter[str] = Counter()
    for pair in pairs:
        content = json.dumps([pair.prompt, pair.a, pair.b, pair.preference])
        digest = sha256(content.encode()).hexdigest()[:16]
        seen[digest] += 1
        yield digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"


def line_of(pair: EvalPair, pair_id: str, score: PairScore) -> dict[str, Any]:
    """The line of scores.jsonl for a judged pair."""
    return {
        **score_line(score, pair.source_location, pair.preference),
        "tokens": score.tokens,
        "id": pair_id,
        "length_a": len(pair.a),
        "length_b": len(pair.b),
        "subset": pair.subset,
        "row": pair.row,
        "numbers": pair.numbers,
        "num_correct": pair.num_correct,
        "row_id": pair.row_id,
    }


def read_evaluation(folder: str | Path) -> SavedEvaluation:
    """Read a folder that `gram evaluate` wrote.

    Raises:
        DataError: files are missing, damaged, or of another format.
    """
    report = _read_report(Path(folder))
    try:
        pairs, lines = _read_lines(Path(folder), report)
        suite = next(suite for suite in SUITES.values() if suite.title == report["suite"])
        tokens = [line["tokens"] for line in lines]
        return SavedEvaluation(
            folder=str(folder),
            model=report["model"],
            kind=report["kind"],
            suite=suite,
            files=tuple(report["files"]),
            judged=JudgedPairs(pairs, verdicts(lines)[0], suite.ties),
            shortened=np.array([line["truncated"] for line in lines]),
            seconds_per_pair=report["seconds"] / report["pairs_timed"] if report["pairs_timed"] else None,
            tokens_per_pair=None if None in tokens else sum(tokens) / len(tokens),
        )
    except (KeyError, TypeError, ValueError, StopIteration) as problem:
        raise DataError(f"{folder}: {REPORT} or {SCORES} was changed ({problem!r}). {_again(folder, report)}") from None


def _read_report(folder: Path) -> dict[str, Any]:
    path = folder / REPORT
    if not path.is_file():
        unfinished = (folder / f"{SCORES}.partial").exists()
        remedy = (
            "The evaluation did not end: rerun its command to resume it."
            if unfinished
            else "Give folders that `gram evaluate ... --output-dir FOLDER` wrote."
        )
        raise DataError(f"{folder}: no {REPORT} there. {remedy}")
    report = read_json(path, DataError, "Evaluate again.")
    if report.get("format") != FORMAT:
        found = f"format {report['format']}" if "format" in report else "of an older version, without what a comparison needs"
        raise DataError(f"{path}: {found}; this version reads format {FORMAT}. {_again(folder, report)}")
    return report


def _again(folder: str | Path, report: dict[str, Any]) -> str:
    """The command that writes the folder anew."""
    try:
        words = ["gram", "evaluate", *report["files"], "--model", report["model"], "--output-dir", str(folder)]
        return f"Evaluate again: {shlex.join(words)} (and the other flags that it had)"
    except (KeyError, TypeError):
        return "Evaluate again."


def _read_lines(folder: Path, report: dict[str, Any]) -> tuple[list[SavedPair], list[dict[str, Any]]]:
    path = folder / SCORES
    if not path.is_file():
        raise DataError(f"{folder}: {REPORT} is there, but no {SCORES}. {_again(folder, report)}")
    pairs, lines = [], []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            lines.append(json.loads(text))
            pairs.append(_pair(lines[-1]))
        except (ValueError, TypeError, KeyError) as problem:
            what = one_line(f"not a line that `gram evaluate` writes ({problem!r})")
            raise DataError(f"{path}:{number}: {what}. {_again(folder, report)}") from None
    if len(lines) != report["pairs_judged"]:
        found = f"{len(lines):,} lines, but {REPORT} tells of {report['pairs_judged']:,} pairs: they are of different runs"
        raise DataError(f"{path}: {found}. {_again(folder, report)}")
    return pairs, lines


def _pair(line: dict[str, Any]) -> SavedPair:
    """Raises KeyError where a field is missing, TypeError or ValueError where one is something else."""
    first, second = line["numbers"]
    return SavedPair(
        id=str(line["id"]),
        length_a=int(line["length_a"]),
        length_b=int(line["length_b"]),
        preference=float(line["preference"]),
        subset=str(line["subset"]),
        row=int(line["row"]),
        numbers=(int(first), int(second)),
        num_correct=int(line["num_correct"]),
        row_id=str(line["row_id"]),
    )
