"""A prefix tree of tokenized texts, so that shared prefixes are computed once.

Both orders of a pair share judge instruction and prompt; a list judged against one response shares that response too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Sequence

LEAST_SHARED = 16
"""Shorter common prefixes are computed for each text: a segment of its own would cost more."""


@dataclass
class TokenTree:
    """Segments of tokens, parents before children. A text is the concatenation of the segments on the path to its leaf."""

    tokens: list[list[int]] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    """Position of a segment's first token in its texts."""
    leaves: list[int] = field(default_factory=list)
    """The segment that ends text i."""

    @classmethod
    def of(cls, texts: Sequence[list[int]]) -> TokenTree:
        """The tree of some non-empty texts; leaves[i] belongs to texts[i]."""
        tree = cls()
        tree.add(texts)
        return tree

    @property
    def size(self) -> int:
        """Tokens to compute."""
        return sum(map(len, self.tokens))

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(self.starts[leaf] + len(self.tokens[leaf]) for leaf in self.leaves)

    def texts(self) -> list[list[int]]:
        """The texts, each from its beginning."""
        return [[token for part in self.path(leaf) for token in self.tokens[part]] for leaf in self.leaves]

    def add(self, texts: Sequence[list[int]]) -> None:
        """Add texts; prefixes are shared among the new texts, not with those already in the tree."""
        first = len(self.leaves)
        self.leaves += [-1] * len(texts)
        order = sorted(range(len(texts)), key=texts.__getitem__)
        self._grow(texts, order, 0, -1, first)

    def path(self, segment: int) -> list[int]:
        """The segments of a text up to this one, from its beginning."""
        path = []
        while segment >= 0:
            path.append(segment)
            segment = self.parents[segment]
        return path[::-1]

    def _grow(self, texts: Sequence[list[int]], members: list[int], start: int, parent: int, first: int) -> None:
        """Add members (numbers of texts, sorted by tokens, with a common prefix of `start` tokens) below `parent`."""
        low, high = texts[members[0]], texts[members[-1]]
        shared = _common(low, high, start)
        if len(members) > 1 and shared - start >= LEAST_SHARED:
            parent, start = self._segment(low[start:shared], parent, start), shared
        run: list[int] = []
        for member in members:
            if run and _common(texts[run[0]], texts[member], start) - start < LEAST_SHARED:
                self._finish(texts, run, start, parent, first)
                run = []
            run.append(member)
        self._finish(texts, run, start, parent, first)

    def _finish(self, texts: Sequence[list[int]], run: list[int], start: int, parent: int, first: int) -> None:
        if len(run) > 1:
            self._grow(texts, run, start, parent, first)
        else:
            self.leaves[first + run[0]] = self._segment(texts[run[0]][start:], parent, start)

    def _segment(self, tokens: list[int], parent: int, start: int) -> int:
        self.tokens.append(tokens)
        self.parents.append(parent)
        self.starts.append(start)
        return len(self.tokens) - 1


def _common(one: list[int], other: list[int], start: int) -> int:
    """Length of the common prefix, less than either text's length: every text keeps a last token of its own."""
    most = min(len(one), len(other)) - 1
    for place in range(start, most):
        if one[place] != other[place]:
            return place
    return max(most, start)
