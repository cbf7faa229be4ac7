"""Rewards of pairs, lists and best-of-n: Eq. 3 over both orders of a pair, or a scalar model's rewards (Eq. 1).

`Judge` and `ScalarJudge` hold what does not depend on where a model runs; `RewardModelScorer` and `ScalarScorer` run one here,
those of server.py ask a server. `open_judge` (judges.py) opens any of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterable, Iterator, Literal, NamedTuple, Optional, Protocol, Sequence

import numpy as np
import torch
from torch import Tensor

from gram_engine.data.samples import Sample, conversation_sample, judge_sample, label_ids
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import ConfigError
from gram_engine.hf.gram_config import GRAM_CONFIG, GramConfig, read_gram_config
from gram_engine.metrics import reward_of_first, sigmoid
from gram_engine.platform.device import default_device
from gram_engine.scoring.judge_model import JudgeModel
from gram_engine.scoring.token_tree import TokenTree

Comparison = tuple[str, str, str]
"""(prompt, response shown as A, response shown as B)."""
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Method = Literal["reference", "linear", "tournament"]
BATCH_TOKENS_CPU, BATCH_TOKENS_GPU = 4096, 65536


@dataclass(frozen=True)
class PairScore:
    """Both orders of one pair."""

    reward_a: float
    """Eq. 3: reward of a against b, in [0, 1]; that of b is 1 - reward_a."""
    margin: float
    """Z_A - Z_B with a shown first."""
    swapped_margin: float
    """Z_A - Z_B with b shown first."""
    truncated: bool
    """Whether prompt or responses were shortened to fit the model's sequence length."""
    tokens: Optional[int] = field(default=None, kw_only=True)
    """Tokens of all texts that the model read for this pair, shared beginnings counted in each; None if not known."""

    @property
    def winner(self) -> Optional[str]:
        """"a" or "b", or None for a tie (Eq. 9: a reward of exactly one half)."""
        return None if self.reward_a == 0.5 else "a" if self.reward_a > 0.5 else "b"


@dataclass(frozen=True)
class ScalarPairScore(PairScore):
    """A pair by a scalar head: the margins are differences of rewards, reward_a is the margin's sigmoid (Eq. 1)."""

    rewards: tuple[float, float]
    """Of a and of b, each on its own; any real numbers."""


@dataclass(frozen=True)
class ServerPairScore(PairScore):
    """A pair by a server's verdicts."""

    unparsable: int
    """How many of the two answers hold no verdict or are refusals. Such a verdict is even: its margin is 0."""


@dataclass(frozen=True)
class Ranking:
    """Responses to one prompt, judged against one of them (section 4.4) or, by a scalar head, each on its own."""

    rewards: tuple[float, ...]
    """Eq. 3 against the reference, whose own is 1/2; a scalar head's are any real numbers."""
    reference: Optional[int]
    """None for a scalar head."""

    @property
    def comparisons(self) -> int:
        """Number of comparisons (both orders each)."""
        return 0 if self.reference is None else len(self.rewards) - 1

    @property
    def order(self) -> list[int]:
        """Numbers of the responses, best first; the earlier of equals first."""
        return sorted(range(len(self.rewards)), key=lambda number: -self.rewards[number])


@dataclass(frozen=True)
class Best:
    """The best of n responses, and how many comparisons (both orders each) it took to find it."""

    index: int
    comparisons: int


class JudgedGroup(NamedTuple):
    """What a model says of texts that belong together."""

    margins: np.ndarray
    """[texts] float64: Z_A - Z_B, or a scalar head's rewards."""
    truncated: bool
    """Whether any of the texts was shortened."""
    tokens: Optional[int]
    """Tokens of all texts, shared beginnings counted in each; None if not known."""

    @classmethod
    def of(cls, margins: np.ndarray, samples: Sequence[Sample]) -> JudgedGroup:
        """The group of some samples."""
        return cls(margins, any(sample.truncated for sample in samples), sum(len(sample.tokens) for sample in samples))


class Judge(ABC):
    """Says which of two responses is better: the logits of the labels A and B, for any number of comparisons."""

    @abstractmethod
    def _judge(self, groups: Iterable[Sequence[Comparison]]) -> Iterator[JudgedGroup]:
        """The verdict on each group of comparisons, in the order given."""

    def close(self) -> None:  # noqa: B027 (a local judge holds nothing)
        """Release what the judge holds open; one behind a server also logs what its verdicts cost."""

    def score(self, prompt: str, response: str, reference: str) -> float:
        """Reward of a response against a reference, in [0, 1] (Eq. 3)."""
        return self.compare(prompt, response, reference).reward_a

    def compare(self, prompt: str, response_a: str, response_b: str) -> PairScore:
        """Both orders of one pair."""
        return next(self.score_pairs([(prompt, response_a, response_b)]))

    def score_pairs(self, pairs: Iterable[Comparison]) -> Iterator[PairScore]:
        """Both orders of each (prompt, response_a, response_b), in the order given; batches run when a result is needed."""
        for margins, truncated, tokens in self._judge(_both_orders(pairs)):
            yield PairScore(float(reward_of_first(*margins)), *map(float, margins), truncated, tokens=tokens)

    def margins(self, comparisons: Iterable[Comparison]) -> np.ndarray:
        """Z_A - Z_B of each comparison in the order given: [comparisons] float64."""
        found = [judged.margins for judged in self._judge([comparison] for comparison in comparisons)]
        return np.concatenate(found) if found else np.empty(0)

    def rank(self, prompt: str, responses: Sequence[str], reference: Optional[int] = None, seed: int = 0) -> Ranking:
        """Rewards of all responses against one of them: number `reference`, or one drawn at random with `seed`.

        Raises:
            ConfigError: the list is empty, or `reference` is not in it.
        """
        _refuse_empty_list(responses)
        if reference is None:
            reference = int(np.random.default_rng(seed).integers(len(responses)))
        if not 0 <= reference < len(responses):
            raise ConfigError(f"reference {reference} is not one of the {len(responses)} responses, counted from 0.")
        others = [number for number in range(len(responses)) if number != reference]
        # One group, whose texts share their prefixes: prompt and reference in the first half, the prompt in the second.
        group = [(prompt, responses[reference], responses[number]) for number in others]
        group += [(prompt, responses[number], responses[reference]) for number in others]
        margins = next(self._judge([group])).margins if others else np.empty(0)
        rewards = np.full(len(responses), 0.5)
        rewards[others] = reward_of_first(margins[len(others) :], margins[: len(others)])
        return Ranking(tuple(rewards.tolist()), reference)

    def best_of_n(self, prompt: str, responses: Sequence[str], method: Method = "reference", seed: int = 0) -> Best:
        """The best response, by n - 1 comparisons with every method.

        Args:
            method: "reference" takes the highest reward against one response (drawn with `seed`), in one batch; "linear"
                compares the best so far with the next; "tournament" compares neighbours, then the winners of each round, a
                round in one batch.  In the latter two the earlier response wins an even comparison.

        Raises:
            ConfigError: the list is empty.
        """
        _refuse_empty_list(responses)
        if method == "reference":
            ranking = self.rank(prompt, responses, seed=seed)
            return Best(ranking.order[0], ranking.comparisons)
        standing = list(range(len(responses)))
        while len(standing) > 1:
            met = standing[:2] if method == "linear" else standing[: len(standing) // 2 * 2]
            matches = list(zip(met[::2], met[1::2]))
            scores = self.score_pairs([(prompt, responses[one], responses[other]) for one, other in matches])
            winners = [other if score.winner == "b" else one for (one, other), score in zip(matches, scores, strict=True)]
            standing = winners + standing[len(met) :]
        return Best(standing[0], len(responses) - 1)


class ScalarJudge(Judge):
    """Gives each response a reward of its own; pairs go by the difference (Eq. 1).

    `_judge` takes groups of (prompt, response) and gives their rewards.
    """

    def reward(self, prompt: str, response: str) -> float:
        """Reward of a response: any real number, comparable within one prompt."""
        return self.rank(prompt, [response]).rewards[0]

    def score_pairs(self, pairs: Iterable[Comparison]) -> Iterator[ScalarPairScore]:
        """Both responses of each (prompt, response_a, response_b); `margins` and `truncated` as of the base class."""
        for rewards, truncated, tokens in self._judge([(prompt, a), (prompt, b)] for prompt, a, b in pairs):
            margin = float(rewards[0] - rewards[1])
            yield ScalarPairScore(float(sigmoid(margin)), margin, -margin, truncated, tuple(rewards.tolist()), tokens=tokens)

    def margins(self, comparisons: Iterable[Comparison]) -> np.ndarray:
        """Difference of the two responses' rewards: [comparisons] float64."""
        return np.array([score.margin for score in self.score_pairs(comparisons)])

    def rank(self, prompt: str, responses: Sequence[str], reference: Optional[int] = None, seed: int = 0) -> Ranking:
        """Rewards of all responses; they need no reference, so `reference` and `seed` change nothing.

        Raises:
            ConfigError: the list is empty.
        """
        _refuse_empty_list(responses)
        rewards = next(self._judge([[(prompt, response) for response in responses]])).margins
        return Ranking(tuple(rewards.tolist()), None)

    def best_of_n(self, prompt: str, responses: Sequence[str], method: Method = "reference", seed: int = 0) -> Best:
        """The response of the highest reward, whatever the method: no comparisons. Raises as `rank`."""
        return Best(self.rank(prompt, responses).order[0], 0)


class LocalModel(Protocol):
    """A model that runs here: JudgeModel or TransformersModel."""

    device: torch.device
    dtype: torch.dtype

    def margins(self, tree: TokenTree) -> Tensor:
        """Z_A - Z_B, or a scalar model's reward, at the end of each text of the tree: [texts] fp32."""


class RewardModelScorer(Judge):
    """A judge that runs here, with its template and label tokens."""

    def __init__(self, model: LocalModel, tokenizer: Tokenizer, gram: GramConfig, batch_tokens: Optional[int] = None):
        self.model, self.tokenizer = model, tokenizer
        self.gram, self.template, self.max_tokens = gram, gram.template, gram.seq_length
        self.batch_tokens = batch_tokens or default_batch_tokens(model.device)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: Dtype = "auto", device: Optional[str] = None, batch_tokens: Optional[int] = None
    ) -> RewardModelScorer:
        """Load an exported folder, one of a scalar head as a ScalarScorer; on a GPU where there is one.

        `open_judge` (judges.py) opens these and all other models.

        Args:
            dtype: of the weights, as torch names it; "auto": as stored.
            batch_tokens: tokens that run at once; None: 4,096 on a CPU, 65,536 on a GPU.

        Raises:
            ConfigError: the folder is not an export of this engine, or its parts do not fit together.
            CheckpointError: its weights are missing, damaged or not finite.
        """
        gram = read_gram_config(folder)
        tokenizer = Tokenizer.load("HuggingFaceTokenizer", folder)
        model = JudgeModel(folder, gram.label_ids, dtype, device or default_device())
        if gram.conversation is not None:
            return ScalarScorer(model, tokenizer, gram, batch_tokens)
        if label_ids(tokenizer, gram.template) != gram.label_ids:
            raise ConfigError(
                f"{folder}: {GRAM_CONFIG} has the label tokens {list(gram.label_ids)}, the tokenizer gives "
                f"{list(label_ids(tokenizer, gram.template))}. One of them was changed: convert the checkpoint again."
            )
        return cls(model, tokenizer, gram, batch_tokens)

    def _judge(self, groups: Iterable[Sequence[tuple[str, ...]]]) -> Iterator[JudgedGroup]:
        """The verdict on each group of texts, in the order given; texts of a group share the prefixes they have."""
        waiting: deque[list[Sample]] = deque()
        tree, margins = TokenTree(), np.empty(0)
        for group in groups:
            waiting.append([self._sample(comparison) for comparison in group])
            for piece in _pieces(waiting[-1], 2 * self.batch_tokens):
                tree.add([sample.tokens for sample in piece])
                if tree.size >= self.batch_tokens:
                    margins, tree = np.append(margins, self._run(tree)), TokenTree()
            while waiting and len(waiting[0]) <= len(margins):
                samples = waiting.popleft()
                yield JudgedGroup.of(margins[: len(samples)], samples)
                margins = margins[len(samples) :]
        margins = np.append(margins, self._run(tree)) if tree.leaves else margins
        for samples in waiting:
            yield JudgedGroup.of(margins[: len(samples)], samples)
            margins = margins[len(samples) :]

    def _sample(self, comparison: Comparison) -> Sample:
        return sample_of(self.tokenizer, self.gram, comparison, self.max_tokens)

    def _run(self, tree: TokenTree) -> np.ndarray:
        margins = self.model.margins(tree).double().cpu().numpy()
        if not np.isfinite(margins).all():
            dtype = str(self.model.dtype).removeprefix("torch.")
            raise ConfigError(f"the model's results are not finite in {dtype}. Give --dtype bfloat16 or --dtype float32.")
        return margins


class ScalarScorer(ScalarJudge, RewardModelScorer):
    """A scalar reward model that runs here."""

    def _sample(self, text: tuple[str, str]) -> Sample:
        sample = super()._sample(text)
        # transformers reads the reward at the last token that is not padding, also where the text itself ends in padding.
        while sample.tokens[-1] == self.gram.pad_id and len(sample.tokens) > 1:
            sample.tokens.pop()
        return sample


def sample_of(tokenizer: Tokenizer, gram: GramConfig, text: tuple[str, ...], max_tokens: int) -> Sample:
    """Tokens of (prompt, response shown as A, response shown as B), or of (prompt, response) for a scalar model."""
    if gram.conversation is not None:
        return conversation_sample(tokenizer, gram.conversation, *text, max_tokens, "truncate")
    return judge_sample(tokenizer, gram.template.judge_layout(*text), max_tokens, "truncate")


def default_batch_tokens(device: torch.device) -> int:
    """Tokens that run at once."""
    return BATCH_TOKENS_CPU if device.type == "cpu" else BATCH_TOKENS_GPU


def _pieces(samples: list[Sample], most: int) -> Iterator[list[Sample]]:
    """Consecutive samples of at most `most` tokens together, or a single sample that is longer."""
    piece, size = [], 0
    for sample in samples:
        if piece and size + len(sample.tokens) > most:
            yield piece
            piece, size = [], 0
        piece.append(sample)
        size += len(sample.tokens)
    yield piece


def _both_orders(pairs: Iterable[Comparison]) -> Iterator[list[Comparison]]:
    for prompt, a, b in pairs:
        yield [(prompt, a, b), (prompt, b, a)]


def _refuse_empty_list(responses: Sequence[str]) -> None:
    if not responses:
        raise ConfigError("the list of responses is empty: there is nothing to rank.")
