"""Demonstration data: preferences that a program can check and a tiny model can learn from scratch.

The prompt asks for days, months, numbers or letters in order; both responses consist of the same words and begin with the
same one, but only the better response is in order. So neither position, nor length, nor the words give the answer away, and
an untrained judge is right half of the time. The held-out prompts are never trained on.
"""

from __future__ import annotations

import json
import random
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import tyro

from gram_engine.files import write_atomically

SEQUENCES = {
    "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "months": "January February March April May June July August September October November December",
    "numbers": "one two three four five six seven eight nine ten eleven twelve",
    "letters": "a b c d e f g h i j k l m n o p q r s t u v w x y z",
}
WORDS = {kind: tuple(words.split()) for kind, words in SEQUENCES.items()}
CYCLIC = ("days", "months")

SIZES = {"five": 5, "six": 6, "seven": 7}

QUESTIONS = (
    "List {size} {kind} in order, from {first} on.",
    "Which {size} {kind} come in order from {first}?",
    "Start at {first} and name {size} {kind}.",
    "Name {size} {kind}, starting with {first}.",
    "Please write {size} {kind} from {first} on.",
    "Go on from {first}: {size} {kind}.",
    "I need {size} {kind} in order, {first} first.",
    "Say {size} {kind}, beginning with {first}.",
)

HELD_OUT_SHARE = 5  # one prompt in five is held out
CANDIDATES = 16  # responses to a prompt of candidates.jsonl


def pairs(number: int, seed: int, held_out: bool) -> Iterator[dict[str, str]]:
    """`number` rows {prompt, chosen, rejected, kind} with training or held-out prompts; the same for the same seed."""
    draw = random.Random(f"{seed}-{held_out}")
    made = 0
    while made < number:
        kind = tuple(WORDS)[made % len(WORDS)]
        size = draw.choice(tuple(SIZES))
        first = draw.choice(WORDS[kind] if kind in CYCLIC else WORDS[kind][: 1 - SIZES[size]])
        prompt = draw.choice(QUESTIONS).format(size=size, kind=kind, first=first)
        if is_held_out(prompt) == held_out:
            made += 1
            chosen = answer(kind, first, SIZES[size])
            rejected = ", ".join(_disordered(chosen, draw))
            yield {"prompt": prompt, "chosen": ", ".join(chosen), "rejected": rejected, "kind": kind}


def candidates(number: int, seed: int) -> Iterator[dict[str, Any]]:
    """`number` rows {prompt, responses, oracle} with held-out prompts, for `gram best-of-n`; the same for the same seed.

    A response begins with some words in order and shuffles the others; all responses differ. Its oracle score is the share of
    words that directly follow their predecessor.
    """
    draw = random.Random(f"{seed}-candidates")
    for row in pairs(number, seed, held_out=True):
        words = tuple(row["chosen"].split(", "))
        successors = set(zip(words, words[1:]))
        made: dict[tuple[str, ...], float] = {}
        while len(made) < CANDIDATES:
            kept = draw.randint(1, len(words))
            one = (*words[:kept], *draw.sample(words[kept:], len(words) - kept))
            made[one] = sum(two in successors for two in zip(one, one[1:])) / len(successors)
        yield {"prompt": row["prompt"], "responses": [", ".join(one) for one in made], "oracle": list(made.values())}


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the held-out set, which depends on its text alone."""
    return zlib.crc32(prompt.encode()) % HELD_OUT_SHARE == 0


def answer(kind: str, first: str, size: int) -> list[str]:
    """`size` words of a sequence in order, from `first` on."""
    words = WORDS[kind]
    start = words.index(first)
    return [words[(start + offset) % len(words)] for offset in range(size)]


def is_right(row: dict[str, str], response: str) -> bool:
    """Whether a response is what the row's prompt asks for; the prompt alone is read."""
    kind = next(kind for kind in WORDS if f" {kind}" in row["prompt"])
    return any(
        row["prompt"] == question.format(size=size, kind=kind, first=first)
        and response == ", ".join(answer(kind, first, SIZES[size]))
        for question in QUESTIONS
        for size in SIZES
        for first in WORDS[kind]
    )


def _disordered(words: list[str], draw: random.Random) -> list[str]:
    """The words shuffled, except the first, such that no word is followed by its successor."""
    successors = set(zip(words, words[1:]))
    while True:
        shuffled = words[:1] + draw.sample(words[1:], len(words) - 1)
        if not successors & set(zip(shuffled, shuffled[1:])):
            return shuffled


@dataclass
class DemoConfig:
    """How much demonstration data to write, and where."""

    output_dir: str = "runs/quickstart/data"
    """Folder for train.jsonl, test.jsonl and candidates.jsonl."""
    train_pairs: int = 12_000
    """Pairs to train on."""
    test_pairs: int = 400
    """Pairs with held-out prompts."""
    candidates: int = 0
    """Prompts in candidates.jsonl, each with 16 responses and their scores, for `gram best-of-n`."""
    seed: int = 1234
    """Seed of the data."""


def write(config: DemoConfig) -> list[Path]:
    """Write train.jsonl, test.jsonl and, if any are asked for, candidates.jsonl; returns their paths."""
    made = {
        "train": pairs(config.train_pairs, config.seed, held_out=False),
        "test": pairs(config.test_pairs, config.seed, held_out=True),
    }
    if config.candidates:
        made["candidates"] = candidates(config.candidates, config.seed)
    files = []
    for name, rows in made.items():
        files.append(Path(config.output_dir) / f"{name}.jsonl")
        with write_atomically(files[-1]) as handle:
            for row in rows:
                handle.write(json.dumps(row) + "\n")
    return files


def main(argv: list[str] | None = None) -> None:
    """Command line: see `--help`."""
    config = tyro.cli(DemoConfig, args=argv, prog="gram demo-data", description=__doc__)
    for file in write(config):
        print(file)


if __name__ == "__main__":
    main()
