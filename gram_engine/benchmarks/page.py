"""One page of all committed results: a table of each file and, where rows have a baseline, a plot of their speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gram_engine.benchmarks.measure import Row, table
from gram_engine.files import write_atomically

FOLDER = Path(__file__).parents[2] / "tools" / "benchmarks"
RESULTS = FOLDER / "results"
PAGE = FOLDER / "results.md"
BLUE, GREY = "#2f6fb5", "#8a8f98"


def main() -> None:
    """Write the page anew: `python -m gram_engine.benchmarks.page`."""
    print(write_page())


def write_page(folder: Path = FOLDER) -> Path:
    """tools/benchmarks/results.md and its plots, from results/*.json (GPUs, the newest first) and *.json (CPUs)."""
    gpu = sorted((folder / "results").glob("*.json"), reverse=True)
    made = "Made by `python -m gram_engine.benchmarks.page` from the JSON files beside it."
    lines = ["# Results", "", made, "", "## GPUs", ""]
    if not gpu:
        lines += ["No GPU has run these yet: `bash tools/gpu_check.sh` measures them, and writes them here.", ""]
    for heading, paths in (("", gpu), ("## CPUs", sorted(folder.glob("*.json")))):
        lines += [heading, ""] if heading else []
        for path in paths:
            lines += _section(path, folder)
    with write_atomically(folder / PAGE.name) as handle:
        handle.write("\n".join(lines).rstrip() + "\n")
    return folder / PAGE.name


def write_page_of(results: Path) -> Path:
    """A page of one results file, beside it."""
    page = results.with_suffix(".md")
    with write_atomically(page) as handle:
        handle.write("\n".join(_section(results, results.parent)).rstrip() + "\n")
    return page


def _section(path: Path, folder: Path) -> list[str]:
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = [Row(**row) for row in content["rows"] if "benchmark" in row]
    if not rows and "steps" not in content:
        return []
    lines = [f"### {path.stem}", "", _origin(content), ""]
    for step in content.get("steps", []):
        told = step.get("summary") or f"exit status {step['exit_status']}"
        lines.append(f"- {step['name']}: {told}" + (f" (`{step['command']}`)" if "command" in step else ""))
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
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    command = f" `python tools/{content['command']}`" if "command" in content else ""
    offline = " With the packages that the machine had (`--offline`)." if content.get("offline") else ""
    return f"{content['date'][:10]}. {machine}{versions}.{command}{offline}"


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
    main()
