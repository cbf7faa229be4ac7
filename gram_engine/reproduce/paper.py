"""Results that the GRAM paper prints (paper.yaml), for comparison with ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Mapping, Optional

from gram_engine.files import read_yaml

COLUMNS = {"in": "UniFeed", "out": "RewardBench", "hhh": "HHH-Alignment", "task": "the task"}
"""Kind of our evaluation set -> the paper's test set."""


@dataclass(frozen=True)
class Published:
    """A table or figure of the paper."""

    source: str
    rows: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Row -> {column: accuracy in percent}."""
    relative_to: Optional[str] = None
    """The rows are differences to this row, in points."""
    best: Mapping[str, float] = field(default_factory=dict)
    """Column -> the x that the paper names as the best."""
    remark: str = ""


PUBLISHED: dict[str, Published] = {
    key: Published(**entry) for key, entry in read_yaml(Path(__file__).with_suffix(".yaml")).items()
}
