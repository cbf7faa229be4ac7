"""Reports of text, tables and plots, written as Markdown and as one self-contained HTML page."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from html import escape
from io import BytesIO
from itertools import groupby
from pathlib import Path
from textwrap import indent
from typing import Mapping, Optional, Sequence

from gram_engine.files import write_atomically

BLUE, GREY, ORANGE = "#2f6fb5", "#8a8f98", "#c9702c"
COLOURS = (BLUE, ORANGE, "#3f8f5b", "#8457a8", "#b8434e", "#5f6b7a")
"""Of the lines of one plot, in this order."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; padding: 0; list-style: none; }
.tiles li { background: var(--soft); border-radius: .5rem; padding: .6rem 1rem; min-width: 7rem; }
.tiles b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .55rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: bottom; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem; margin-top: 1rem; }
.plots figure { margin: 0; } .plots img { width: 100%; background: #fff; border-radius: .5rem; }
details { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .9rem; margin: .5rem 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .6rem; border-radius: .4rem; }
"""


def new_figure(width: float = 5.0, height: float = 3.6):
    """(figure, axes) of matplotlib; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def literal(label: str) -> str:
    """A label for a figure, shown as it is: matplotlib takes text between dollar signs for a formula, and may fail on it."""
    return label.replace("$", r"\$")


def estimate_text(estimate: Optional[Mapping[str, float]], form: str = ".1f") -> str:
    """An estimate (mean, low, high) in percent with its interval; with form "+.1f" a difference, in points."""
    if estimate is None or math.isnan(estimate["mean"]):
        return "–"
    mean, low, high = (f"{100 * estimate[name]:{form}}" for name in ("mean", "low", "high"))
    return f"{mean} ({low}{' to ' if '+' in form else '–'}{high})"


def png_of(figure) -> bytes:
    """A figure as PNG."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


@dataclass(frozen=True)
class Heading:
    """The title of a section."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of plain text below a head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class KeyFigures:
    """The most important figures by name; large in HTML."""

    figures: Mapping[str, str]


@dataclass(frozen=True)
class Details:
    """Texts of a data file by name, shown as they are; folded under a summary in HTML."""

    summary: str
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Plot:
    """A figure; `name` is that of its file, without ending."""

    name: str
    caption: str
    png: bytes


Block = Heading | Table | KeyFigures | Details | Plot | str
"""A part of a document; a string is a paragraph of plain text."""


def write_document(folder: Path, name: str, title: str, blocks: Sequence[Block]) -> None:
    """Write FOLDER/NAME.md with its plots in FOLDER/plots, and FOLDER/NAME.html with the plots inside."""
    for plot in (block for block in blocks if isinstance(block, Plot)):
        with write_atomically(folder / "plots" / f"{plot.name}.png", "wb") as handle:
            handle.write(plot.png)
    with write_atomically(folder / f"{name}.md") as handle:
        handle.write(f"# {title}\n\n" + "\n\n".join(map(_markdown, blocks)) + "\n")
    with write_atomically(folder / f"{name}.html") as handle:
        handle.write(
            '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1>{_html(blocks)}</html>\n"
        )


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {text}"
        case Plot(name, caption):
            return f"![{caption}](plots/{name}.png)"
        case KeyFigures(figures):
            return "\n".join(f"- {name}: **{value}**" for name, value in figures.items())
        case Details(summary, texts):
            return "\n\n".join([f"### {summary}", *(f"{name}:\n\n{indent(text, '    ')}" for name, text in texts.items())])
        case Table(head, rows):
            lines = [head, ["---"] * len(head), *rows]
            return "\n".join("| " + " | ".join(map(_markdown_cell, line)) + " |" for line in lines)
    return block


def _markdown_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _html(blocks: Sequence[Block]) -> str:
    """Adjacent plots are shown side by side."""
    parts = []
    for are_plots, group in groupby(blocks, lambda block: isinstance(block, Plot)):
        html = "".join(map(_html_of_block, group))
        parts.append(f'<div class="plots">{html}</div>' if are_plots else html)
    return "".join(parts)


def _html_of_block(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{escape(text)}</h2>"
        case Plot(_, caption, png):
            source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
            return f'<figure><img alt="{escape(caption)}" src="{source}"><figcaption>{escape(caption)}</figcaption></figure>'
        case KeyFigures(figures):
            items = "".join(f"<li>{escape(name)}<b>{escape(value)}</b></li>" for name, value in figures.items())
            return f'<ul class="tiles">{items}</ul>'
        case Details(summary, texts):
            body = "".join(f"<p>{escape(name)}</p><pre>{escape(text)}</pre>" for name, text in texts.items())
            return f"<details><summary>{escape(summary)}</summary>{body}</details>"
        case Table(head, rows):
            lines = [_html_row("th", head), *(_html_row("td", row) for row in rows)]
            return f'<div class="scroll"><table>{"".join(lines)}</table></div>'
    return f"<p>{escape(block)}</p>"


def _html_row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
