"""Pages that need nothing else: plots inside, one style; and documents of text, tables and plots, as Markdown and HTML."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from html import escape
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Iterator, Sequence

from gram_engine.files import write_atomically

BLUE, GREY, ORANGE = "#2f6fb5", "#8a8f98", "#c9702c"

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; padding: 0; list-style: none; }
.tiles li { background: var(--soft); border-radius: .5rem; padding: .6rem 1rem; min-width: 7rem; }
.tiles b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: bottom; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
.plots img { width: 100%; background: #fff; border-radius: .5rem; }
details { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .9rem; margin: .5rem 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .6rem; border-radius: .4rem; }
"""


def page(title: str, body: str) -> str:
    """An HTML page of a plain title and a body in HTML."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1>{body}</html>\n"
    )


def image(caption: str, png: bytes) -> str:
    """A plot inside a page."""
    return (
        f'<figure style="margin:0"><img alt="{escape(caption)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def new_figure(width: float = 5.0, height: float = 3.6):
    """(figure, axes) of matplotlib, inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def png_of(figure) -> bytes:
    """A figure as PNG."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


@dataclass(frozen=True)
class Heading:
    """Begins a part."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of plain text below a head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    """A figure; `name` is its file's, without ending."""

    name: str
    caption: str
    png: bytes


Block = Heading | Table | Plot | str
"""A string is a paragraph of plain text."""


def write_document(folder: Path, name: str, title: str, blocks: Sequence[Block]) -> None:
    """Write FOLDER/NAME.md with its plots in FOLDER/plots, and FOLDER/NAME.html with everything inside."""
    for plot in (block for block in blocks if isinstance(block, Plot)):
        with write_atomically(folder / "plots" / f"{plot.name}.png", "wb") as handle:
            handle.write(plot.png)
    with write_atomically(folder / f"{name}.md") as handle:
        handle.write(f"# {title}\n\n" + "\n\n".join(map(_markdown, blocks)) + "\n")
    with write_atomically(folder / f"{name}.html") as handle:
        handle.write(page(title, "".join(_html_blocks(blocks))))


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"## {block.text}"
    if isinstance(block, Plot):
        return f"![{block.caption}](plots/{block.name}.png)"
    if isinstance(block, Table):
        lines = [block.head, ["---"] * len(block.head), *block.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return block


def _html_blocks(blocks: Sequence[Block]) -> Iterator[str]:
    """Plots that follow each other stand side by side."""
    for are_plots, group in groupby(blocks, lambda block: isinstance(block, Plot)):
        if are_plots:
            yield f'<div class="plots">{"".join(image(plot.caption, plot.png) for plot in group)}</div>'
        else:
            yield from map(_html, group)


def _html(block: Heading | Table | str) -> str:
    if isinstance(block, Heading):
        return f"<h2>{escape(block.text)}</h2>"
    if isinstance(block, Table):
        lines = [_row("th", block.head), *(_row("td", row) for row in block.rows)]
        return f"<div class='scroll'><table>{''.join(lines)}</table></div>"
    return f"<p>{escape(block)}</p>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
