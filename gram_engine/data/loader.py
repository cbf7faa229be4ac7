"""Packed micro-batches of a data set, for every data-parallel process: a pure function of (seed, samples consumed).

Each step packs its own global batch of `global_batch_size` samples, so neither the number of processes nor a restart
changes which samples a step sees. Padding is added only at the end
of a pack, up to `pad_multiple`, and with context parallelism at the end of each sample, up to `sequence_multiple`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Iterator, Literal

import numpy as np
import torch

from gram_engine.data.dataset import PairDataset
from gram_engine.data.packing import pack_for_ranks
from gram_engine.errors import ConfigError
from gram_engine.kernels.attention import AttentionBounds

PADDING_TOKEN = 0
ATTENTION_COST = 1 / 24576
"""Cost of attention over L tokens is L^2 times this, in units of one token's linear layers: 1 / (12 x hidden size of 2,048)."""


@dataclass
class PackedBatch:
    """One micro-batch: samples packed end to end (THD), on the CPU. Padding at the end is a sequence of its own.

    tokens, position_ids: int64 [tokens].
    cu_seqlens: int32 [sequences + 1].
    rows: int64 [rows], positions whose hidden state predicts. Stage 1: position p predicts token p + 1. Stage 2: the last
        token of each sample. Bradley-Terry: for each sample the last token of [x, y_a], then that of [x, y_b].
    targets: int64 [rows] in stage 1, otherwise empty.
    sample_ids: int64 [samples], numbers of the samples in the data set.
    preference, weight, margin: fp32 [samples], as in the data set, but weights are scaled to a mean of 1 over the global batch.
    attention, label_attention: the keys that each token and each label row sees; training/microbatches.py sets them.
    sft_rows, sft_targets: int64 [n], sft_weight: fp32 [n], with --sft-loss-weight: positions in the better responses, the
        tokens that they predict, and their weights.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    rows: torch.Tensor
    targets: torch.Tensor
    sample_ids: torch.Tensor
    preference: torch.Tensor
    weight: torch.Tensor
    margin: torch.Tensor
    attention: AttentionBounds | None = None
    label_attention: AttentionBounds | None = None
    sft_rows: torch.Tensor | None = None
    sft_targets: torch.Tensor | None = None
    sft_weight: torch.Tensor | None = None


@dataclass
class GlobalBatch:
    """This process's micro-batches of one step, as many as every process has, and totals of the step over all processes.

    num_rows: positions for which the output layer is computed.
    squared_lengths: sum over sequences of the square of their length.
    sample_ids: int64 [samples], numbers in the data set, the same on every process.
    is_placed: whether the micro-batches are on the device, in the form that this process runs (training/microbatches.py).
    """

    microbatches: list[PackedBatch]
    num_samples: int
    num_tokens: int
    num_rows: int
    squared_lengths: int
    sample_ids: np.ndarray
    is_placed: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longest micro-batch."""
        return max(len(microbatch.tokens) for microbatch in self.microbatches)


class PackedLoader:
    """Packs global batches of a data set.

    Args:
        pack_tokens: maximum number of tokens of samples in a micro-batch.
        pad_multiple: the length of a micro-batch is padded to a multiple of this, which is a multiple of `sequence_multiple`.
        sequence_multiple: every sample is padded at its end to a multiple of this.
        microbatch_multiple: the number of micro-batches is a multiple of this (pipeline size with virtual stages).
        response_loss, marker_loss: stage 1, which tokens of the target carry loss.
        sft: bradley-terry, whether batches list the tokens of the better response.
        attention_cost: see packing.sample_costs.

    Raises:
        ConfigError: a sample is longer than a pack.
    """

    def __init__(
        self,
        dataset: PairDataset,
        *,
        global_batch_size: int,
        pack_tokens: int,
        pad_multiple: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        sequence_multiple: int = 1,
        microbatch_multiple: int = 1,
        response_loss: Literal["both", "a", "b"] = "both",
        marker_loss: bool = True,
        sft: bool = False,
        attention_cost: float = ATTENTION_COST,
    ) -> None:
        self._padded_lengths = -(-dataset.lengths // sequence_multiple) * sequence_multiple
        longest = int(self._padded_lengths.max(initial=0))
        if longest > pack_tokens:
            raise ConfigError(
                f"{dataset.prefix} has a sample of {longest} tokens, but a micro-batch holds {pack_tokens}. "
                f"Raise --seq-length or --micro-batch-size, or preprocess with --seq-length {pack_tokens}."
            )
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.pack_tokens = pack_tokens
        self.pad_multiple = pad_multiple
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.seed = seed
        self.microbatch_multiple = microbatch_multiple
        self.attention_cost = attention_cost
        self._loss_ranges = _loss_ranges(dataset, response_loss, marker_loss)
        self._sft_ranges = _better_responses(dataset) if sft else []
        self._num_rows = sum(np.maximum(end - start, 0) for start, end, *_ in self._sft_ranges or self._loss_ranges)
        self._squares = (dataset.parts**2).sum(axis=1)
        # Of the last two epochs, because a batch may span both.
        self._permutation = lru_cache(maxsize=2)(self._new_permutation)

    def batch(self, consumed_samples: int) -> GlobalBatch:
        """The global batch after `consumed_samples` samples; every epoch is a new permutation of the data set."""
        numbers = np.arange(consumed_samples, consumed_samples + self.global_batch_size)
        epochs, places = np.divmod(numbers, len(self.dataset))
        ids = [self._permutation(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return self._global_batch(np.concatenate(ids))

    def evaluation_batches(self) -> Iterator[GlobalBatch]:
        """Global batches of every sample once, in order; the last batch may be smaller."""
        for start in range(0, len(self.dataset), self.global_batch_size):
            yield self._global_batch(np.arange(start, min(start + self.global_batch_size, len(self.dataset))))

    def totals(self) -> tuple[int, int, int]:
        """Of the whole data set: tokens, rows for which the output layer is computed, sum of squared lengths."""
        return int(self.dataset.lengths.sum()), int(self._num_rows.sum()), int(self._squares.sum())

    def _new_permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))

    def _global_batch(self, ids: np.ndarray) -> GlobalBatch:
        lengths = self.dataset.lengths[ids]
        total_weight = float(self.dataset.samples["weight"][ids].astype(np.float64).sum())
        scale = len(ids) / total_weight if total_weight > 0 else 0.0
        return GlobalBatch(
            microbatches=[self._pack(ids[pack], scale) for pack in self.packs(self._padded_lengths[ids])],
            num_samples=len(ids),
            num_tokens=int(lengths.sum()),
            num_rows=int(self._num_rows[ids].sum()),
            squared_lengths=int(self._squares[ids].sum()),
            sample_ids=ids,
        )

    def packs(self, lengths: np.ndarray) -> list[list[int]]:
        """This process's packs of a global batch, each a list of indices into `lengths`."""
        every = pack_for_ranks(lengths, self.pack_tokens, self.dp_size, self.microbatch_multiple, self.attention_cost)
        return every[self.dp_rank]

    def _pack(self, ids: np.ndarray, weight_scale: float) -> PackedBatch:
        starts = np.concatenate([[0], np.cumsum(self._padded_lengths[ids])]).astype(np.int64)
        used = int(starts[-1])
        size = max(1, -(-used // self.pad_multiple)) * self.pad_multiple
        tokens = np.full(size, PADDING_TOKEN, np.int64)
        for start, sample in zip(starts, ids):
            sequence = self.dataset.tokens(sample)
            tokens[start : start + len(sequence)] = sequence
        bounds = np.append(self._sequence_starts(ids, starts), used)
        cu_seqlens = bounds if used == size else np.append(bounds, size)
        position_ids = np.arange(size) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
        rows = self._rows(ids, starts)
        targets = tokens[rows + 1] if self.dataset.manifest.task.text == "generate" else np.empty(0, np.int64)
        facts = self.dataset.samples[ids]
        return PackedBatch(
            tokens=torch.from_numpy(tokens),
            position_ids=torch.from_numpy(position_ids),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            max_seqlen=int(np.diff(cu_seqlens).max()),
            rows=torch.from_numpy(rows),
            targets=torch.from_numpy(targets),
            sample_ids=torch.from_numpy(np.asarray(ids, np.int64)),
            preference=torch.from_numpy(facts["preference"].copy()),
            weight=torch.from_numpy((facts["weight"] * weight_scale).astype(np.float32)),
            margin=torch.from_numpy(facts["margin"].copy()),
            **(self._sft(ids, starts, tokens, weight_scale) if self._sft_ranges else {}),
        )

    def _sequence_starts(self, ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Start positions of the sequences in a pack, int64 [sequences]."""
        parts = self.dataset.parts[ids]
        return (starts[:-1, None] + parts.cumsum(axis=1) - parts).flatten()

    def _sft(self, ids: np.ndarray, starts: np.ndarray, tokens: np.ndarray, weight_scale: float) -> dict[str, torch.Tensor]:
        """sft_rows, sft_targets and sft_weight of a pack."""
        ranges = [
            (np.arange(begin[sample], end[sample]) + start, share[sample])
            for sample, start in zip(ids, starts)
            for begin, end, share in self._sft_ranges
        ]
        rows = np.concatenate([np.empty(0, np.int64), *(positions for positions, _ in ranges)]).astype(np.int64)
        weight = np.concatenate([np.empty(0), *(np.full(len(positions), share) for positions, share in ranges)])
        return dict(
            sft_rows=torch.from_numpy(rows),
            sft_targets=torch.from_numpy(tokens[rows + 1]),
            sft_weight=torch.from_numpy((weight * weight_scale).astype(np.float32)),
        )

    def _rows(self, ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Positions in the pack whose hidden state predicts, ascending, int64 [rows]."""
        ranges = [
            np.arange(begin[sample], end[sample]) + start
            for sample, start in zip(ids, starts)
            for begin, end in self._loss_ranges
        ]
        return np.concatenate([np.empty(0, np.int64), *ranges]).astype(np.int64)


def _loss_ranges(
    dataset: PairDataset, response_loss: str, marker_loss: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ranges of positions that predict, as [(first [samples], end [samples]), ...]; a position is one before its target."""
    facts, lengths = dataset.samples, dataset.lengths
    if dataset.manifest.task.text != "generate":
        ends = dataset.parts.cumsum(axis=1)
        return [(end - 1, end) for end in ends.T]
    names = ["target_start", "a_start", "a_end", "middle", "b_start", "b_end"]
    at = {name: facts[name].astype(np.int64) for name in names}
    partial = response_loss != "both" or not marker_loss
    if partial and (at["middle"] < 0).any():
        number = int(np.argmax(at["middle"] < 0))
        raise ConfigError(
            f"{dataset.prefix}: sample {number} does not show where its two responses are (a preformatted row without the "
            "template's markers), which --response-loss a or b and --no-marker-loss need."
        )
    tokens = {
        ("both", True): [(at["target_start"], lengths)],
        ("a", True): [(at["target_start"], at["middle"])],
        ("b", True): [(at["middle"], lengths)],
        ("both", False): [(at["a_start"], at["a_end"]), (at["b_start"], at["b_end"])],
        ("a", False): [(at["a_start"], at["a_end"])],
        ("b", False): [(at["b_start"], at["b_end"])],
    }[response_loss, marker_loss]
    return [(begin - 1, end - 1) for begin, end in tokens]


def _better_responses(dataset: PairDataset) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Bradley-Terry: for A and for B, the positions that predict the response and the end of its text, if it is the better one.

    Returns (first [samples], end [samples], weight [samples]) of A and of B. The range of the worse response is empty; in a tie
    both have half of the sample's weight.
    """
    facts = dataset.samples
    shares = (facts["preference"].astype(np.float64), 1.0 - facts["preference"])
    ranges = []
    for name, end, share in zip(("a_start", "b_start"), dataset.parts.cumsum(axis=1).T, shares):
        begin = facts[name].astype(np.int64) - 1
        ranges.append((begin, np.where(share > 0, end - 1, begin), share * facts["weight"]))
    return ranges
