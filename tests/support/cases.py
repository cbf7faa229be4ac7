"""Cases of a parametrised test that `make test` leaves to `make test-long`."""

from __future__ import annotations

from typing import Iterable

import pytest


def short_first(short: Iterable, every: Iterable) -> list:
    """Parameters for `pytest.mark.parametrize`: the cases of `short`, then the others of `every`, marked `long`.

    A case is a value, or a tuple of values where there are several arguments.
    """
    short = list(short)
    others = [case for case in every if case not in short]
    return [*short, *(pytest.param(*case if isinstance(case, tuple) else (case,), marks=pytest.mark.long) for case in others)]
