"""Collective calls with one outcome for all processes: if an action fails on one rank, every rank raises its error.

Every process must call each of these functions.
"""

from __future__ import annotations

from typing import Callable, TypeVar

import torch.distributed as dist

from gram_engine.errors import CheckpointError, GramError

T = TypeVar("T")


def all_gather(value: T) -> list[T]:
    """The value of every process, ordered by rank."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_on_any_rank(act: Callable[[], T], failure: str, remedy: str = "", error: type[GramError] = CheckpointError) -> T:
    """Run act() on every rank. Returns its result on this rank, or raises on all ranks the error of the first that failed.

    Raises:
        GramError: what act() raised; an OSError becomes `error` with the text "failure: OSError. remedy".
    """
    result, problem = _attempt(act, failure, remedy, error)
    _raise_first(all_gather(problem))
    return result


def run_on_rank0(act: Callable[[], T], failure: str, remedy: str = "", error: type[GramError] = CheckpointError) -> T:
    """Run act() on rank 0 alone. Returns its result on every rank, or raises its error on all, as `raise_on_any_rank` does."""
    outcome = [_attempt(act, failure, remedy, error) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(outcome)
    result, problem = outcome[0]
    _raise_first([problem])
    return result


def _attempt(
    act: Callable[[], T], failure: str, remedy: str, error: type[GramError]
) -> tuple[T | None, GramError | None]:
    try:
        return act(), None
    except GramError as problem:
        return None, problem
    except OSError as problem:
        return None, error(f"{failure}: {problem}. {remedy}".rstrip())


def _raise_first(problems: list[GramError | None]) -> None:
    for problem in problems:
        if problem is not None:
            raise problem
