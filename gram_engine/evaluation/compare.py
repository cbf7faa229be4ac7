"""`gram compare`: evaluations of several models set side by side, with paired differences against one of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Sequence

import tyro

from gram_engine.config.parse import fail
from gram_engine.errors import ConfigError, GramError
from gram_engine.evaluation.compare_report import accuracy_table, comparison_blocks
from gram_engine.evaluation.comparison import CHANCE, LONGER_WINS, Evaluations, compare
from gram_engine.evaluation.document import write_document
from gram_engine.evaluation.saved import SavedEvaluation, read_evaluation
from gram_engine.evaluation.suites import SUITES
from gram_engine.files import write_json
from gram_engine.log import log


@dataclass(kw_only=True)
class CompareArguments:
    """Set evaluations of several models side by side: accuracy, differences, order and length bias, calibration, cost."""

    reports: tyro.conf.Positional[tuple[str, ...]]
    """Folders that `gram evaluate` wrote, as FOLDER or NAME=FOLDER; folders of one name are one model on several suites.
    Without a name: the last part of the model's path."""
    output_dir: str
    """Folder for comparison.html, comparison.md, comparison.json and plots."""
    baseline: Optional[str] = None
    """Name of the model that all others are compared with, or "longer wins"; default: the best model."""


def main(argv: list[str] | None = None) -> None:
    """Command line of `gram compare`."""
    arguments = tyro.cli(CompareArguments, args=argv, prog="gram compare")
    try:
        content = compare_reports(arguments)
    except GramError as error:
        fail(error)
    table = accuracy_table(content)
    rows = [table.head, *table.rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        log("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    log(f"comparison: {Path(arguments.output_dir) / 'comparison.html'}")


def compare_reports(arguments: CompareArguments) -> dict[str, Any]:
    """Read the reports, compare them and write the comparison; returns the content of comparison.json.

    Raises:
        DataError: a folder is not a finished evaluation in the current format, or models have no pair of a suite in common.
        ConfigError: a name or the baseline cannot be used.
    """
    content = compare(read_reports(arguments.reports), arguments.baseline)
    folder = Path(arguments.output_dir)
    write_json(folder / "comparison.json", content)
    write_document(folder, "comparison", "Comparison of reward models", list(comparison_blocks(content)))
    return content


def read_reports(reports: Sequence[str]) -> Evaluations:
    """The evaluations in some folders (FOLDER or NAME=FOLDER): model -> test set -> evaluation. Raises as `compare_reports`."""
    if not reports:
        raise ConfigError("no report to compare: give the folders that `gram evaluate` wrote.")
    found: dict[str, dict[str, SavedEvaluation]] = {}
    for report in reports:
        given, folder = split_name(report)
        evaluation = read_evaluation(folder)
        name, title = given or _default_name(evaluation), set_title(evaluation)
        own = found.setdefault(name, {})
        if name in (LONGER_WINS, CHANCE):
            raise ConfigError(f"{report}: {name!r} is the name of a row of every comparison. Choose another one: NAME={folder}")
        other = next((one for one in own.values() if one.model != evaluation.model), None)
        if other and not given:
            raise ConfigError(
                f"{folder} and {other.folder}: the models {evaluation.model} and {other.model} would both be called {name!r}. "
                f"Name them: NAME={folder}"
            )
        if title in own:
            raise ConfigError(
                f"{folder} and {own[title].folder}: both tell of the model {name!r} on {title}. Leave one out, or name them: "
                f"NAME={folder}"
            )
        own[title] = evaluation
    return found


def split_name(report: str) -> tuple[str, str]:
    """(name, folder) of NAME=FOLDER; the name of a folder alone is empty."""
    name, equals, folder = report.partition("=")
    if not equals or Path(report).exists():
        return "", report
    if not name.strip() or not folder:
        raise ConfigError(f"{report}: name or folder is empty. Write NAME=FOLDER, such as base=runs/base-on-rewardbench.")
    return name.strip(), folder


def set_title(evaluation: SavedEvaluation) -> str:
    """What an evaluation was on: the suite's title; for one's own pairs, the names of their files."""
    if evaluation.suite is not SUITES["pairs"]:
        return evaluation.suite.title
    return ", ".join(sorted(Path(file).name.partition(".")[0] for file in evaluation.files))


def _default_name(evaluation: SavedEvaluation) -> str:
    return Path(evaluation.model).name or evaluation.model
