"""The comparison to read: leaderboard, differences, and for each test set figures and plots of all models."""

from __future__ import annotations

import math
from typing import Any, Callable, Iterator, Mapping, Optional, Sequence

from gram_engine.evaluation.comparison import CHANCE, LONGER_WINS
from gram_engine.evaluation.document import Block, Heading, Plot, Table, estimate_text, png_of
from gram_engine.evaluation.plots import interval_rows, plot_by_length, plot_reliability
from gram_engine.evaluation.report import TIES
from gram_engine.evaluation.suites import SUITES

PAIRS = SUITES["pairs"].title

EXPLANATIONS = (
    "Accuracy: share of pairs whose better response has the higher reward (Eq. 3, both orders), in percent, with its 95 % "
    "interval: Wilson's, of the effective number of pairs where rows give several. Those of means, differences and "
    "length-controlled accuracy are bootstrap intervals over 2,000 samples of rows.",
    "Length-controlled accuracy: the mean of the accuracy on pairs whose better response is the longer one and of the accuracy "
    "on pairs whose better response is the shorter one, so that always taking the longer response has 50 % (the aim of "
    "Length-Controlled AlpacaEval, Dubois et al. 2024, by weighting instead of a regression).",
    "Same in both orders: share of pairs with the same winner whichever response is shown first. Prefers A: share of verdicts "
    "for the response shown first; 50 is unbiased. Models that score each response alone have 100 and 50 by construction, but "
    "for even rewards.",
    "ECE: expected calibration error, the mean distance between confidence (the reward of the preferred response) and "
    "accuracy. Seconds and tokens are of both orders of a pair; seconds are of one process, and compare models only on the "
    "same machine.",
)


def accuracy_table(content: Mapping[str, Any]) -> Table:
    """The leaderboard: models by rank, then LONGER_WINS and CHANCE; the mean over test sets, and each test set."""
    table = _table(content, "accuracy", [*content["models"], LONGER_WINS], estimate_text)
    return Table(table.head, [*table.rows, [CHANCE, *["50.0"] * (len(table.head) - 1)]])


def comparison_blocks(content: Mapping[str, Any]) -> Iterator[Block]:
    """The parts of the document, from the content of comparison.json."""
    baseline, names = content["baseline"], [*content["models"], LONGER_WINS]
    yield "Accuracy in percent with its 95 % interval, best model first."
    yield accuracy_table(content)
    if _several(content):
        yield f"Mean: over the test sets that all models have ({'; '.join(content['mean']['sets'])})."
    yield from _main_figures(content, names)
    for number, (title, one) in enumerate(content["sets"].items(), 1):
        figure, axes = interval_rows([(name, own["accuracy"]) for name, own in one["models"].items()])
        axes.xaxis.set_major_formatter("{x:.0%}")
        yield Plot(f"{number}-accuracy", f"{title}: accuracy with 95 % interval", png_of(figure))
    yield Heading(f"Difference from {baseline}")
    yield _table(content, "difference", [name for name in names if name != baseline], _difference)
    yield (
        "In points, over the same pairs. Clear: the 95 % interval of the paired bootstrap leaves out zero; a difference "
        "without that word is not clear. Of many differences between equal models, one in twenty would seem clear."
    )
    yield Heading("Length-controlled accuracy")
    yield _table(content, "length_controlled", names, estimate_text)
    for number, (title, one) in enumerate(content["sets"].items(), 1):
        yield from _set_blocks(number, title, one, list(content["models"]))
    yield Heading("Models")
    yield Table(
        ["", "kind", "model", "reports"],
        [[name, of["kind"], of["model"], ", ".join(of["reports"].values())] for name, of in content["models"].items()],
    )
    yield Heading("How the figures are defined")
    yield from EXPLANATIONS


def _several(content: Mapping[str, Any]) -> bool:
    """Whether a mean over test sets tells more than the sets themselves."""
    return content["mean"] is not None and len(content["mean"]["sets"]) > 1


def _table(content: Mapping[str, Any], key: str, names: Sequence[str], cell: Callable[..., str]) -> Table:
    """A figure of the models: its mean over test sets, and that of each test set."""
    columns = {"mean": content["mean"][key]} if _several(content) else {}
    for title, one in content["sets"].items():
        columns[title] = {name: own[key] for name, own in one["models"].items()}
    return Table(["", *columns], [[name, *(cell(own.get(name)) for own in columns.values())] for name in names])


def _main_figures(content: Mapping[str, Any], names: Sequence[str]) -> Iterator[Block]:
    """The main figure of each published suite."""
    own = {title: one["models"] for title, one in content["sets"].items() if one["suite"] != PAIRS}
    if own:
        main = {title: next(iter(models[LONGER_WINS]["figures"])) for title, models in own.items()}
        head = ["", *(f"{title}: {figure}" for title, figure in main.items())]
        columns = [{name: of["figures"][main[title]] for name, of in models.items()} for title, models in own.items()]
        rows = [[name, *(_percent(column.get(name)) for column in columns)] for name in names]
        yield "Main figures as the suites define them, in percent:"
        yield Table(head, rows)


def _set_blocks(number: int, title: str, one: Mapping[str, Any], ranked: Sequence[str]) -> Iterator[Block]:
    models = one["models"]
    yield Heading(title if title == one["suite"] else f"{title} ({one['suite'].lower()})")
    yield f"{_pairs_text(one)} {TIES[one['even_rewards_count']]}"
    yield _set_table(models)
    if one["suite"] != PAIRS:
        figures = list(models[LONGER_WINS]["figures"])
        yield f"The figures that {one['suite']} itself defines, in percent:"
        rows = [[name, *(_percent(own["figures"][figure]) for figure in figures)] for name, own in models.items()]
        yield Table(["", *figures], rows)
    for kind, caption, key, plot in (
        ("length", "accuracy by how much longer the better response is", "by_length", plot_by_length),
        ("reliability", "accuracy by confidence", "reliability", plot_reliability),
    ):
        lines = {name: models[name][key] if name in models else [] for name in ranked}
        yield Plot(f"{number}-{kind}", f"{title}: {caption}", plot(lines))


def _pairs_text(one: Mapping[str, Any]) -> str:
    """How many pairs there are, and which models judged more than those that count."""
    text = f"{one['pairs']:,} pairs" + (f" of {one['rows']:,} rows" if one["rows"] < one["pairs"] else "")
    common = one["pairs"] + one["ties"]
    text += f", and {one['ties']:,} labelled as ties, which accuracy leaves out." if one["ties"] else "."
    more = [f"{name} {count:,}" for name, count in one["pairs_judged"].items() if count > common]
    if more:
        text += f" Only these {common:,} pairs were judged by all models; all figures are over them ({', '.join(more)} judged)."
    return text


def _set_table(models: Mapping[str, Mapping[str, Any]]) -> Table:
    head = [
        "",
        "accuracy",
        "length-controlled",
        "better one longer",
        "better one shorter",
        "same in both orders",
        "prefers A",
        "ECE",
        "shortened",
        "s per 1,000 pairs",
        "tokens per pair",
    ]
    rows = [
        [
            name,
            estimate_text(own["accuracy"]),
            estimate_text(own["length_controlled"]),
            *(_percent(own[key]) for key in ("accuracy_longer", "accuracy_shorter", "swap_consistency", "prefers_a", "ece")),
            _percent(own.get("shortened")),
            _number(own.get("seconds_per_pair"), 1000),
            _number(own.get("tokens_per_pair")),
        ]
        for name, own in models.items()
    ]
    return Table(head, rows)


def _difference(estimate: Optional[Mapping[str, Any]]) -> str:
    return estimate_text(estimate, "+.1f") + (", clear" if estimate and estimate["clear"] else "")


def _percent(value: Optional[float]) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def _number(value: Optional[float], scale: int = 1) -> str:
    return "–" if value is None else f"{scale * value:,.1f}" if scale * value < 100 else f"{scale * value:,.0f}"
