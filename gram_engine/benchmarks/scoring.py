"""Pairs and lists scored per second: the scorer by both its forward passes, and a padded loop over full logits."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

import numpy as np
import torch

from gram_engine.benchmarks.command import CallOptions
from gram_engine.benchmarks.measure import describe, in_new_processes, measure
from gram_engine.benchmarks.results import Row, add_ratios, table, write_rows
from gram_engine.benchmarks.workload import model_of, write_random_folder
from gram_engine.config.schema import DataConfig
from gram_engine.data.readers import read_rows
from gram_engine.hf.gram_config import GRAM_CONFIG
from gram_engine.log import log
from gram_engine.metrics import reward_of_first
from gram_engine.scoring.processes import Processes
from gram_engine.scoring.scorer import Dtype, RewardModelScorer
from gram_engine.scoring.transformers_model import TransformersModel

OURS = "gram_engine"
PACKED = "gram_engine, forward pass of transformers"
NAIVE = "transformers, padded batches, full logits"
METADATA_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", GRAM_CONFIG)


@dataclass(kw_only=True)
class Scoring(CallOptions):
    """Score the same pairs and rank the same lists with the scorer and with a loop that uses transformers; text to rewards."""

    model: str
    """Folder written by `gram convert`."""
    data: str
    """Preference file; lists are made of the responses of consecutive rows."""
    budget_seconds: float = 120.0
    random_shape: Optional[str] = None
    """Use random weights of this shape with the folder's tokenizer and template. Trainer flags, given as
    --random-shape="--num-layers 8 --hidden-size 512 ...".
    """
    pairs: int = 200
    """Number of pairs to score: the first of the file."""
    lists: int = 4
    """Number of lists to rank."""
    list_size: int = 16
    """Responses in a list."""
    batch_size: int = 8
    """Batch size of the loop with transformers."""
    dtype: Dtype = "auto"
    """Dtype of the weights; auto: as stored."""
    processes: int = 0
    """Also score the pairs by so many processes of one CPU thread each (a GPU each, where there are GPUs), beside one such."""

    def run(self) -> None:
        """Measure, print and write."""
        with self._folder() as folder:
            rows = self._rows(folder)
        log(table(rows))
        write_rows(self.json, rows)

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        if self.random_shape is None:
            yield Path(self.model)
            return
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_random_folder(folder, model_of(self.random_shape), torch.bfloat16)
            for file in METADATA_FILES:
                if (Path(self.model) / file).is_file():
                    shutil.copyfile(Path(self.model) / file, folder / file)
            yield folder

    def _rows(self, folder: Path) -> list[Row]:
        """Both tasks by both contestants; the largest difference of a reward is noted."""
        found = read_rows([self.data], DataConfig())
        pairs = [(pair.prompt, pair.response_a, pair.response_b) for _, pair in zip(range(self.pairs), found)]
        responses = [text for pair in pairs for text in pair[1:]]
        lists = [(pairs[number][0], responses[2 * number : 2 * number + self.list_size]) for number in range(self.lists)]
        scorer = RewardModelScorer.from_pretrained(folder, self.dtype)
        naive = NaiveScorer(folder, scorer, self.batch_size)
        model = TransformersModel(type(naive.model), folder, scorer.gram.label_ids, self.dtype, scorer.model.device)
        contestants = {
            NAIVE: naive,
            PACKED: _Ours(RewardModelScorer(model, scorer.tokenizer, scorer.gram)),
            OURS: _Ours(scorer),
        }
        tasks = {
            f"{len(pairs)} pairs": (lambda by: by.rewards(pairs), len(pairs), "pairs/s"),
            f"{len(lists)} lists of {self.list_size}": (
                lambda by: [reward for prompt, texts in lists for reward in by.ranking(prompt, texts)],
                len(lists),
                "lists/s",
            ),
        }
        rows = [row for task, work in tasks.items() for row in _compare(task, *work, self, scorer, contestants)]
        return rows + (self._rows_of_processes(folder, pairs, rows[0]) if self.processes > 1 else [])

    def _rows_of_processes(self, folder: Path, pairs: list[tuple[str, str, str]], like: Row) -> list[Row]:
        rows = []
        for count in (1, self.processes):
            seconds = max(in_new_processes(score_own_part, str(folder), self.dtype, pairs, count=count, threads=1))
            name = f"gram_engine, processes of one thread: {count}"
            note = f"[{len(pairs) / seconds:,.1f} pairs/s]"
            task, baseline = f"{like.benchmark}, by processes", "gram_engine, processes of one thread: 1"
            rows.append(Row(task, name, like.shape, like.dtype, like.device, seconds * 1e3, 1, None, baseline, note=note))
        add_ratios(rows)
        return rows


def score_own_part(folder: str, dtype: Dtype, pairs: list[tuple[str, str, str]]) -> float:
    """Seconds in which this process scores its part of the pairs, from the moment at which all are ready."""
    scorer = RewardModelScorer.from_pretrained(folder, dtype)
    processes = Processes("benchmark")
    own = processes.own_part(range(len(pairs)), [sum(map(len, pair)) for pair in pairs])
    processes.wait_for_all()
    processes.from_first("start", lambda: None)
    started = time.perf_counter()
    for _ in scorer.score_pairs(pairs[number] for number in own):
        pass
    return time.perf_counter() - started


def _compare(
    task: str, run, count: int, unit: str, options: Scoring, scorer: RewardModelScorer, contestants: dict[str, Any]
) -> list[Row]:
    rows, results, device = [], {}, scorer.model.device
    for name, by in contestants.items():

        def call(name=name, by=by) -> None:
            results[name] = run(by)

        seconds, repeats, peak = measure(call, device, options.repeats, options.budget_seconds)
        dtype, note = str(scorer.model.dtype).removeprefix("torch."), f"[{count / seconds:,.1f} {unit}]"
        if name != NAIVE:
            note += f" largest difference of a reward {np.abs(np.subtract(results[NAIVE], results[name])).max():.1e}"
        rows.append(
            Row(f"score {task}", name, _shape(scorer), dtype, describe(device), seconds * 1e3, repeats, peak, NAIVE, note=note)
        )
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
    """Both orders of each pair by AutoModelForCausalLM in the order of the file: a straightforward implementation of Eq. 3."""

    def __init__(self, folder: Path, scorer: RewardModelScorer, batch_size: int):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=scorer.model.dtype).to(scorer.model.device).eval()
        self.labels = json.loads((folder / GRAM_CONFIG).read_text(encoding="utf-8"))["label_ids"]
        self.sample, self.batch_size = scorer._sample, batch_size

    def rewards(self, pairs: Sequence[tuple[str, str, str]]) -> list[float]:
        """Eq. 3 of each pair: the probability that response A is better, averaged over both orders."""
        given = self._margins(list(pairs))
        swapped = self._margins([(prompt, b, a) for prompt, a, b in pairs])
        return reward_of_first(given, swapped).tolist()

    def ranking(self, prompt: str, responses: Sequence[str]) -> list[float]:
        """Reward of each response against the first one, which gets 0.5."""
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
