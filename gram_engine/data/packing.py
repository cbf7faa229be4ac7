"""Assigns samples to packs, and packs to data-parallel processes: pure functions of the lengths.

The cost of a sample is its tokens plus a share of its squared length (attention), so that the packs that run at the same time
take equally long, instead of having equally many tokens.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from typing import Optional, Sequence

import numpy as np


def sample_costs(lengths: np.ndarray, attention_cost: float) -> np.ndarray:
    """Cost of each sample in units of one token's linear layers, [n] float64."""
    lengths = np.asarray(lengths, dtype=np.float64)
    return lengths + attention_cost * lengths**2


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs of at most `capacity` tokens by best-fit decreasing, each a list of indices into `lengths`.

    Raises:
        ValueError: a length exceeds the capacity.
    """
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, pack), sorted
    for index in _decreasing(lengths):
        length = int(lengths[index])
        if length > capacity:
            raise ValueError(f"a sample of {length} tokens does not fit into a pack of {capacity}")
        smallest = bisect_left(free, (length, -1))
        if smallest == len(free):
            packs.append([index])
            insort(free, (capacity - length, len(packs) - 1))
        else:
            room, pack = free.pop(smallest)
            packs[pack].append(index)
            insort(free, (room - length, pack))
    return packs


def balanced_packs(lengths: Sequence[int], costs: Sequence[float], capacity: int, num_packs: int) -> Optional[list[list[int]]]:
    """Exactly `num_packs` packs of about equal cost, each within `capacity`; None if the greedy rule finds no room.

    Samples are placed in the order of decreasing cost, each into the cheapest pack that has room for it.
    """
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    heap = [(0.0, pack, capacity) for pack in range(num_packs)]
    for index in _decreasing(costs):
        full = []
        while heap and heap[0][2] < lengths[index]:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, pack, room = heapq.heappop(heap)
        packs[pack].append(index)
        heapq.heappush(heap, (cost + float(costs[index]), pack, room - int(lengths[index])))
        for entry in full:
            heapq.heappush(heap, entry)
    return packs


def assign_to_ranks(pack_costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Packs of each rank: equally many (`num_ranks` must divide their number), of about equal total cost, costliest first."""
    per_rank, rest = divmod(len(pack_costs), num_ranks)
    assert rest == 0, "the number of packs must be a multiple of the number of ranks"
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    for pack in _decreasing(pack_costs):
        rank = min((r for r in range(num_ranks) if len(ranks[r]) < per_rank), key=lambda r: (totals[r], r))
        ranks[rank].append(pack)
        totals[rank] += float(pack_costs[pack])
    return ranks


def pack_for_ranks(
    lengths: np.ndarray, capacity: int, num_ranks: int, multiple: int, attention_cost: float
) -> list[list[list[int]]]:
    """Packs of every rank, [num_ranks][packs] lists of indices into `lengths`; a pack may be empty.

    Every rank has the same number of packs, which is a multiple of `multiple`.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    costs = sample_costs(lengths, attention_cost)
    tight = best_fit_decreasing(lengths, capacity)
    unit = num_ranks * multiple
    num_packs = max(1, -(-len(tight) // unit)) * unit
    packs = balanced_packs(lengths, costs, capacity, num_packs)
    if packs is None:
        packs = tight + [[] for _ in range(num_packs - len(tight))]
    ranks = assign_to_ranks([sum(costs[index] for index in pack) for pack in packs], num_ranks)
    return [[sorted(packs[pack]) for pack in rank] for rank in ranks]


def _decreasing(values: Sequence[float]) -> list[int]:
    """Indices from the largest value to the smallest; equal values keep their order."""
    return np.argsort(-np.asarray(values, dtype=np.float64), kind="stable").tolist()
