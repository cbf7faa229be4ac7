"""Faults as a table: each is injected many times, and every try must end in one of its allowed outcomes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Iterator

from gram_engine.config.schema import DataConfig
from gram_engine.data.integrity import SEAL, describe_files, sealed
from gram_engine.data.preprocess import preprocess
from gram_engine.data.template import JudgeTemplate
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import GramError
from gram_engine.scoring.scorer import RewardModelScorer
from tests.conftest import TEMPLATE, train_tokenizer, write_pairs
from tests.support.reward_folder import write_reward_model

LONG = os.environ.get("GRAM_FAULTS") == "long"


@dataclass(frozen=True)
class Fault:
    """One kind of fault. `one_try(work, draw)` injects it once, asserts what must hold, and names the outcome.

    `allowed` are the outcomes that may be; `least` is the share of the tries that must end in the first of them.
    """

    name: str
    how: str
    one_try: Callable[[Any, random.Random], str]
    short: int
    long: int
    allowed: tuple[str, ...] = ("refused",)
    least: float = 1.0

    @property
    def tries(self) -> int:
        return self.long if LONG else self.short

    def run(self, work: Any) -> Counter:
        """Outcomes of all tries; an error of another kind than GramError is left to fly, after the try's number."""
        found: Counter = Counter()
        for number in range(self.tries):
            try:
                outcome = self.one_try(work, random.Random(f"{self.name} {number}"))
            except Exception as error:
                error.add_note(f"fault '{self.name}', try {number}")
                raise
            assert outcome in self.allowed, f"fault '{self.name}', try {number}: {outcome}"
            found[outcome] += 1
        assert found[self.allowed[0]] >= self.least * self.tries, f"fault '{self.name}': {found}"
        return found


class Work:
    """Preprocessed data of both stages and a folder to damage files in."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.jsonl = folder / "pairs.jsonl"
        write_pairs(self.jsonl, rows=24)
        self.tokenizer = train_tokenizer(self.jsonl, folder / "tokenizer.model")
        self.template = JudgeTemplate.load(TEMPLATE)
        for objective in ("pair-preference", "response-lm"):
            self.make(objective, objective)
        self.make("twin", "pair-preference", seed=7)

    def make(self, name: str, objective: str, jsonl: Path | None = None, seed: int = 1234, **settings) -> dict:
        """Preprocess into self.folder / name; returns the manifest."""
        cfg = DataConfig(tokenizer_model=self.tokenizer, seq_length=192, template=TEMPLATE, **settings)
        files = [jsonl or self.jsonl]
        return preprocess(files, self.folder / name, objective=objective, cfg=cfg, both_orders=False, seed=seed)

    def file(self, name: str) -> Path:
        return self.folder / name

    @cached_property
    def hf_tokenizer(self) -> Path:
        """A tokenizer folder with a chat template."""
        folder = self.folder / "hf"
        Tokenizer.load("auto", self.tokenizer).save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(
            "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        )
        return folder

    @cached_property
    def reward_model(self) -> Path:
        """A folder as `gram convert` writes it, of a random model."""
        return write_reward_model(self.folder / "reward-model", self.tokenizer, TEMPLATE, 192)

    @cached_property
    def score(self) -> float:
        """What the undamaged reward model gives."""
        return RewardModelScorer.from_pretrained(self.reward_model).score("x", "a", "b")


def refused(action: Callable[[], Any], *said: str) -> str:
    """"refused" where the action ends in an error that a user can mend and that says all of `said`; else "opened"."""
    try:
        action()
    except GramError as error:
        missing = [part for part in said if part not in str(error)]
        assert not missing, f"the message lacks {missing}: {error}"
        return "refused"
    return "opened"


@contextlib.contextmanager
def changed(path: Path, content: bytes | None) -> Iterator[Path]:
    """The file with other content (None: without the file), until the block ends."""
    before = path.read_bytes()
    try:
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        yield path
    finally:
        path.write_bytes(before)


@contextlib.contextmanager
def resealed(prefix: Path, path: Path, content: bytes) -> Iterator[None]:
    """The preprocessed data with another file, and the checksums that belong to it, until the block ends."""
    manifest = Path(f"{prefix}.json")
    fields = json.loads(manifest.read_text())
    del fields[SEAL]
    with changed(path, content):
        described = sealed({**fields, "files": describe_files(prefix)})
        with changed(manifest, json.dumps(described).encode()):
            yield


def flipped(draw: random.Random, content: bytes) -> bytes:
    """The content with one bit turned over."""
    data = bytearray(content)
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def table(faults: list[Fault], work: Any) -> Iterator[str]:
    """Rows of the table of faults, in Markdown, from running them."""
    for fault in faults:
        started = time.perf_counter()
        found = fault.run(work)
        outcomes = ", ".join(f"{outcome} {count:,}" for outcome, count in found.most_common())
        yield f"| {fault.name} | {fault.how} | {fault.tries:,} | {outcomes} |"
        print(f"{time.perf_counter() - started:7.1f} s  {fault.name}", flush=True)
