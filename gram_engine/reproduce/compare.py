"""Our results beside the paper's: the content of the report's sections, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Iterator, Mapping, Optional, Sequence

from gram_engine.reproduce.collect import Estimate, Results
from gram_engine.reproduce.paper import COLUMNS, PUBLISHED, Published
from gram_engine.reproduce.recipe import Recipe, Section

KINDS = {"in": "in distribution", "out": "out of distribution", "hhh": "HHH", "task": "task"}
VERDICTS = ("agrees", "same direction, within chance", "other direction, within chance", "contradicts")


@dataclass(frozen=True)
class Column:
    """The evaluation sets whose accuracies a column averages."""

    title: str
    sets: tuple[str, ...]
    published: Optional[str]
    """Key of the paper's column."""


@dataclass(frozen=True)
class Row:
    """A row of a section's table: a variant, or a point of a line."""

    label: str
    variant: str
    x: Optional[float] = None

    @property
    def published(self) -> str:
        """Key of the paper's row."""
        return self.label if self.x is None else f"{self.x:g}"


def rows_of(section: Section) -> list[Row]:
    """The rows of a section; those of a line in the order of x."""
    rows = [Row(label, variant) for label, variant in section.rows.items()]
    return rows + [Row(label, points[x], x) for label, points in section.series.items() for x in sorted(points)]


def columns_of(recipe: Recipe, variants: Sequence[str]) -> list[Column]:
    """For each kind of set that all variants are evaluated on: the mean over its sets and, where it has several, each set."""
    shared = [name for name in recipe.evaluation if all(name in recipe.variants[one].evaluate for one in variants)]
    columns = []
    for kind, title in KINDS.items():
        own = [name for name in shared if recipe.evaluation[name].kind == kind]
        if own:
            columns.append(Column(title, tuple(own), kind))
        if len(own) > 1:
            columns += [Column(name, (name,), None) for name in own]
    return columns


def compare(section: Section, recipe: Recipe, results: Results) -> dict[str, Any]:
    """A section's content: columns, rows with our accuracies and the paper's, rankings, differences, best points of lines."""
    return _Comparison(section, recipe, results).content()


class _Comparison:
    def __init__(self, section: Section, recipe: Recipe, results: Results):
        self.section, self.results = section, results
        self.rows = rows_of(section)
        self.columns = columns_of(recipe, [row.variant for row in self.rows])
        self.published = PUBLISHED.get(section.published, Published(""))
        self.estimates = {row: [results.accuracy(row.variant, column.sets) for column in self.columns] for row in self.rows}

    def content(self) -> dict[str, Any]:
        section, published = self.section, self.published
        return {
            "title": section.title,
            "text": section.text,
            "x": section.x,
            "paper": {"place": published.source, "remark": published.remark},
            "columns": [{"title": one.title, "sets": one.sets, "paper": COLUMNS.get(one.published)} for one in self.columns],
            "rows": [
                {
                    "label": row.label,
                    "x": row.x,
                    "variant": row.variant,
                    "figures": [estimate and asdict(estimate) for estimate in self.estimates[row]],
                    "paper": [self._paper(row, column) for column in self.columns],
                    **_order_effects(self.results, row.variant),
                }
                for row in self.rows
            ],
            "orders": list(self._rankings()) if section.rows else [],
            "claims": list(self._differences()),
            "lines": list(self._lines()),
        }

    def _paper(self, row: Row, column: Column) -> Optional[float]:
        return self.published.rows.get(row.published, {}).get(column.published)

    def _rankings(self) -> Iterator[dict[str, Any]]:
        """Rows from best to worst, ours and the paper's, by each column that both have."""
        for number, column in enumerate(self.columns):
            ours = {row.label: own[number].mean for row, own in self.estimates.items() if own[number] is not None}
            paper = {row.label: self._paper(row, column) for row in self.rows}
            known = [label for label in ours if paper[label] is not None]
            if len(known) > 1 and self.published.relative_to is None:
                yield {
                    "column": column.title,
                    "ours": sorted(known, key=lambda label: -ours[label]),
                    "paper": sorted(known, key=lambda label: -paper[label]),
                    "kendall_tau": kendall_tau([ours[label] for label in known], [paper[label] for label in known]),
                }

    def _differences(self) -> Iterator[dict[str, Any]]:
        """Each row minus the reference, by the mean over each kind of set, with the paper's difference where it has one."""
        reference = next((row for row in self.rows if row.label == self.section.reference), None)
        for row in self.rows if reference else []:
            for column in (one for one in self.columns if one.published):
                ours = self.results.difference(row.variant, reference.variant, column.sets)
                if row == reference or ours is None:
                    continue
                theirs, base = self._paper(row, column), self._paper(reference, column)
                if theirs is not None and self.published.relative_to != reference.label:
                    theirs = None if base is None else theirs - base
                yield {
                    "row": row.label,
                    "reference": reference.label,
                    "column": column.title,
                    "ours": asdict(ours),
                    "paper": theirs,
                    "verdict": verdict(theirs, ours) if theirs else None,
                }

    def _lines(self) -> Iterator[dict[str, Any]]:
        """For each line and column: the best x, the last point minus the first, and the paper's best point minus ours."""
        for label in self.section.series:
            for number, column in enumerate(self.columns):
                points = {row.x: row for row in self.rows if row.label == label and self.estimates[row][number] is not None}
                if len(points) < 2:
                    continue
                best = max(points, key=lambda x: self.estimates[points[x]][number].mean)
                theirs = self.published.best.get(column.published)
                yield {
                    "line": label,
                    "column": column.title,
                    "best": best,
                    "ends": [min(points), max(points)],
                    "end_less_beginning": self._step(points, column, max(points), min(points)),
                    "paper_best": theirs,
                    "paper_best_less_best": self._step(points, column, theirs, best) if theirs in points else None,
                }

    def _step(self, points: Mapping[float, Row], column: Column, x: float, other: float) -> Optional[dict[str, float]]:
        found = self.results.difference(points[x].variant, points[other].variant, column.sets)
        return found and asdict(found)


def verdict(paper: float, ours: Estimate) -> str:
    """How a difference of ours compares with the paper's, which is not zero."""
    if ours.mean * paper > 0:
        return VERDICTS[0] if ours.is_clear else VERDICTS[1]
    return VERDICTS[3] if ours.is_clear else VERDICTS[2]


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float:
    """Kendall's tau-a: pairs that both rank alike, minus those they rank differently, over all pairs."""
    pairs = list(combinations(range(len(one)), 2))
    return sum(_sign(one[i] - one[j]) * _sign(other[i] - other[j]) for i, j in pairs) / len(pairs)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _order_effects(results: Results, variant: str) -> dict[str, Optional[float]]:
    """Means over the variant's sets."""
    own = list(results.scores.get(variant, {}).values())
    return {
        name: sum(getattr(scores, name) for scores in own) / len(own) if own else None
        for name in ("swap_consistency", "prefers_a")
    }
