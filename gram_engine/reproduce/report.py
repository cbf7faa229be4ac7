"""The reproduction's report: Markdown, one HTML page with everything inside, JSON, and plots."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional, Sequence

import numpy as np

from gram_engine.evaluation.best_of_n import kl_of
from gram_engine.evaluation.document import (
    COLOURS,
    GREY,
    Block,
    Heading,
    Plot,
    Table,
    estimate_text,
    literal,
    new_figure,
    png_of,
    write_document,
)
from gram_engine.evaluation.plots import interval_rows
from gram_engine.files import write_json
from gram_engine.reproduce.collect import Results
from gram_engine.reproduce.compare import KINDS, VERDICTS, compare
from gram_engine.reproduce.jobs import JobGraph
from gram_engine.reproduce.recipe import Recipe


def write_report(graph: JobGraph, results: Results, failed: Mapping[str, str], command: str) -> Path:
    """Write report.md, report.html, report.json and plots into the output folder; returns the path of the page.

    Args:
        failed: job -> reason.
        command: the command line, to be shown.
    """
    content = report_content(graph, results, failed, command)
    write_json(graph.out / "report.json", content)
    write_document(graph.out, "report", content["title"], list(_blocks(content)))
    return graph.out / "report.html"


def report_content(graph: JobGraph, results: Results, failed: Mapping[str, str], command: str) -> dict[str, Any]:
    """What report.json holds."""
    recipe = graph.recipe
    done = [job for job in graph.jobs.values() if job.done]
    return {
        "title": recipe.title,
        "command": command,
        "seeds": recipe.seeds,
        "jobs": {"all": len(graph.jobs), "done": len(done), "seconds": round(sum(job.seconds for job in done), 1)},
        "failed": {graph.jobs[name].title: reason for name, reason in failed.items()},
        "not_measured": [name for name in recipe.variants if name not in results.scores],
        "sets": {
            name: {
                "kind": one.kind,
                "pairs": results.pairs[name],
                "longer_wins": results.longer_wins[name],
                "shortened": max((own[name].shortened for own in results.scores.values() if name in own), default=None),
            }
            for name, one in recipe.evaluation.items()
            if name in results.pairs
        },
        "variants": {
            name: {
                "stages": [{"stage": one.name, "data": one.data, "flags": one.flags} for one in recipe.stages_of(variant)],
                "folders": {seed: str(graph.models[name, seed]) for seed in recipe.seeds},
                "sets": {one: _measured(results, name, one) for one in results.scores.get(name, {})},
            }
            for name, variant in recipe.variants.items()
        },
        "sections": [compare(section, recipe, results) for section in recipe.sections],
        "best_of_n": results.best_of_n,
        "notes": [*recipe.notes, *_general_notes(recipe, results)],
    }


def _measured(results: Results, variant: str, one: str) -> dict[str, Any]:
    scores = results.scores[variant][one]
    by_seed = dict(zip(scores.seeds, scores.correct.mean(axis=1).tolist(), strict=True))
    effects = {"swap_consistency": scores.swap_consistency, "prefers_a": scores.prefers_a}
    return {**asdict(results.accuracy(variant, [one])), "by_seed": by_seed, **effects}


def _general_notes(recipe: Recipe, results: Results) -> Iterator[str]:
    yield (
        f"Intervals (95 %) resample {len(recipe.seeds)} seeds and the test pairs, independently. A few seeds represent other "
        "seeds poorly, so an interval is more likely too narrow than too wide."
    )
    sizes = ", ".join(f"{name}: {count:,} pairs, +/- {98 / count**0.5:.1f} points" for name, count in results.pairs.items())
    if sizes:
        yield f"The effect of chance alone on an accuracy near one half, for one model: {sizes}."
    yield (
        "The report shows many differences; at 95 % chance alone makes one in twenty look clear. A single verdict is no proof."
    )


def _blocks(content: Mapping[str, Any]) -> Iterator[Block]:
    jobs = content["jobs"]
    yield (
        f"{jobs['done']} of {jobs['all']} jobs done, {jobs['seconds'] / 60:.0f} minutes of work; seeds "
        f"{', '.join(map(str, content['seeds']))}. Command: {content['command']}"
    )
    yield from _summary(content)
    rows = [
        [name, KINDS[one["kind"]], f"{one['pairs']:,}", f"{100 * one['longer_wins']:.1f}", _share(one["shortened"])]
        for name, one in content["sets"].items()
    ]
    yield Table(["test set", "kind", "pairs", "longer wins", "shortened"], rows)
    yield (
        "All accuracies are percentages, with 95 % intervals in brackets; an even reward counts one half. Longer wins: the "
        "accuracy of always taking the longer response. Shortened: percentage of the pairs whose texts were truncated to the "
        "sequence length, for the variant that truncates most."
    )
    for number, section in enumerate(content["sections"], 1):
        yield from _section(section, f"section-{number}")
    if content["best_of_n"]:
        yield from _best_of_n(content["best_of_n"])
    yield Heading("What the figures do not show")
    yield from content["notes"]


def _summary(content: Mapping[str, Any]) -> Iterator[Block]:
    """How many accuracies differ from chance; what agrees with the paper, what does not, and what is missing."""
    yield Heading("Comparison with the paper")
    own = [one for variant in content["variants"].values() for one in variant["sets"].values()]
    above, below = sum(one["low"] > 0.5 for one in own), sum(one["high"] < 0.5 for one in own)
    yield (
        f"{len(own)} accuracies, each of a variant on a test set: {above} are clearly above one half, {below} clearly below, "
        f"{len(own) - above - below} within chance of it. Chance alone would make about {0.05 * len(own):.0f} seem clear."
    )
    claims = [claim for section in content["sections"] for claim in section["claims"] if claim["verdict"]]
    counts = Counter(claim["verdict"] for claim in claims)
    if claims:
        summary = "; ".join(f"{one} {counts[one]}" for one in VERDICTS)
        yield f"{len(claims)} differences that the paper prints. Ours: {summary}."
    else:
        yield "No difference that the paper prints has been measured."
    for one, start in ((VERDICTS[0], "Ours agree"), (VERDICTS[3], "Ours contradict")):
        own = [claim for claim in claims if claim["verdict"] == one]
        named = dict.fromkeys(f"{claim['row']} against {claim['reference']} ({claim['column']})" for claim in own)
        if named:
            yield f"{start}: {'; '.join(named)}."
    if content["failed"]:
        yield Table(["failed", "reason"], list(content["failed"].items()))
    if content["not_measured"]:
        yield f"Not measured: {', '.join(content['not_measured'])}."


def _section(section: Mapping[str, Any], name: str) -> Iterator[Block]:
    yield Heading(section["title"])
    if section["text"]:
        yield section["text"]
    if section["paper"]["place"]:
        yield f"The paper: {section['paper']['place']}. {section['paper']['remark']}".strip()
    yield _figures(section)
    for order in section["orders"]:
        yield (
            f"Order, {order['column']}. Ours: {' > '.join(order['ours'])}. Paper: {' > '.join(order['paper'])}. "
            f"Kendall's tau {order['kendall_tau']:.2f}."
        )
    for line in section["lines"]:
        yield _line(line, section["x"])
    if section["claims"]:
        yield _claims(section["claims"])
    for kind, png in _plots(section):
        yield Plot(f"{name}-{kind.replace(' ', '-')}", f"{section['title']}: {kind}", png)


def _figures(section: Mapping[str, Any]) -> Table:
    columns = list(enumerate(section["columns"]))
    printed = {number for number, _ in columns if any(row["paper"][number] is not None for row in section["rows"])}
    head = [section["x"]] if section["x"] else []
    for number, column in columns:
        head += [column["title"], f"paper: {column['paper']}"] if number in printed else [column["title"]]
    rows = []
    for row in section["rows"]:
        cells = [row["label"], f"{row['x']:g}"] if section["x"] else [row["label"]]
        for number, _ in columns:
            cells.append(estimate_text(row["figures"][number]))
            if number in printed:
                cells.append("" if row["paper"][number] is None else f"{row['paper'][number]:.1f}")
        rows.append([*cells, _share(row["swap_consistency"]), _share(row["prefers_a"])])
    return Table(["", *head, "same in both orders", "prefers A"], rows)


def _claims(claims: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            claim["row"],
            claim["column"],
            "" if claim["paper"] is None else f"{claim['paper']:+.1f}",
            estimate_text(claim["ours"], "+.1f"),
            claim["verdict"] or "",
        ]
        for claim in claims
    ]
    return Table([f"minus {claims[0]['reference']}", "", "paper, points", "ours, points", ""], rows)


def _line(line: Mapping[str, Any], axis: str) -> str:
    first, last = line["ends"]
    text = f"{line['line']}, {line['column']}: best at {axis} {line['best']:g}"
    if line["end_less_beginning"]:
        text += f"; at {last:g} minus at {first:g}: {estimate_text(line['end_less_beginning'], '+.1f')} points"
    if line["paper_best"] is not None:
        text += f"; the paper's best is at {line['paper_best']:g}"
        if line["paper_best_less_best"] and line["paper_best"] != line["best"]:
            text += f", in our results {estimate_text(line['paper_best_less_best'], '+.1f')} points from our best"
    return text + "."


def _best_of_n(curves: Mapping[str, Mapping[int, list[dict[str, float]]]]) -> Iterator[Block]:
    """Means over seeds; the intervals over prompts are in each model's own report."""
    yield Heading("Best of n (section 4.4)")
    yield (
        "Scores of the response that a variant chooses among n, mean over prompts and seeds, against KL: the oracle's, and its "
        "own (proxy). Bands: lowest and highest seed. Proxies of different variants are on different scales."
    )
    most = min(len(curve) for by_seed in curves.values() for curve in by_seed.values())
    kls = [kl_of(n) for n in range(1, most + 1)]
    found = {
        kind: {name: _by_seed(by_seed, kind, most) for name, by_seed in curves.items()} for kind in ("oracle", "proxy")
    }
    head = [f"{name}, {kind}" for kind, own in found.items() for name in own]
    rows = [
        [str(n), f"{kl:.3f}", *(f"{one[:, n - 1].mean():.3f}" for own in found.values() for one in own.values())]
        for n, kl in enumerate(kls, 1)
    ]
    yield Table(["n", "KL", *head], rows)
    for kind, own in found.items():
        lines = {name: (kls, values.mean(axis=0), values.min(axis=0), values.max(axis=0)) for name, values in own.items()}
        figure, axes = _line_plot(lines)
        axes.set(xlabel="KL = log n - (n - 1) / n", ylabel=f"{kind} score of the best of n")
        yield Plot(f"best-of-n-{kind}", f"Best of n: {kind} score against KL", png_of(figure))


def _by_seed(curves: Mapping[int, list[dict[str, float]]], kind: str, most: int) -> np.ndarray:
    """[seeds, n] for n = 1 ... most."""
    return np.array([[point[kind] for point in curve[:most]] for curve in curves.values()])


def _plots(section: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """(column, plot) of the means over each kind of set."""
    for number, column in enumerate(section["columns"]):
        own = [(row, row["figures"][number]) for row in section["rows"] if row["figures"][number] is not None]
        if own and column["title"] in KINDS.values():
            yield column["title"], png_of(_accuracy_lines(own, section["x"]) if section["x"] else _accuracy_rows(own))


def _accuracy_rows(own: Sequence[tuple[Mapping[str, Any], Mapping[str, float]]]):
    figure, axes = interval_rows([(row["label"], estimate) for row, estimate in own], width=6.0)
    axes.xaxis.set_major_formatter("{x:.1%}")
    return figure


def _accuracy_lines(own: Sequence[tuple[Mapping[str, Any], Mapping[str, float]]], axis: str):
    lines: dict[str, list[tuple[float, ...]]] = {}
    for row, estimate in own:
        lines.setdefault(row["label"], []).append((row["x"], estimate["mean"], estimate["low"], estimate["high"]))
    figure, axes = _line_plot({label: tuple(zip(*points)) for label, points in lines.items()})
    axes.axhline(0.5, color=GREY, linewidth=0.8, linestyle="--")
    axes.set(xlabel=axis, ylabel="accuracy")
    axes.yaxis.set_major_formatter("{x:.1%}")
    return figure


def _line_plot(lines: Mapping[str, tuple[Sequence[float], ...]]):
    """(figure, axes) of lines with bands: label -> (x, y, lower edge, upper edge)."""
    figure, axes = new_figure(6.0, 4.0)
    for colour, (label, (x, y, low, high)) in zip(cycle(COLOURS), lines.items()):
        axes.fill_between(x, low, high, color=colour, alpha=0.15)
        axes.plot(x, y, "o-", color=colour, markersize=4, label=literal(label))
    axes.legend(frameon=False, fontsize=8)
    return figure, axes


def _share(value: Optional[float]) -> str:
    return "–" if value is None else f"{100 * value:.0f}"
