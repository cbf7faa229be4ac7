"""Our figures beside the paper's: the content of the report's sections, as plain data."""

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
    """What a column of figures is the mean of."""

    title: str
    sets: tuple[str, ...]
    published: Optional[str]
    """Key of the paper's column that it stands beside."""


@dataclass(frozen=True)
class Row:
    """A line of a section's table."""

    label: str
    variant: str
    x: Optional[float] = None

    @property
    def published(self) -> str:
        """Its name in the paper's table."""
        return self.label if self.x is None else f"{self.x:g}"


def columns_of(recipe: Recipe, variants: Sequence[str]) -> list[Column]:
    """The mean over the sets of each kind that all variants are measured on; where it has several, each set as well."""
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
    """A section's content: columns, rows with our figures and the paper's, orders, claims, and where a line is best."""
    rows = list(_rows(section))
    columns = columns_of(recipe, [row.variant for row in rows])
    published = PUBLISHED.get(section.published, Published(""))
    lines = [(row, [results.accuracy(row.variant, column.sets) for column in columns]) for row in rows]
    return {
        "title": section.title,
        "text": section.text,
        "x": section.x,
        "paper": {"place": published.place, "remark": published.remark},
        "columns": [{"title": one.title, "sets": one.sets, "paper": COLUMNS.get(one.published)} for one in columns],
        "rows": [
            {
                "label": row.label,
                "x": row.x,
                "variant": row.variant,
                "figures": [estimate and asdict(estimate) for estimate in estimates],
                "paper": [_paper(published, row, column) for column in columns],
                **_order_effects(results, row.variant),
            }
            for row, estimates in lines
        ],
        "orders": list(_orders(published, columns, lines)) if section.rows else [],
        "claims": list(_claims(section, published, columns, rows, results)),
        "lines": list(_lines(section, published, columns, lines, results)),
    }


def verdict(paper: float, ours: Estimate) -> str:
    """How a difference of ours stands to the paper's, which is not zero."""
    same = ours.mean * paper > 0
    if same:
        return VERDICTS[0] if ours.is_clear else VERDICTS[1]
    return VERDICTS[3] if ours.is_clear else VERDICTS[2]


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float:
    """Kendall's tau-a: pairs that both order alike, less those they order differently, over all pairs."""
    pairs = list(combinations(range(len(one)), 2))
    return sum(_sign(one[i] - one[j]) * _sign(other[i] - other[j]) for i, j in pairs) / len(pairs)


def _rows(section: Section) -> Iterator[Row]:
    for label, variant in section.rows.items():
        yield Row(str(label), variant)
    for label, points in section.series.items():
        for x in sorted(points):
            yield Row(str(label), points[x], float(x))


def _paper(published: Published, row: Row, column: Column) -> Optional[float]:
    return published.rows.get(row.published, {}).get(column.published)


def _order_effects(results: Results, variant: str) -> dict[str, Optional[float]]:
    """Means over the variant's sets."""
    own = list(results.scores.get(variant, {}).values())
    return {
        name: sum(getattr(scores, name) for scores in own) / len(own) if own else None
        for name in ("swap_consistency", "prefers_a")
    }


def _orders(published: Published, columns: Sequence[Column], lines: Sequence[tuple[Row, list]]) -> Iterator[dict[str, Any]]:
    """Rows from best to worst, ours and the paper's, by each column that both have."""
    for number, column in enumerate(columns):
        ours = {row.label: figures[number].mean for row, figures in lines if figures[number] is not None}
        paper = {row.label: _paper(published, row, column) for row, _ in lines}
        known = [label for label in ours if paper[label] is not None]
        if len(known) > 1 and published.relative_to is None:
            yield {
                "column": column.title,
                "ours": sorted(known, key=lambda label: -ours[label]),
                "paper": sorted(known, key=lambda label: -paper[label]),
                "kendall_tau": kendall_tau([ours[label] for label in known], [paper[label] for label in known]),
            }


def _claims(
    section: Section, published: Published, columns: Sequence[Column], rows: Sequence[Row], results: Results
) -> Iterator[dict[str, Any]]:
    """Each row less the reference in the mean over each kind of set, with the paper's difference where it has one."""
    reference = next((row for row in rows if row.label == section.reference), None)
    if reference is None:
        return
    for row in rows:
        for column in (one for one in columns if one.published):
            ours = results.difference(row.variant, reference.variant, column.sets)
            if row == reference or ours is None:
                continue
            theirs, base = (_paper(published, one, column) for one in (row, reference))
            if theirs is not None and published.relative_to != reference.label:
                theirs = None if base is None else theirs - base
            yield {
                "row": row.label,
                "reference": reference.label,
                "column": column.title,
                "ours": asdict(ours),
                "paper": theirs,
                "verdict": verdict(theirs, ours) if theirs else None,
            }


def _lines(
    section: Section, published: Published, columns: Sequence[Column], lines: Sequence[tuple[Row, list]], results: Results
) -> Iterator[dict[str, Any]]:
    """Of each line and column: its best place, its end less its beginning, and the paper's best place less our best."""
    for label in section.series:
        for number, column in enumerate(columns):
            own: Mapping[float, tuple[Row, Estimate]] = {
                row.x: (row, figures[number]) for row, figures in lines if row.label == label and figures[number] is not None
            }
            if len(own) < 2:
                continue
            best = max(own, key=lambda x: own[x][1].mean)
            theirs = published.best.get(column.published)

            def less(x: float, other: float, own=own, sets=column.sets) -> Optional[dict[str, float]]:
                found = results.difference(own[x][0].variant, own[other][0].variant, sets)
                return found and asdict(found)

            yield {
                "line": label,
                "column": column.title,
                "best": best,
                "ends": [min(own), max(own)],
                "end_less_beginning": less(max(own), min(own)),
                "paper_best": theirs,
                "paper_best_less_best": less(theirs, best) if theirs in own else None,
            }


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
