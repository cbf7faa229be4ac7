"""Computes with gram_engine what other programs found, and prints one table of all.

usage: python tools/peers/compare.py FOLDER NAME ...     exit status 1 if a program failed or a number differs
"""

from __future__ import annotations

import json
import sys
from datetime import date
from functools import cache
from pathlib import Path

import numpy as np

from gram_engine.scoring.scorer import RewardModelScorer

TOLERANCE = 1e-4
"""Largest difference of a reward or margin, all in float32."""


@cache
def scorer(folder: Path) -> RewardModelScorer:
    return RewardModelScorer.from_pretrained(folder, dtype="float32", device="cpu")


def ours(folder: Path, texts: list[list[str]]) -> np.ndarray:
    """Margins of (prompt, a, b), or rewards of (prompt, response)."""
    if len(texts[0]) == 3:
        return scorer(folder).margins(map(tuple, texts))
    return np.array([scorer(folder).reward(*text) for text in texts])


def judged(folder: Path, row: dict) -> tuple[str, bool]:
    """The last cells of a row: largest difference of how many numbers, and whether it is small enough."""
    if "error" in row:
        return f"| | {row['error'].replace('|', '/')} |", False
    wanted = ours(folder / "exports" / row["export"], row["texts"])
    difference = float(np.abs(np.array(row["found"]) - wanted).max())
    ok = difference <= TOLERANCE
    return f"| {difference:.1e} of {len(wanted)} numbers up to {np.abs(wanted).max():.2g} | {'ok' if ok else 'DIFFERS'} |", ok


def main() -> int:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    lines = [f"{date.today()}, float32, tolerance {TOLERANCE:g}:\n"]
    lines += ["| program | export | what it ran | largest difference | |", "|---|---|---|---|---|"]
    all_ok = True
    for name in names:
        file = folder / "results" / f"{name}.json"
        rows = json.loads(file.read_text()) if file.is_file() else []
        if not rows:
            lines.append(f"| {name} | | | | did not run: see {name}.log |")
        for row in rows:
            cells, ok = judged(folder, row)
            lines.append(f"| {row['tool']} {row['version']} | {row['export']} | {row['what']} {cells}")
            all_ok &= ok
        all_ok &= bool(rows)
    table = "\n".join(lines) + "\n"
    (folder / "table.md").write_text(table)
    print(table, end="")
    return 0 if all_ok else 1


if __name__ == "__main__":
    sys.exit(main())
