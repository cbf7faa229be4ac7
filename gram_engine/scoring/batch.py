"""A token tree as one packed sequence on the device, for the forward passes of judge_model.py and transformers_model.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gram_engine.errors import CheckpointError
from gram_engine.kernels.attention import AttentionBounds, to_device
from gram_engine.scoring.token_tree import TokenTree


class Batch(NamedTuple):
    """Token trees packed one after the other, on the device."""

    tokens: Tensor
    """[tokens] int64."""
    positions: Tensor
    """[tokens] int64, position of each token in its text."""
    last: Tensor
    """[texts] int64: the row of each text's last token."""
    attention: AttentionBounds
    """Queries: the tokens of each segment; keys: its path, which ends with the segment."""
    last_attention: AttentionBounds
    """Queries: the last token of each text; keys: the text."""

    @classmethod
    def of(cls, tree: TokenTree, device: torch.device) -> Batch:
        """The tree's segments one after the other."""
        sizes = torch.tensor([len(tokens) for tokens in tree.tokens])
        ends = sizes.cumsum(0)[tree.leaves]
        rows = list(torch.arange(tree.size).split(sizes.tolist()))
        paths = [torch.cat([rows[part] for part in tree.path(segment)]) for segment in range(len(rows))]
        positions = [torch.arange(start, start + len(part)) for start, part in zip(tree.starts, tree.tokens, strict=True)]
        return cls(
            tokens=to_device(torch.tensor([token for part in tree.tokens for token in part]), device),
            positions=to_device(torch.cat(positions), device),
            last=to_device(ends - 1, device),
            attention=_attention(sizes, paths).to(device),
            last_attention=_attention(torch.ones_like(ends), [paths[leaf] for leaf in tree.leaves]).to(device),
        )


def finite(tensor: Tensor, what: str) -> Tensor:
    """The tensor; CheckpointError if it holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{what} holds NaN or infinity. Export another checkpoint.")
    return tensor


def _attention(queries: Tensor, paths: list[Tensor]) -> AttentionBounds:
    """Bounds from the number of queries [sequences] and the rows of the keys of each sequence."""
    return AttentionBounds.of_rows(queries, torch.tensor([len(path) for path in paths]), torch.cat(paths))
