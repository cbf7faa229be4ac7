"""One outcome for all processes: what one of them cannot do, none goes on with."""

from __future__ import annotations

from typing import Callable, TypeVar

import torch.distributed as dist

from gram_engine.errors import CheckpointError, GramError

T = TypeVar("T")


def shared(value: T) -> list[T]:
    """Every process's value, by rank. Every process must call it, here as below."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(act: Callable[[], T], failure: str, remedy: str = "") -> T:
    """Each process's own act(), unless it failed in one of them: then that error everywhere.

    Raises:
        GramError: what act() raised; an OSError becomes a CheckpointError "failure: error. remedy".
    """
    result, error = _attempt(act, failure, remedy)
    _raise_first(shared(error))
    return result


def from_main(act: Callable[[], T], failure: str, remedy: str = "") -> T:
    """act() of the main process alone; its result, or its error as in `together`, is every process's."""
    outcome = [_attempt(act, failure, remedy) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(outcome)
    _raise_first([outcome[0][1]])
    return outcome[0][0]


def _attempt(act: Callable[[], T], failure: str, remedy: str) -> tuple[T | None, GramError | None]:
    try:
        return act(), None
    except GramError as error:
        return None, error
    except OSError as error:
        return None, CheckpointError(f"{failure}: {error}. {remedy}".rstrip())


def _raise_first(errors: list[GramError | None]) -> None:
    for error in errors:
        if error is not None:
            raise error
