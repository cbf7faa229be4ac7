"""Plots that several reports share; those over models show one model or several, then with a legend below the axes."""

from __future__ import annotations

from typing import Any, Iterator, Mapping, Sequence

from gram_engine.evaluation.document import BLUE, COLOURS, GREY, literal, new_figure, png_of

MARKERS = ("o-", "s--", "^:", "D-.")
"""Marker and line: of the first models, one for each colour, then of the next."""
Points = Sequence[tuple[float, float, int]]
"""(x, accuracy, pairs) of each bin."""


def interval_rows(rows: Sequence[tuple[str, Mapping[str, float]]], width: float = 5.0):
    """(figure, axes) of accuracies below each other, a label with each estimate (mean, low, high)."""
    figure, axes = new_figure(width, max(2.0, 0.3 * len(rows) + 1.0))
    for height, (_, estimate) in enumerate(rows):
        axes.plot([estimate["low"], estimate["high"]], [height, height], color=BLUE, linewidth=2)
        axes.plot(estimate["mean"], height, "o", color=BLUE)
    axes.axvline(0.5, color=GREY, linewidth=0.8, linestyle="--")
    axes.set(yticks=range(len(rows)), yticklabels=[literal(label) for label, _ in rows], xlabel="accuracy")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    return figure, axes


def plot_reliability(models: Mapping[str, Points]) -> bytes:
    """Accuracy by confidence: model -> its `reliability`. The larger the dot, the more pairs."""
    figure, axes = _axes_for(models)
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=0.8, linestyle="--")
    for style, xs, shares, counts in _lines(models):
        axes.plot(xs, shares, linewidth=1, markersize=4, **style)
        axes.scatter(xs, shares, [10 + 150 * count / sum(counts) for count in counts], color=style["color"], alpha=0.6)
    axes.set(xlim=(0.48, 1.02), ylim=(-0.02, 1.02), xlabel="confidence", ylabel="accuracy")
    return _with_legend(figure, models)


def plot_by_length(models: Mapping[str, Points]) -> bytes:
    """Accuracy by how much longer the better response is: model -> its `accuracy_by_length`."""
    figure, axes = _axes_for(models)
    for style, xs, shares, _ in _lines(models):
        axes.plot(xs, shares, markersize=5, **style)
    axes.axhline(0.5, color=GREY, linewidth=0.8, linestyle="--")
    axes.set(ylim=(-0.02, 1.02), xlabel="characters by which the better response is longer", ylabel="accuracy")
    axes.set_xscale("symlog", linthresh=100)
    return _with_legend(figure, models)


def _lines(models: Mapping[str, Points]) -> Iterator[tuple[dict[str, Any], Sequence, Sequence, Sequence]]:
    """(style and label, xs, accuracies, pairs) of each model that has points; a model's style goes by its place among all."""
    for number, (name, points) in enumerate(models.items()):
        marker = MARKERS[number // len(COLOURS) % len(MARKERS)]
        style = {"color": COLOURS[number % len(COLOURS)], "marker": marker[0], "linestyle": marker[1:], "label": literal(name)}
        if points:
            yield style, *zip(*points)


def _axes_for(models: Mapping[str, Points]):
    return new_figure(5.0, 3.6 + (0.2 * len(models) if len(models) > 1 else 0.0))


def _with_legend(figure, models: Mapping[str, Points]) -> bytes:
    if len(models) > 1:
        figure.legend(loc="outside lower left", frameon=False, fontsize=10)
    return png_of(figure)
