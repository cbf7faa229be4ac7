"""Measurements as rows: in a printed table, in a JSON file, and on the page of all committed results.

`python -m gram_engine.benchmarks.results` writes that page, tools/benchmarks/results.md, from the JSON files beside it.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from gram_engine.files import write_atomically, write_json
from gram_engine.log import is_main_process

FOLDER = Path(__file__).parents[2] / "tools" / "benchmarks"
RESULTS = FOLDER / "results"
PAGE = FOLDER / "results.md"
BLUE, GREY = "#2f6fb5", "#8a8f98"
MEMORY_FLOOR = 1 << 20
"""Bytes. Less cannot be measured reliably on a CPU: in ratios, a smaller peak counts as this much."""


@dataclass
class Row:
    """One measurement. Ratios are the baseline's figure divided by this one's (above 1: faster, or smaller)."""

    benchmark: str
    name: str
    shape: dict[str, int]
    dtype: str
    device: str
    median_ms: float
    repeats: int
    peak_bytes: int | None
    baseline: str
    time_ratio: float | None = None
    memory_ratio: float | None = None
    note: str = ""
    figures: dict[str, float] = field(default_factory=dict)


def add_ratios(rows: list[Row]) -> None:
    """Fill in the ratios of one benchmark's rows; the baseline is the row with the name that they give."""
    by_name = {row.name: row for row in rows}
    for row in rows:
        base = by_name.get(row.baseline)
        if base is None:
            continue
        row.time_ratio = base.median_ms / row.median_ms
        if row.peak_bytes is not None and base.peak_bytes is not None:
            row.memory_ratio = max(base.peak_bytes, MEMORY_FLOOR) / max(row.peak_bytes, MEMORY_FLOOR)


def table(rows: list[Row]) -> str:
    """The rows as text, with a heading for each benchmark, shape and dtype."""
    lines: list[str] = []
    heading = None
    for row in rows:
        shape = ", ".join(f"{name} {value:,}" for name, value in row.shape.items())
        if (row.benchmark, shape, row.dtype) != heading:
            heading = (row.benchmark, shape, row.dtype)
            lines += ["", f"{row.benchmark}: {shape}, {row.dtype}, {row.device} (ratios to {row.baseline})"]
            lines += [f"  {'':44}{'median':>13}{'peak memory':>14}{'speed':>10}{'memory':>10}"]
        memory = "-" if row.peak_bytes is None else _bytes(row.peak_bytes)
        lines += [
            f"  {row.name:44}{_time(row.median_ms):>13}{memory:>14}{_ratio(row.time_ratio):>10}{_ratio(row.memory_ratio):>10}"
            f"{'  ' + row.note if row.note else ''}"
        ]
    return "\n".join(lines[1:])


def _time(milliseconds: float) -> str:
    return f"{milliseconds:,.3f} ms" if milliseconds < 100 else f"{milliseconds:,.0f} ms"


def _bytes(count: int) -> str:
    return "< 1 MiB" if count < MEMORY_FLOOR else f"{count / 2**20:,.0f} MiB"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:,.2f}x" if ratio < 100 else f"{ratio:,.0f}x"


def write_rows(path: str | Path | None, rows: list, **more: Any) -> None:
    """Write rows (dataclasses), date, command, package versions and the keys of `more`; only on the main process.

    Args:
        path: None writes nothing.
    """
    if path is None or not is_main_process():
        return
    content = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["gram", *sys.argv[1:]]),
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
        **more,
    }
    write_json(path, content)


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that matter for speed."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    for package in ("megatron-core", "triton", "transformer-engine", "flash-attn", "liger-kernel"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_page(folder: Path = FOLDER) -> Path:
    """Write results.md and its plots from results/*.json (GPUs, the newest first) and *.json (CPUs); returns its path."""
    gpu = sorted((folder / "results").glob("*.json"), reverse=True)
    made = "Made by `python -m gram_engine.benchmarks.results` from the JSON files beside it."
    lines = ["# Results", "", made, "", "## GPUs", ""]
    if not gpu:
        lines += ["No GPU has run these yet: `bash tools/gpu_check.sh` measures them, and writes them here.", ""]
    for heading, paths in (("", gpu), ("## CPUs", sorted(folder.glob("*.json")))):
        lines += [heading, ""] if heading else []
        for path in paths:
            lines += _section(path, folder)
    return _write_lines(folder / PAGE.name, lines)


def write_page_of(results: Path) -> Path:
    """Write a page of one results file beside it; returns its path."""
    return _write_lines(results.with_suffix(".md"), _section(results, results.parent))


def _write_lines(page: Path, lines: list[str]) -> Path:
    with write_atomically(page) as handle:
        handle.write("\n".join(lines).rstrip() + "\n")
    return page


def _section(path: Path, folder: Path) -> list[str]:
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = [Row(**row) for row in content["rows"] if "benchmark" in row]
    if not rows and "steps" not in content:
        return []
    lines = [f"### {path.stem}", "", _origin(content), ""]
    for step in content.get("steps", []):
        outcome = step.get("summary") or f"exit status {step['exit_status']}"
        lines.append(f"- {step['name']}: {outcome}" + (f" (`{step['command']}`)" if "command" in step else ""))
    lines += ["", "```", table(rows), "```", ""] if rows else [""]
    if content.get("skipped"):
        lines += ["Skipped, left out, or other than pinned:", ""]
        lines += [f"- {part['what']}: {part['why']}" for part in content["skipped"]] + [""]
    compared = [row for row in rows if row.time_ratio is not None and row.name != row.baseline]
    if compared:
        plot = folder / "plots" / f"{path.stem}.png"
        _plot(compared, plot)
        lines += [f"![times as fast as the baseline]({plot.relative_to(folder)})", ""]
    return lines


def _origin(content: dict[str, Any]) -> str:
    machine = f"{content['gpu']}, driver {content['driver']}. " if "gpu" in content else ""
    packages = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    command = f" `{content['command']}`" if "command" in content else ""
    offline = " With the packages that the machine had (`--offline`)." if content.get("offline") else ""
    return f"{content['date'][:10]}. {machine}{packages}.{command}{offline}"


def _plot(rows: list[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.32 * len(rows) + 1), dpi=110, layout="constrained")
    axes = figure.subplots()
    names = [f"{row.benchmark}: {row.name.strip()}" for row in rows]
    bars = axes.barh(range(len(rows)), [row.time_ratio for row in rows], color=BLUE)
    axes.bar_label(bars, [f"{row.time_ratio:.2f}x" for row in rows], padding=3, fontsize=8)
    axes.axvline(1, color=GREY, linewidth=0.8, linestyle="--")
    axes.set(yticks=range(len(rows)), xlabel="times as fast as the baseline", xscale="log")
    axes.set_yticklabels(names, fontsize=8)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    with write_atomically(path, "wb") as handle:
        figure.savefig(handle, format="png", metadata={"Software": None})


if __name__ == "__main__":
    print(write_page())
