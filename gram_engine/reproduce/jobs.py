"""From a recipe to jobs: commands that a user could run, each in a folder named after a hash of what its result depends on.

So stages that variants share are trained once, a changed recipe runs only what changed, and a killed reproduction resumes.

    OUT/data/NAME-HASH.jsonl                  the rows of a data set that leaves some out
    OUT/tokenizer-HASH/tokenizer.model
    OUT/stages/COMMAND-sSEED-HASH/checkpoint  with train.log and train.done.json beside it, as for every other job
                                 /model       for the last stage of a variant
                                 /evaluate-HASH  report, scores.jsonl
"""

from __future__ import annotations

import hashlib
import json
import random
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from gram_engine.config.parse import flag_words
from gram_engine.data.readers import read_items
from gram_engine.data.sources import source_fingerprint
from gram_engine.errors import ConfigError
from gram_engine.files import source_is_there, write_atomically
from gram_engine.reproduce.recipe import DataSet, Recipe, Stage, Variant

ROOT = Path(__file__).resolve().parents[2]
FORMAT = 1
"""Is raised when the same recipe comes to mean other jobs."""


@dataclass(frozen=True)
class Job:
    """One command."""

    name: str
    """Part of file names: train, convert, evaluate-HASH ..."""
    kind: str
    """Jobs of one kind take about the same time."""
    task: str
    """In words: `train stage2, seed 1`."""
    users: list[str]
    """Variants that need it."""
    folder: Path
    command: tuple[str, ...]
    needs: tuple[str, ...]
    """Jobs (`id`) whose results it reads."""
    replaces: Optional[Path] = None
    """Folder to remove before it starts."""
    trainer_flags: tuple[str, ...] = ()
    """The flags of a training, to be checked before anything starts."""

    @property
    def id(self) -> str:
        return f"{self.folder.name}/{self.name}"

    @property
    def title(self) -> str:
        """The task, and up to three of its users."""
        shown = self.users if len(self.users) < 4 else [*self.users[:3], "..."]
        return f"{self.task} ({', '.join(shown)})" if shown else self.task

    @property
    def log(self) -> Path:
        """Everything the command printed."""
        return self.folder / f"{self.name}.log"

    @property
    def mark(self) -> Path:
        """Written when the command has succeeded: command, seconds, date."""
        return self.folder / f"{self.name}.done.json"

    @property
    def done(self) -> bool:
        return self.mark.is_file()

    @property
    def seconds(self) -> float:
        """How long the finished command took."""
        return json.loads(self.mark.read_text(encoding="utf-8"))["seconds"]

    def __str__(self) -> str:
        return shlex.join(self.command)


class JobGraph:
    """All jobs of a recipe below the folder `out`, each after those it needs; nothing is written.

    Raises:
        ConfigError: a data file or the template is missing.
    """

    def __init__(self, recipe: Recipe, out: Path):
        self.recipe, self.out = recipe, out
        self.jobs: dict[str, Job] = {}
        self.models: dict[tuple[str, int], Path] = {}
        """(variant, seed) -> folder of its last stage; seeds share it where every stage has a seed of its own."""
        self.evaluations: dict[Path, Job] = {}
        """Folder of a last stage -> its evaluation."""
        self.best_of_n: dict[Path, Job] = {}
        self.test_files: dict[str, Path] = {}
        """Evaluation set -> its rows."""
        self._selections: dict[Path, DataSet] = {}
        self._fingerprints: dict[str, str] = {}
        self._users: dict[Path, list[str]] = {}
        self._tokenizer = self._add_tokenizer() if recipe.tokenizer else None
        for seed in recipe.seeds:
            for variant in recipe.variants.values():
                self._add_variant(variant, seed)
        self._add_measurements()
        self._sort()

    def write_data(self) -> None:
        """Write the rows of data sets that leave some out, where they are not there yet. Raises as `write_selection`."""
        for file, data in self._selections.items():
            if not file.is_file():
                write_selection(data, file)

    def needed_for(self, variants: tuple[str, ...]) -> dict[str, Job]:
        """The jobs of some variants alone.

        Raises:
            ConfigError: no such variant.
        """
        for name in variants:
            if name not in self.recipe.variants:
                raise ConfigError(f"--only {name}: not among the variants ({', '.join(self.recipe.variants)}).")
        folders = {folder for (variant, _), folder in self.models.items() if variant in variants}
        wanted = [jobs[folder].id for jobs in (self.evaluations, self.best_of_n) for folder in folders if folder in jobs]
        kept: set[str] = set()
        while wanted:
            job = self.jobs[wanted.pop()]
            kept.add(job.id)
            wanted += job.needs
        return {name: job for name, job in self.jobs.items() if name in kept}

    def _add_variant(self, variant: Variant, seed: int) -> None:
        """The trainings of a variant, except those that another variant has added already."""
        parent: Optional[Job] = None
        for stage in self.recipe.stages_of(variant):
            parent = self._train(stage, seed if stage.seed is None else stage.seed, parent)
            if variant.name not in parent.users:
                parent.users.append(variant.name)
        self.models[variant.name, seed] = parent.folder

    def _add_measurements(self) -> None:
        """Export and evaluation of every last stage, on the sets of all variants that end there."""
        recipe = self.recipe
        chosen = recipe.best_of_n.variants if recipe.best_of_n else ()
        variants: dict[Path, list[Variant]] = {}
        for (name, _), folder in self.models.items():
            variants.setdefault(folder, []).append(recipe.variants[name])
        for folder, own in variants.items():
            sets = [name for name in recipe.evaluation if any(name in variant.evaluate for variant in own)]
            model = self.jobs[f"{folder.name}/train"].task.removeprefix("train ")
            convert = self._convert(folder, model)
            if sets:
                self.evaluations[folder] = self._evaluate(folder, model, sets, convert)
            if any(variant.name in chosen for variant in own):
                self.best_of_n[folder] = self._best_of_n(folder, model, convert)

    def _sort(self) -> None:
        """Put the measurements of a model right after its training, so that results come early."""
        folders: dict[Path, list[Job]] = {}
        for job in self.jobs.values():
            folders.setdefault(job.folder, []).append(job)
        self.jobs = {job.id: job for own in folders.values() for job in own}

    def _train(self, stage: Stage, seed: int, parent: Optional[Job]) -> Job:
        data, tokenizer = self.recipe.data[stage.data], self._tokenizer
        identity = {
            "format": FORMAT,
            "command": stage.command,
            "flags": {name: content_of(value) for name, value in stage.flags.items()},
            "data": self._fingerprint(data),
            "seed": seed,
            "from": parent.id if parent else None,
            "tokenizer": tokenizer.id if tokenizer else None,
        }
        folder = self.out / "stages" / f"{stage.command}-s{seed}-{content_hash(identity)}"
        if (known := self.jobs.get(f"{folder.name}/train")) is not None:
            return known
        launcher = self.recipe.launcher.split()
        program = [*launcher, ROOT / "examples" / f"{stage.command}_gram.sh"] if launcher else ["gram", stage.command]
        flags = _words_of(stage.flags)
        words = [*program, *flags, "--seed", seed, "--data", *self._files(data)]
        words += ["--data-cache-path", self.out / "data" / "cache"]
        words += ["--tokenizer-model", tokenizer.folder / "tokenizer.model"] if tokenizer else []
        words += ["--pretrained-checkpoint", parent.folder / "checkpoint"] if parent else []
        words += ["--save", folder / "checkpoint", "--load", folder / "checkpoint"]
        needs = tuple(job.id for job in (tokenizer, parent) if job)
        task, kind = f"train {stage.name}, seed {seed}", f"train {stage.name} on {stage.data}"
        return self._add("train", task, folder, *words, needs=needs, kind=kind, trainer_flags=flags)

    def _add_tokenizer(self) -> Job:
        recipe = self.recipe
        data, size = recipe.data[recipe.tokenizer.data], recipe.tokenizer.vocab_size
        folder = self.out / f"tokenizer-{content_hash([FORMAT, self._fingerprint(data), size, content_of(recipe.template)])}"
        return self._add(
            "tokenizer", "tokenizer", folder, "gram", "train-tokenizer", "--data", *self._files(data), "--vocab-size", size,
            "--template", recipe.template, "--output", folder / "tokenizer.model",
        )  # fmt: skip

    def _convert(self, folder: Path, model: str) -> Job:
        words = ("gram", "convert", "--load", folder / "checkpoint", "--save", folder / "model")
        needs = (f"{folder.name}/train",)
        return self._add("convert", f"export {model}", folder, *words, needs=needs, replaces=folder / "model")

    def _evaluate(self, folder: Path, model: str, sets: list[str], convert: Job) -> Job:
        files = [self._test_file(name) for name in sets]
        name = f"evaluate-{content_hash([file.name for file in files])[:6]}"
        words = ["gram", "evaluate", *files, "--suite", "pairs", "--model", folder / "model", "--output-dir", folder / name]
        return self._add(name, f"evaluate {model}", folder, *words, needs=(convert.id,), kind="evaluate")

    def _best_of_n(self, folder: Path, model: str, convert: Job) -> Job:
        n = self.recipe.best_of_n.n
        file = self._selection(self.recipe.data[self.recipe.best_of_n.data])
        name = f"best-of-n-{content_hash([file.name, n])[:6]}"
        words = ["gram", "best-of-n", file, "--model", folder / "model", "--output-dir", folder / name]
        words += ["--n", n] if n else []
        return self._add(name, f"best of n of {model}", folder, *words, needs=(convert.id,), kind="best-of-n")

    def _test_file(self, name: str) -> Path:
        """A file for each evaluation set, because a line of scores names the file that its pair is from."""
        if name not in self.test_files:
            self.test_files[name] = self._selection(self.recipe.data[self.recipe.evaluation[name].data])
        return self.test_files[name]

    def _files(self, data: DataSet) -> list[str | Path]:
        return [self._selection(data)] if data.is_selection else list(data.files)

    def _selection(self, data: DataSet) -> Path:
        """The file that `write_data` writes for a data set."""
        file = self.out / "data" / f"{data.name}-{self._fingerprint(data)}.jsonl"
        self._selections[file] = data
        return file

    def _fingerprint(self, data: DataSet) -> str:
        if data.name not in self._fingerprints:
            self._fingerprints[data.name] = fingerprint(data)
        return self._fingerprints[data.name]

    def _add(self, name: str, task: str, folder: Path, *words: Any, needs=(), kind: str = "", **more: Any) -> Job:
        users = self._users.setdefault(folder, [])
        job = Job(name, kind or name, task, users, folder, tuple(map(str, words)), needs, **more)
        self.jobs[job.id] = job
        return job


def content_hash(content: Any) -> str:
    """Twelve hexadecimal digits for anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def content_of(value: Any) -> Any:
    """A flag's value; in place of each file that it names, the hash of the file's content."""
    if isinstance(value, list):
        return [content_of(one) for one in value]
    return source_fingerprint(value) if isinstance(value, str) and Path(value).is_file() else value


def fingerprint(data: DataSet) -> str:
    """Hash of the files' content and of the way rows are selected.

    Raises:
        ConfigError: a file is missing.
    """
    for file in data.files:
        if not source_is_there(file):
            raise ConfigError(f"data.{data.name}: {file}: no such file. Check the path, or the variables given with --set.")
    return content_hash([[source_fingerprint(file) for file in data.files], data.where, data.rows, data.seed])


def write_selection(data: DataSet, file: Path) -> None:
    """Write the rows of a data set to `file`, one JSON object a line.

    A smaller selection with the same seed is part of a larger one.

    Raises:
        ConfigError: fewer rows than wanted, or none.
        DataError: a row cannot be read.
    """
    rows = [
        row
        for row in read_items(data.files, lambda row, _: [row])
        if all(isinstance(row, dict) and row.get(name) in values for name, values in data.where.items())
    ]
    if len(rows) < (data.rows or 1):
        raise ConfigError(f"data.{data.name}: {data.rows or 1} rows wanted, but {len(rows)} match {data.where}.")
    if data.rows is not None:
        drawn = random.Random(data.seed).sample(range(len(rows)), len(rows))[: data.rows]
        rows = [rows[number] for number in sorted(drawn)]
    with write_atomically(file) as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")


def _words_of(flags: dict[str, Any]) -> tuple[str, ...]:
    """Flags as words of a command line; of several `config` files, each has a --config of its own."""
    words: list[str] = []
    for name, value in flags.items():
        for one in value if name == "config" and isinstance(value, list) else [value]:
            words += flag_words(name, one)
    return tuple(words)
