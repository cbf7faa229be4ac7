"""Pairs and lists per second: the scorer against what one writes with transformers (full logits, padded batches)."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Optional, Sequence

import numpy as np
import torch
import tyro

from gram_engine.benchmarks.measure import Row, add_ratios, describe, measure, table, write_json
from gram_engine.benchmarks.random_model import model_of, write_random_folder
from gram_engine.config.parse import fail
from gram_engine.config.schema import DataConfig
from gram_engine.data.readers import read_rows
from gram_engine.errors import GramError
from gram_engine.hf.gram_config import GRAM_CONFIG
from gram_engine.metrics import reward_of_first
from gram_engine.scoring.scorer import Dtype, RewardModelScorer

OURS = "gram_engine"
NAIVE = "transformers, padded batches, full logits"
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", GRAM_CONFIG)


@dataclass
class Benchmark:
    """Score the same pairs, and rank the same lists, by the scorer and by a loop with transformers; text to rewards."""

    model: str
    """Folder written by `gram convert`."""
    data: str
    """Preference file; lists are made of the responses of neighbouring rows."""
    random_shape: Optional[str] = None
    """Instead of the folder's weights random ones of this shape; tokenizer and template stay. Trainer flags, given as
    --random-shape="--num-layers 8 --hidden-size 512 ...".
    """
    pairs: int = 200
    """Pairs to score: the first of the file."""
    lists: int = 4
    """Lists to rank."""
    list_size: int = 16
    """Responses in a list."""
    batch_size: int = 8
    """Texts in a batch of the loop with transformers."""
    dtype: Dtype = "auto"
    """Dtype of the weights; auto: as stored."""
    repeats: int = 3
    """Timed calls; the median counts."""
    budget_seconds: float = 120.0
    """No further timed calls of a contestant once they took so long."""
    json: Optional[str] = None
    """Write the rows to this file."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of tools/benchmark_scoring.py."""
    options = tyro.cli(Benchmark, args=sys.argv[1:] if argv is None else argv, prog="benchmark_scoring")
    try:
        with _folder(options) as folder:
            rows = measurements(options, folder)
    except GramError as error:
        fail(error)
    print(table(rows))
    if options.json:
        write_json(options.json, rows)


@contextmanager
def _folder(options: Benchmark) -> Iterator[Path]:
    if options.random_shape is None:
        yield Path(options.model)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_folder(folder, model_of(options.random_shape), torch.bfloat16)
        for file in COMPANIONS:
            if (Path(options.model) / file).is_file():
                shutil.copyfile(Path(options.model) / file, folder / file)
        yield folder


def measurements(options: Benchmark, folder: Path) -> list[Row]:
    """Both tasks, each by both contestants; checks that they agree."""
    found = read_rows([options.data], DataConfig())
    pairs = [(pair.prompt, pair.response_a, pair.response_b) for _, pair in zip(range(options.pairs), found)]
    responses = [text for pair in pairs for text in pair[1:]]
    lists = [
        (pairs[number][0], responses[2 * number : 2 * number + options.list_size]) for number in range(options.lists)
    ]
    scorer = RewardModelScorer.from_pretrained(folder, options.dtype)
    naive = NaiveScorer(folder, scorer, options.batch_size)
    tasks = {
        f"{len(pairs)} pairs": (lambda by: by.rewards(pairs), len(pairs), "pairs/s"),
        f"{len(lists)} lists of {options.list_size}": (
            lambda by: [reward for prompt, texts in lists for reward in by.ranking(prompt, texts)],
            len(lists),
            "lists/s",
        ),
    }
    return [row for task, work in tasks.items() for row in _compare(task, *work, options, scorer, naive)]


def _compare(task: str, run, count: int, unit: str, options: Benchmark, scorer: RewardModelScorer, naive) -> list[Row]:
    rows, results, device = [], {}, scorer.model.device
    for name, by in ((NAIVE, naive), (OURS, _Ours(scorer))):

        def call(name=name, by=by) -> None:
            results[name] = run(by)

        seconds, repeats, peak = measure(call, device, options.repeats, options.budget_seconds)
        dtype, note = str(scorer.model.dtype).removeprefix("torch."), f"[{count / seconds:,.1f} {unit}]"
        rows.append(
            Row(f"score {task}", name, _shape(scorer), dtype, describe(device), seconds * 1e3, repeats, peak, NAIVE, note=note)
        )
    difference = np.abs(np.subtract(results[NAIVE], results[OURS])).max()
    rows[-1].note += f" largest difference of a reward {difference:.1e}"
    add_ratios(rows)
    return rows


@dataclass
class _Ours:
    scorer: RewardModelScorer

    def rewards(self, pairs: Sequence[tuple[str, str, str]]) -> list[float]:
        return [score.reward_a for score in self.scorer.score_pairs(pairs)]

    def ranking(self, prompt: str, responses: Sequence[str]) -> list[float]:
        return list(self.scorer.rank(prompt, responses, reference=0).rewards)


class NaiveScorer:
    """Both orders of each pair through AutoModelForCausalLM, in the order given: Eq. 3 as one writes it first."""

    def __init__(self, folder: Path, scorer: RewardModelScorer, batch_size: int):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=scorer.model.dtype).to(scorer.model.device).eval()
        self.labels = json.loads((folder / GRAM_CONFIG).read_text(encoding="utf-8"))["label_ids"]
        self.sample, self.batch_size = scorer._sample, batch_size

    def rewards(self, pairs: Sequence[tuple[str, str, str]]) -> list[float]:
        """Eq. 3 of each pair."""
        given = self._margins(list(pairs))
        exchanged = self._margins([(prompt, b, a) for prompt, a, b in pairs])
        return reward_of_first(given, exchanged).tolist()

    def ranking(self, prompt: str, responses: Sequence[str]) -> list[float]:
        """Rewards against the first response."""
        return [0.5, *self.rewards([(prompt, response, responses[0]) for response in responses[1:]])]

    @torch.inference_mode()
    def _margins(self, comparisons: list[tuple[str, str, str]]) -> np.ndarray:
        found = []
        for start in range(0, len(comparisons), self.batch_size):
            texts = [self.sample(comparison).tokens for comparison in comparisons[start : start + self.batch_size]]
            longest = max(map(len, texts))
            tokens = torch.tensor([[0] * (longest - len(text)) + text for text in texts], device=self.model.device)
            mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts], device=self.model.device)
            logits = self.model(input_ids=tokens, attention_mask=mask).logits[:, -1, self.labels].float()
            found.append((logits[:, 0] - logits[:, 1]).double().cpu().numpy())
        return np.concatenate(found)


def _shape(scorer: RewardModelScorer) -> dict[str, int]:
    model = scorer.model.config
    return {"layers": model.num_layers, "hidden": model.hidden_size, "vocabulary": model.vocab_size}
