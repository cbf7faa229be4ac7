"""The pairs of an evaluation, and a model's verdicts on them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Callable, Sequence

import numpy as np

from gram_engine.metrics import TieRule, accuracy_interval, correctness, mean, reward_of_first


@dataclass(frozen=True, kw_only=True)
class LabelledPair:
    """What figures need of two responses a and b: the label, and where the pair belongs, without the texts."""

    preference: float
    """1 where a is better, 0 where b is, 1/2 for a tie."""
    subset: str
    row: int = 0
    """Number of the row in the files; rows of some suites become several pairs."""
    numbers: tuple[int, int] = (0, 1)
    """Which of the row's responses a and b are."""
    num_correct: int = 1
    """How many of the row's responses, the first ones, are correct."""
    row_id: str = ""
    """The row's own id, where the suite's figures depend on it."""

    @property
    def lengths(self) -> tuple[int, int]:
        """Characters of a and of b."""
        raise NotImplementedError


@dataclass(frozen=True)
class EvalPair(LabelledPair):
    """A pair to judge."""

    prompt: str
    a: str
    b: str
    source_location: str
    """"file:line"."""

    @property
    def lengths(self) -> tuple[int, int]:
        """Characters of a and of b."""
        return len(self.a), len(self.b)

    @property
    def size(self) -> int:
        """Characters, by which several processes share pairs out."""
        return len(self.prompt) + len(self.a) + len(self.b)


@dataclass(frozen=True)
class JudgedPairs:
    """Pairs with a model's verdicts in both orders."""

    pairs: Sequence[LabelledPair]
    margins: np.ndarray
    """[pairs, 2] float64: Z_A - Z_B with a shown first, and with b shown first."""
    ties: TieRule = "half"
    """How the suite counts an even reward."""

    @cached_property
    def preference(self) -> np.ndarray:
        """[pairs] float64."""
        return np.array([pair.preference for pair in self.pairs])

    @cached_property
    def has_winner(self) -> np.ndarray:
        """[pairs] bool: whether the label prefers one of the responses."""
        return self.preference != 0.5

    @cached_property
    def rewards(self) -> np.ndarray:
        """[pairs] Eq. 3, of a against b."""
        return reward_of_first(*self.margins.T)

    @cached_property
    def correctness(self) -> np.ndarray:
        """[pairs with a winner] 1 where the reward finds the better response, 0 where not, an even reward by the tie rule."""
        return correctness(self.rewards - 0.5, self.preference, self.ties)

    @cached_property
    def rows(self) -> np.ndarray:
        """[pairs with a winner] number of the row that each comes from."""
        return np.array([pair.row for pair in self.pairs], dtype=int)[self.has_winner]

    @cached_property
    def length_differences(self) -> np.ndarray:
        """[pairs] characters by which a is longer than b."""
        return np.array([pair.lengths[0] - pair.lengths[1] for pair in self.pairs])

    @cached_property
    def better_is_longer_by(self) -> np.ndarray:
        """[pairs with a winner] characters by which the better response is longer."""
        return (self.length_differences * np.sign(self.preference - 0.5))[self.has_winner]

    def accuracy(self) -> float:
        """Mean of `correctness`; nan of nothing."""
        return mean(self.correctness)

    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy; (nan, nan) of nothing."""
        return accuracy_interval(self.correctness, self.rows)

    def select(self, numbers: Sequence[int]) -> JudgedPairs:
        """The pairs of some numbers."""
        return JudgedPairs([self.pairs[number] for number in numbers], self.margins[numbers], self.ties)

    def by(self, key: Callable[[LabelledPair], Any]) -> dict[Any, JudgedPairs]:
        """The pairs grouped by a key, in the order in which the keys first occur."""
        groups: dict[Any, list[int]] = {}
        for number, pair in enumerate(self.pairs):
            groups.setdefault(key(pair), []).append(number)
        return {name: self.select(numbers) for name, numbers in groups.items()}
