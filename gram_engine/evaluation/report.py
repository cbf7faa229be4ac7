"""The evaluation as one HTML page that needs nothing else (plots inside), and the plots as PNG files."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from gram_engine.evaluation.document import BLUE, GREY, ORANGE, image, new_figure, page, png_of
from gram_engine.evaluation.statistics import reliability
from gram_engine.evaluation.suites import STYLES, Game, style_matrix
from gram_engine.files import write_atomically

MISTAKES, SHOWN_CHARACTERS = 10, 600
COLUMNS = {
    "games": "games",
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

def write_report(
    folder: Path, report: dict[str, Any], games: Sequence[Game], rewards: np.ndarray, margins: np.ndarray
) -> None:
    """Write report.html and plots/*.png into `folder`.

    Args:
        report: what report.json will hold (evaluate.py).
        rewards: [games] Eq. 3, of a.
        margins: [games, 2] Z_A - Z_B in both orders.
    """
    plots = _plots(report, games, rewards, margins)
    for name, (_, png) in plots.items():
        with write_atomically(folder / "plots" / f"{name}.png", "wb") as handle:
            handle.write(png)
    with write_atomically(folder / "report.html") as handle:
        handle.write(_page(report, games, rewards, plots))


def _page(report: dict[str, Any], games: Sequence[Game], rewards: np.ndarray, plots: dict[str, tuple[str, bytes]]) -> str:
    note = f"{report['games_judged']:,} pairs, each in both orders; {report['truncated']:,} shortened to fit."
    if report["games_judged"] < report["games_in_files"]:
        note = f"<b>Only the first {report['games_judged']:,} of {report['games_in_files']:,} pairs.</b> " + note
    if report["suite"] == "RewardBench 2":
        note += " A response's score is its mean reward against the others: not comparable with the leaderboard's scores."
    tiles = "".join(f"<li>{escape(name)}<b>{_number(value)}</b></li>" for name, value in report["figures"].items())
    images = "".join(image(*plot) for plot in plots.values())
    return page(
        f"{report['suite']}: {report['model']}",
        f"<p>{note}</p><ul class='tiles'>{tiles}</ul>"
        f"<h2>By subset</h2><div class='scroll'>{_table(report)}</div><p>An even reward counts as wrong. "
        "Longer wins: the accuracy of always taking the longer response. ECE: how far confidence lies from accuracy.</p>"
        f"<h2>Plots</h2><div class='plots'>{images}</div><h2>The most confident mistakes</h2>{_mistakes(games, rewards)}"
        f"<p>Files: {escape(', '.join(report['files']))}</p>",
    )


def _table(report: dict[str, Any]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *COLUMNS.values()))
    rows = [*report["subsets"].items(), ("all", report["all"])]
    body = "".join(
        f"<tr><td>{escape(name)}</td>" + "".join(f"<td>{_number(figures[column])}</td>" for column in COLUMNS) + "</tr>"
        for name, figures in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else "–" if math.isnan(value) else f"{value:.3f}"


def _mistakes(games: Sequence[Game], rewards: np.ndarray) -> str:
    wrong_by = np.array([(0.5 - reward) * (1 if game.preference > 0.5 else -1) for game, reward in zip(games, rewards)])
    wrong_by[[game.preference == 0.5 for game in games]] = -1
    shown = [number for number in np.argsort(-wrong_by)[:MISTAKES] if wrong_by[number] > 0]
    parts = []
    for number in shown:
        game = games[number]
        better, worse = (game.a, game.b) if game.preference > 0.5 else (game.b, game.a)
        texts = {"Prompt": game.prompt, "Better by the label": better, "Better by the model": worse}
        body = "".join(f"<p>{name}</p><pre>{escape(_shortened(text))}</pre>" for name, text in texts.items())
        reward = 0.5 - wrong_by[number]
        parts.append(f"<details><summary>{escape(game.place)}: reward {reward:.3f} of the better one</summary>{body}</details>")
    return "".join(parts) or "<p>None.</p>"


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " …"


def _plots(
    report: dict[str, Any], games: Sequence[Game], rewards: np.ndarray, margins: np.ndarray
) -> dict[str, tuple[str, bytes]]:
    """Name -> (caption, PNG)."""
    decided = np.array([game.preference != 0.5 for game in games])
    sign = np.array([1.0 if game.preference > 0.5 else -1.0 for game in games])
    plots = {
        "subsets": ("Accuracy by subset with 95 % interval; orange: longer wins", _plot_subsets(report["subsets"])),
        "reliability": ("Reliability: accuracy by confidence", _plot_reliability(rewards[decided], sign[decided] > 0)),
        "margins": ("Margin towards the better response, both orders", _plot_margins(margins[decided], sign[decided])),
        "length": (
            "Accuracy by how much longer the better response is",
            _plot_length([game for game, own in zip(games, decided) if own], rewards[decided], sign[decided]),
        ),
    }
    if report["suite"] == "RM-Bench":
        plots["styles"] = ("Accuracy by style of chosen (row) and rejected (column)", _plot_styles(games, rewards))
    return plots


def _plot_subsets(subsets: dict[str, dict[str, Any]]) -> bytes:
    names = list(subsets)
    figure, axes = new_figure(5.0, max(2.0, 0.3 * len(names) + 1.0))
    for row, name in enumerate(names):
        figures = subsets[name]
        axes.plot([figures["interval_low"], figures["interval_high"]], [row, row], color=BLUE, linewidth=2)
        axes.plot(figures["accuracy"], row, "o", color=BLUE)
        axes.plot(figures["longer_wins"], row, "|", color=ORANGE, markersize=11, markeredgewidth=2)
    axes.axvline(0.5, color=GREY, linewidth=0.8, linestyle="--")
    axes.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 1), ylim=(len(names) - 0.5, -0.5), xlabel="accuracy")
    return png_of(figure)


def _plot_reliability(rewards: np.ndarray, a_is_better: np.ndarray) -> bytes:
    figure, axes = new_figure()
    bins = reliability(rewards, a_is_better)
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=0.8, linestyle="--")
    axes.plot([confidence for confidence, _, _ in bins], [accuracy for _, accuracy, _ in bins], "-", color=BLUE, linewidth=1)
    sizes = [10 + 150 * count / max(len(rewards), 1) for _, _, count in bins]
    axes.scatter([point[0] for point in bins], [point[1] for point in bins], sizes, color=BLUE)
    axes.set(xlim=(0.48, 1.02), ylim=(-0.02, 1.02), xlabel="confidence", ylabel="accuracy")
    return png_of(figure)


def _plot_margins(margins: np.ndarray, sign: np.ndarray) -> bytes:
    figure, axes = new_figure()
    towards = np.concatenate([margins[:, 0] * sign, -margins[:, 1] * sign])
    axes.hist(towards, bins=40, color=BLUE)
    axes.axvline(0, color=GREY, linewidth=0.8, linestyle="--")
    axes.set(xlabel="Z_A - Z_B towards the better response", ylabel="verdicts")
    return png_of(figure)


def _plot_length(games: Sequence[Game], rewards: np.ndarray, sign: np.ndarray) -> bytes:
    figure, axes = new_figure()
    longer = np.array([len(game.a) - len(game.b) for game in games], dtype=float) * sign
    right = (rewards - 0.5) * sign > 0
    if len(longer):
        bins = np.array_split(np.argsort(longer, kind="stable"), min(6, len(longer)))
        axes.plot([np.median(longer[own]) for own in bins], [right[own].mean() for own in bins], "o-", color=BLUE)
    axes.axhline(0.5, color=GREY, linewidth=0.8, linestyle="--")
    axes.set(ylim=(-0.02, 1.02), xlabel="characters by which the better response is longer", ylabel="accuracy")
    axes.set_xscale("symlog", linthresh=100)
    return png_of(figure)


def _plot_styles(games: Sequence[Game], rewards: np.ndarray) -> bytes:
    figure, axes = new_figure(4.4, 3.6)
    matrix = style_matrix(games, rewards)
    axes.imshow(matrix, vmin=0, vmax=1, cmap="Blues")
    for i in range(3):
        for j in range(3):
            axes.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", color="white" if matrix[i, j] > 0.6 else "black")
    axes.set(xticks=range(3), yticks=range(3), xticklabels=STYLES, yticklabels=STYLES, xlabel="rejected", ylabel="chosen")
    return png_of(figure)
