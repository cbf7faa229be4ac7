"""Figures that the GRAM paper (arXiv 2506.14175) prints, with their place, to stand beside ours. Accuracies in percent.

Only tables and sentences are here: points of its plots that no sentence names are not read off, and a cell that is not
known is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Mapping, Optional

COLUMNS = {"in": "UniFeed", "out": "RewardBench", "hhh": "HHH-Alignment", "task": "the task"}
"""Our kind of test set -> the paper's set."""


@dataclass(frozen=True)
class Published:
    """A table or figure."""

    place: str
    rows: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Row -> {column: accuracy in percent}."""
    relative_to: Optional[str] = None
    """The rows are differences to this one, in points."""
    best: Mapping[str, float] = field(default_factory=dict)
    """Column -> the place on the axis that the paper names as the best."""
    remark: str = ""


def _rows(columns: tuple[str, ...], **systems: tuple[float, ...]) -> dict[str, dict[str, float]]:
    names = dict(
        d="D-Baseline", d_freeze="D + Freeze", d_reg="D + Regularization", g="G-Baseline", g_freeze="G + Freeze",
        g_ls="G + Label Smoothing", gram="GRAM",
    )  # fmt: skip
    return {names[system]: dict(zip(columns, values, strict=True)) for system, values in systems.items()}


_MAIN = ("in", "out", "hhh")

PUBLISHED: dict[str, Published] = {
    "table-1-8b": Published(
        "Table 1, LLaMA-3.1-8B-Instruct",
        _rows(
            _MAIN, d=(69.3, 74.1, 76.0), d_freeze=(66.6, 74.9, 77.5), d_reg=(72.7, 77.4, 79.7), g=(66.8, 80.0, 80.3),
            g_freeze=(65.4, 82.6, 80.1), g_ls=(67.9, 80.7, 79.5), gram=(70.4, 85.1, 85.4),
        ),
    ),
    "table-1-3b": Published(
        "Table 1, LLaMA-3.2-3B-Instruct",
        _rows(
            _MAIN, d=(68.3, 72.8, 76.1), d_freeze=(63.0, 70.5, 67.5), d_reg=(65.6, 71.2, 72.4), g=(65.3, 78.8, 77.2),
            g_freeze=(63.7, 76.8, 75.4), g_ls=(66.2, 79.0, 78.1), gram=(70.6, 83.6, 81.9),
        ),
    ),
    "table-2": Published(
        "Table 2, summarisation: 100k unlabelled pairs, 5k labels",
        {
            "in-domain": {"task": 74.7},
            "out-of-domain": {"task": 67.4},
            "general": {"task": 71.6},
            "none": {"task": 56.5},
        },
        remark="'none' is the paper's Vanilla RM, with 5k labels and no stage 1; it does not say whether it is discriminative.",
    ),
    "table-4": Published(
        "Table 4",
        {"GRAM-v1": {"out": -3.9}, "GRAM-v4": {"out": -1.9}},
        relative_to="GRAM",
        remark="The text names the drop of v1 as 3.9 points; its Table 5 (3B) gives 83.6 - 80.2 = 3.4.",
    ),
    "table-5": Published(
        "Table 5, LLaMA-3.2-3B-Instruct (first row: Table 1)",
        {
            "G-Baseline": {"in": 65.3, "out": 78.8},
            "G-Baseline, vanilla smoothing": {"in": 66.2, "out": 79.0},
            "G-Baseline, two-token smoothing": {"in": 66.7, "out": 80.2},
            "GRAM, no smoothing": {"in": 68.4, "out": 82.1},
            "GRAM, vanilla smoothing": {"in": 69.1, "out": 82.5},
            "GRAM": {"in": 70.6, "out": 83.6},
        },
    ),
    "figure-6": Published(
        "Figure 6", remark="The paper scales to 400k unlabelled pairs and names one point: 91.6 on RewardBench at the most."
    ),
    "figure-10": Published(
        "Figure 10",
        {"0.01": {"in": 71.9}, "0.1": {"out": 85.1}},
        best={"in": 0.01, "out": 0.1},
        remark="The text says that in-distribution accuracy improves from 0 to 0.1, and that it is best near 0.01.",
    ),
}
