"""Scores preference pairs with an exported Hugging Face folder: Eq. 3 over both orders. Needs transformers, not megatron."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Optional, Sequence

import numpy as np
import torch
import tyro
from safetensors import SafetensorError
from tqdm import tqdm

from gram_engine.config import DataConfig, fail
from gram_engine.convert.companions import PAIR_LOGIT
from gram_engine.data.readers import read_rows
from gram_engine.data.samples import Sample, judge_sample
from gram_engine.data.schema import Pair
from gram_engine.data.template import JudgeTemplate
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import CheckpointError, ConfigError, DataError, GramError
from gram_engine.fileio import write_atomically
from gram_engine.scoring.metrics import pair_metrics, reward_of_first


class RewardModelScorer:
    """A reward model in a Hugging Face folder, with the template and the label tokens it was trained with."""

    def __init__(self, model, tokenizer: Tokenizer, gram: dict):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.template = JudgeTemplate.from_dict(gram["template"], "gram_config.json")
        self.max_tokens = gram["seq_length"]
        if gram.get("head") == PAIR_LOGIT:
            self.direction = self.model.score.weight[0].float().detach()
        else:
            row_a, row_b = (self.model.lm_head.weight[token] for token in gram["label_ids"])
            self.direction = (row_a.float() - row_b.float()).detach()

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: str = "auto", device: Optional[str] = None) -> RewardModelScorer:
        """Load an exported folder; on a GPU where there is one.

        Raises:
            ConfigError: the folder is not an export of this engine.
            CheckpointError: its weights are missing or damaged.
        """
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        path = Path(folder) / "gram_config.json"
        if not path.is_file():
            raise ConfigError(f"{path}: no such file. --model needs a folder written by `gram convert`.")
        gram = json.loads(path.read_text(encoding="utf-8"))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        auto = AutoModelForSequenceClassification if gram.get("head") == PAIR_LOGIT else AutoModelForCausalLM
        try:
            model = auto.from_pretrained(folder, dtype=dtype).to(device)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: the model cannot be loaded: {error}") from error
        rows = model.get_input_embeddings().weight.shape[0]
        if max(gram["label_ids"]) >= rows:
            raise ConfigError(f"{path}: label_ids {gram['label_ids']} lie outside the vocabulary of {rows} tokens.")
        return cls(model, Tokenizer.load("HuggingFaceTokenizer", folder), gram)

    def margins(self, comparisons: Sequence[tuple[str, str, str]], batch_tokens: int = 16384) -> np.ndarray:
        """Z_A - Z_B of each (prompt, response shown as A, response shown as B), [comparisons] float64.

        Comparisons run sorted by length in batches of at most `batch_tokens` padded tokens; padding stands behind the
        text, where causal attention cannot see it.

        Raises:
            CheckpointError: the model's weights give no finite margin.
        """
        return self._margins(self._samples(comparisons), batch_tokens)

    def score_pairs(self, pairs: Iterable[tuple[str, str, str]], batch_tokens: int = 16384) -> dict[str, np.ndarray]:
        """Both orders of each (prompt, response_a, response_b).

        Returns:
            margins, exchanged_margins: Z_A - Z_B with a, and with b, shown first; reward_a: Eq. 3, the reward of a against
            b in [0, 1] (that of b is 1 - reward_a), all [pairs] float64; truncated: [pairs] bool, whether the responses or
            the prompt were shortened to fit the model's sequence length.
        """
        pairs = list(pairs)
        samples = self._samples([*pairs, *((prompt, b, a) for prompt, a, b in pairs)])
        both = self._margins(samples, batch_tokens)
        margins, exchanged_margins = both[: len(pairs)], both[len(pairs) :]
        return {
            "margins": margins,
            "exchanged_margins": exchanged_margins,
            "reward_a": reward_of_first(margins, exchanged_margins),
            "truncated": np.array([sample.truncated for sample in samples[: len(pairs)]], dtype=bool),
        }

    def _samples(self, comparisons: Sequence[tuple[str, str, str]]) -> list[Sample]:
        layouts = (self.template.judge_layout(*comparison) for comparison in comparisons)
        return [judge_sample(self.tokenizer, layout, self.max_tokens, "truncate") for layout in layouts]

    def _margins(self, samples: list[Sample], batch_tokens: int) -> np.ndarray:
        sequences = [sample.tokens for sample in samples]
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        found = np.empty(len(sequences))
        with tqdm(total=len(sequences), unit=" judgements", disable=None, leave=False) as bar:
            for batch in _batches(order, sequences, batch_tokens):
                found[batch] = self._forward([sequences[index] for index in batch])
                bar.update(len(batch))
        if not np.isfinite(found).all():
            raise CheckpointError(f"{self.model.name_or_path}: margins are not finite; its weights hold NaN or infinity.")
        return found

    @torch.inference_mode()
    def _forward(self, sequences: list[list[int]]) -> np.ndarray:
        device = self.direction.device
        longest = max(map(len, sequences))
        tokens = torch.zeros(len(sequences), longest, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        hidden = self.model.model(input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False)
        last = hidden.last_hidden_state[torch.arange(len(sequences)), mask.sum(dim=1) - 1]
        return (last.float() @ self.direction).double().cpu().numpy()


def _batches(order: list[int], sequences: list[list[int]], batch_tokens: int) -> Iterable[list[int]]:
    """Neighbours in length, so that padding to the longest (the last) stays within `batch_tokens`."""
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * len(sequences[index]) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@dataclass
class ScoreArguments:
    """Score the pairs of a preference file: the reward of each response against the other (Eq. 3)."""

    input: tyro.conf.Positional[str]
    """Preference file in any format that training reads."""
    output: tyro.conf.Positional[str]
    """JSONL to write, a line per pair: place, reward_a, reward_b, the margins of both orders, truncated, preference."""
    model: str
    """Folder written by `gram convert`."""
    report: Optional[str] = None
    """Also write the printed figures (accuracy over labelled pairs, swap consistency ...) to this JSON file."""
    dtype: str = "auto"
    """Dtype of the weights: auto (as stored), float32, bfloat16."""
    batch_tokens: int = 16384
    """Padded tokens in one batch."""


def main(argv: list[str] | None = None) -> None:
    """Command line of tools/score.py and `gram score`."""
    arguments = tyro.cli(ScoreArguments, args=argv, prog="gram score")
    try:
        report = score_file(arguments)
    except GramError as error:
        fail(error)
    print(json.dumps(report, indent=1))


def score_file(arguments: ScoreArguments) -> dict[str, float | None]:
    """Score a file; returns the metrics over its pairs.

    Raises:
        DataError, ConfigError: the file or the model folder cannot be used.
    """
    pairs = list(read_rows([arguments.input], DataConfig()))
    for pair in pairs:
        if not isinstance(pair, Pair):
            raise DataError(f"{pair.place}: a ready-made row; scoring needs prompt and two responses in fields of their own.")
    scorer = RewardModelScorer.from_pretrained(arguments.model, arguments.dtype)
    texts = [(pair.prompt, pair.response_a, pair.response_b) for pair in pairs]
    scores = scorer.score_pairs(texts, arguments.batch_tokens)
    preference = np.array([pair.preference for pair in pairs])
    with write_atomically(arguments.output) as handle:
        for row, pair in enumerate(pairs):
            line = {
                "place": pair.place,
                "reward_a": float(scores["reward_a"][row]),
                "reward_b": 1.0 - float(scores["reward_a"][row]),
                "margin": float(scores["margins"][row]),
                "exchanged_margin": float(scores["exchanged_margins"][row]),
                "truncated": bool(scores["truncated"][row]),
                "preference": None if np.isnan(preference[row]) else float(preference[row]),
            }
            handle.write(json.dumps(line) + "\n")
    report = _report(scores, preference)
    if arguments.report:
        with write_atomically(arguments.report) as handle:
            json.dump(report, handle, indent=1)
    return report


def _report(scores: dict[str, np.ndarray], preference: np.ndarray) -> dict[str, float | None]:
    """`pair_metrics` and the number of shortened pairs; None (JSON's null) for a figure over nothing."""
    number, orders = np.arange(len(preference)), np.repeat([0, 1], len(preference))
    margins = np.concatenate([scores["margins"], scores["exchanged_margins"]])
    shown = np.concatenate([preference, 1.0 - preference])
    metrics = pair_metrics(np.tile(number, 2), orders, margins, shown)
    report = {name: None if np.isnan(value) else value for name, value in metrics.items()}
    return {**report, "truncated": int(scores["truncated"].sum())}
