"""The report of an evaluation: figures by subset, plots, and the most confident mistakes."""

from __future__ import annotations

import math
from typing import Any, Iterator

import numpy as np

from gram_engine.evaluation.document import (
    BLUE,
    GREY,
    ORANGE,
    Block,
    Details,
    Heading,
    KeyFigures,
    Plot,
    Table,
    new_figure,
    png_of,
)
from gram_engine.evaluation.pairs import JudgedPairs
from gram_engine.evaluation.plots import interval_rows, plot_by_length, plot_reliability
from gram_engine.evaluation.suites import STYLES, style_matrix
from gram_engine.metrics import accuracy_by_length, reliability

MISTAKES, SHOWN_CHARACTERS = 10, 600
COLUMNS = {
    "pairs": "pairs",
    "accuracy": "accuracy",
    "interval_low": "95 % from",
    "interval_high": "to",
    "longer_wins": "longer wins",
    "accuracy_a_first": "preferred set first",
    "accuracy_b_first": "second",
    "swap_consistency": "same in both orders",
    "prefers_a": "prefers A",
    "ece": "ECE",
}
TIES = {"half": "An even reward counts as half a correct verdict.", "wrong": "An even reward counts as wrong, as in the suite."}


def report_blocks(report: dict[str, Any], judged: JudgedPairs) -> Iterator[Block]:
    """The parts of the report, for `write_document`.

    Args:
        report: what report.json will hold (evaluate.py).
    """
    if report["pairs_judged"] < report["pairs_in_files"]:
        yield f"Only the first {report['pairs_judged']:,} of {report['pairs_in_files']:,} pairs were judged."
    yield f"{report['pairs_judged']:,} pairs, each in both orders; {report['truncated']:,} shortened to fit. {_cost(report)}"
    if report["unparsable"]:
        yield f"{report['unparsable']:,} answers of the server held no verdict; they count as even."
    if report["suite"] == "RewardBench 2":
        yield "A response's score is its mean reward against the others: not comparable with the leaderboard's scores."
    yield KeyFigures({name: _number(value) for name, value in report["figures"].items()})
    yield Heading("By subset")
    subsets = [*report["subsets"].items(), ("all", report["all"])]
    rows = [[name, *(_number(figures[column]) for column in COLUMNS)] for name, figures in subsets]
    yield Table(["", *COLUMNS.values()], rows)
    yield (
        f"{TIES[judged.ties]} Longer wins: the accuracy of always taking the longer response. "
        "ECE: expected calibration error, the mean distance between confidence and accuracy."
    )
    yield Heading("Plots")
    yield from _plots(report, judged)
    yield Heading("The most confident mistakes")
    yield from list(_mistakes(judged)) or ["None."]
    yield f"Files: {', '.join(report['files'])}"


def _cost(report: dict[str, Any]) -> str:
    tokens = "" if report["tokens"] is None else f"{report['tokens']:,} tokens read; "
    return f"{tokens}one process judged {report['pairs_timed']:,} pairs in {report['seconds']:,.1f} s."


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else "–" if math.isnan(value) else f"{value:.3f}"


def _mistakes(judged: JudgedPairs) -> Iterator[Details]:
    wrong_by = (0.5 - judged.rewards) * np.sign(judged.preference - 0.5)
    for number in np.argsort(-wrong_by)[:MISTAKES]:
        if wrong_by[number] <= 0:
            return
        pair = judged.pairs[number]
        better, worse = (pair.a, pair.b) if pair.preference > 0.5 else (pair.b, pair.a)
        texts = {"Prompt": pair.prompt, "Better by the label": better, "Better by the model": worse}
        summary = f"{pair.source_location}: reward {0.5 - wrong_by[number]:.3f} of the better one"
        yield Details(summary, {name: _shortened(text) for name, text in texts.items()})


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " …"


def _plots(report: dict[str, Any], judged: JudgedPairs) -> Iterator[Plot]:
    labelled = judged.select(np.flatnonzero(judged.has_winner))
    confidence = reliability(labelled.rewards, labelled.correctness)
    by_length = accuracy_by_length(labelled.better_is_longer_by, labelled.correctness)
    yield Plot("subsets", "Accuracy by subset with 95 % interval; orange: longer wins", _plot_subsets(report["subsets"]))
    yield Plot("reliability", "Reliability: accuracy by confidence", plot_reliability({"": confidence}))
    yield Plot("margins", "Margin towards the better response, both orders", _plot_margins(labelled))
    yield Plot("length", "Accuracy by how much longer the better response is", plot_by_length({"": by_length}))
    if report["suite"] == "RM-Bench":
        yield Plot("styles", "Accuracy by style of chosen (row) and rejected (column)", _plot_styles(judged))


def _plot_subsets(subsets: dict[str, dict[str, Any]]) -> bytes:
    estimates = [
        (name, {"mean": own["accuracy"], "low": own["interval_low"], "high": own["interval_high"]})
        for name, own in subsets.items()
    ]
    figure, axes = interval_rows(estimates)
    for row, own in enumerate(subsets.values()):
        axes.plot(own["longer_wins"], row, "|", color=ORANGE, markersize=11, markeredgewidth=2)
    axes.set_xlim(0, 1)
    return png_of(figure)


def _plot_margins(labelled: JudgedPairs) -> bytes:
    figure, axes = new_figure()
    towards_winner = labelled.margins * (1.0, -1.0) * np.sign(labelled.preference - 0.5)[:, None]
    axes.hist(towards_winner.reshape(-1), bins=40, color=BLUE)
    axes.axvline(0, color=GREY, linewidth=0.8, linestyle="--")
    axes.set(xlabel="Z_A - Z_B towards the better response", ylabel="verdicts")
    return png_of(figure)


def _plot_styles(judged: JudgedPairs) -> bytes:
    figure, axes = new_figure(4.4, 3.6)
    matrix = style_matrix(judged)
    axes.imshow(matrix, vmin=0, vmax=1, cmap="Blues")
    for i in range(3):
        for j in range(3):
            axes.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", color="white" if matrix[i, j] > 0.6 else "black")
    axes.set(xticks=range(3), yticks=range(3), xticklabels=STYLES, yticklabels=STYLES, xlabel="rejected", ylabel="chosen")
    return png_of(figure)
