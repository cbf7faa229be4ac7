"""The pairs of an evaluation, and a model's verdicts on them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Callable, Sequence

import numpy as np

from gram_engine.metrics import TieRule, correctness, mean, reward_of_first


@dataclass(frozen=True)
class EvalPair:
    """Two responses to judge. `preference` is 1 where a is better, 0 where b is, 1/2 for a tie."""

    prompt: str
    a: str
    b: str
    preference: float
    subset: str
    source_location: str
    """"file:line"."""
    numbers: tuple[int, int] = (0, 1)
    """Which of the row's responses a and b are."""
    num_correct: int = 1
    """How many of the row's responses, the first ones, are correct."""
    row_id: str = ""
    """The row's own id, in suites whose rows become several pairs."""

    @property
    def row(self) -> tuple[str, str]:
        """The same for all pairs of one row; several rows of a JSON array may lie on one line."""
        return self.source_location, self.row_id

    @property
    def size(self) -> int:
        """Characters, by which several processes share pairs out."""
        return len(self.prompt) + len(self.a) + len(self.b)


@dataclass(frozen=True)
class JudgedPairs:
    """Pairs with a model's verdicts in both orders."""

    pairs: Sequence[EvalPair]
    margins: np.ndarray
    """[pairs, 2] float64: Z_A - Z_B with a shown first, and with b shown first."""
    ties: TieRule = "half"
    """How the suite counts an even reward."""

    @cached_property
    def preference(self) -> np.ndarray:
        """[pairs] float64."""
        return np.array([pair.preference for pair in self.pairs])

    @cached_property
    def rewards(self) -> np.ndarray:
        """[pairs] Eq. 3, of a against b."""
        return reward_of_first(*self.margins.T)

    @cached_property
    def correctness(self) -> np.ndarray:
        """[pairs with a winner] 1 where the reward finds the better response, 0 where not, an even reward by the tie rule."""
        return correctness(self.rewards - 0.5, self.preference, self.ties)

    def accuracy(self) -> float:
        """Mean of `correctness`; nan of nothing."""
        return mean(self.correctness)

    def select(self, numbers: Sequence[int]) -> JudgedPairs:
        """The pairs of some numbers."""
        return JudgedPairs([self.pairs[number] for number in numbers], self.margins[numbers], self.ties)

    def by(self, key: Callable[[EvalPair], Any]) -> dict[Any, JudgedPairs]:
        """The pairs grouped by a key, in the order in which the keys first occur."""
        groups: dict[Any, list[int]] = {}
        for number, pair in enumerate(self.pairs):
            groups.setdefault(key(pair), []).append(number)
        return {name: self.select(numbers) for name, numbers in groups.items()}
