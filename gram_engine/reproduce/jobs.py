"""From a recipe to jobs: each a command that a user could give, in a folder named after all that its result depends on.

So stages that variants share are trained once, a changed recipe runs only what changed, and a killed reproduction goes on.

    OUT/data/NAME-HASH.jsonl                  rows of a data set that selects
    OUT/tokenizer-HASH/tokenizer.model
    OUT/stages/COMMAND-sSEED-HASH/checkpoint  with train.log and train.done.json beside it, as for every other job
                                 /model       for the last stage of a variant
                                 /evaluate-HASH  report, scores.jsonl
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from gram_engine.config.parse import flag_words
from gram_engine.data.sources import source_fingerprint
from gram_engine.errors import ConfigError
from gram_engine.reproduce.data import content_hash, fingerprint, prepare
from gram_engine.reproduce.recipe import DataSet, Recipe, Stage, Variant

ROOT = Path(__file__).resolve().parents[2]
FORMAT = 1
"""Goes up when the same recipe means other jobs."""


@dataclass(frozen=True)
class Job:
    """One command."""

    name: str
    """What it does, as part of file names: train, convert, evaluate-HASH ..."""
    kind: str
    """Jobs of one kind take about as long as each other."""
    task: str
    """In words: `train stage2, seed 1`."""
    users: list[str]
    """Variants that it is done for."""
    folder: Path
    command: tuple[str, ...]
    needs: tuple[str, ...]
    """Jobs (`id`) whose results it reads."""
    replaces: Optional[Path] = None
    """Folder to remove before it starts."""
    trainer_flags: tuple[str, ...] = ()
    """The flags of a training, for a check before anything starts."""

    @property
    def id(self) -> str:
        return f"{self.folder.name}/{self.name}"

    @property
    def title(self) -> str:
        """The task, and some of its users."""
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

    def __str__(self) -> str:
        return shlex.join(self.command)


@dataclass
class JobGraph:
    """A recipe's jobs, each behind those it needs."""

    recipe: Recipe
    out: Path
    jobs: dict[str, Job] = field(default_factory=dict)
    models: dict[tuple[str, int], Path] = field(default_factory=dict)
    """(variant, seed) -> folder of its last stage; seeds share it where every stage has a seed of its own."""
    evaluations: dict[Path, Job] = field(default_factory=dict)
    """Folder of a last stage -> its evaluation."""
    best_of_n: dict[Path, Job] = field(default_factory=dict)
    test_files: dict[str, Path] = field(default_factory=dict)
    """Evaluation set -> its rows."""
    selections: dict[Path, DataSet] = field(default_factory=dict)
    """Files to write before the jobs start."""

    def write_data(self) -> None:
        """Write the selections that are not there yet. Raises as `prepare`."""
        for file, data in self.selections.items():
            if not file.is_file():
                prepare(data, file)

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


def make_jobs(recipe: Recipe, out: Path) -> JobGraph:
    """All jobs of a recipe below the folder `out`; nothing is written.

    Raises:
        ConfigError: a data file or the template is missing.
    """
    builder = _Builder(recipe, out)
    for seed in recipe.seeds:
        for variant in recipe.variants.values():
            builder.add_variant(variant, seed)
    builder.add_measurements()
    builder.sort()
    return builder.graph


class _Builder:
    def __init__(self, recipe: Recipe, out: Path):
        self.recipe, self.graph = recipe, JobGraph(recipe, out)
        self._fingerprints: dict[str, str] = {}
        self._users: dict[Path, list[str]] = {}
        self.tokenizer: Optional[Job] = self._tokenizer() if recipe.tokenizer else None

    def add_variant(self, variant: Variant, seed: int) -> None:
        """The trainings of a variant that no other has brought yet."""
        parent: Optional[Job] = None
        for stage in variant.stages:
            parent = self._train(stage, seed if stage.seed is None else stage.seed, parent)
            if variant.name not in parent.users:
                parent.users.append(variant.name)
        self.graph.models[variant.name, seed] = parent.folder

    def add_measurements(self) -> None:
        """Export and evaluation of every last stage, on the sets of all variants that end there."""
        recipe = self.recipe
        chosen = recipe.best_of_n.variants if recipe.best_of_n else ()
        variants: dict[Path, list[Variant]] = {}
        for (name, _), folder in self.graph.models.items():
            variants.setdefault(folder, []).append(recipe.variants[name])
        for folder, own in variants.items():
            sets = [name for name in recipe.evaluation if any(name in variant.evaluate for variant in own)]
            model = self.graph.jobs[f"{folder.name}/train"].task.removeprefix("train ")
            convert = self._convert(folder, model)
            if sets:
                self.graph.evaluations[folder] = self._evaluate(folder, model, sets, convert)
            if any(variant.name in chosen for variant in own):
                self.graph.best_of_n[folder] = self._best_of_n(folder, model, convert)

    def sort(self) -> None:
        """Put what is done with a model right behind its training, so that figures come early."""
        folders: dict[Path, list[Job]] = {}
        for job in self.graph.jobs.values():
            folders.setdefault(job.folder, []).append(job)
        self.graph.jobs = {job.id: job for own in folders.values() for job in own}

    def _train(self, stage: Stage, seed: int, parent: Optional[Job]) -> Job:
        identity = {
            "format": FORMAT,
            "command": stage.command,
            "flags": {name: _content_of(value) for name, value in stage.flags.items()},
            "data": self._fingerprint(stage.data),
            "seed": seed,
            "from": parent.id if parent else None,
            "tokenizer": self.tokenizer.id if self.tokenizer else None,
        }
        folder = self.graph.out / "stages" / f"{stage.command}-s{seed}-{content_hash(identity)}"
        if (known := self.graph.jobs.get(f"{folder.name}/train")) is not None:
            return known
        launcher = self.recipe.launcher
        door = [*launcher, ROOT / "examples" / f"{stage.command}_gram.sh"] if launcher else ["gram", stage.command]
        words = [*door, *_flags(stage), "--seed", seed, "--data", *self._files(stage.data)]
        words += ["--data-cache-path", self.graph.out / "data" / "cache"]
        words += ["--tokenizer-model", self.tokenizer.folder / "tokenizer.model"] if self.tokenizer else []
        words += ["--pretrained-checkpoint", parent.folder / "checkpoint"] if parent else []
        words += ["--save", folder / "checkpoint", "--load", folder / "checkpoint"]
        needs = tuple(job.id for job in (self.tokenizer, parent) if job)
        task = f"train {stage.name}, seed {seed}"
        kind = f"train {stage.name} on {stage.data.name}"
        return self._add("train", task, folder, *words, needs=needs, kind=kind, trainer_flags=tuple(_flags(stage)))

    def _tokenizer(self) -> Job:
        data, size = self.recipe.tokenizer
        key = content_hash([FORMAT, self._fingerprint(data), size, _content_of(self.recipe.template)])
        folder = self.graph.out / f"tokenizer-{key}"
        return self._add(
            "tokenizer", "tokenizer", folder, "gram", "train-tokenizer", "--data", *self._files(data), "--vocab-size", size,
            "--template", self.recipe.template, "--output", folder / "tokenizer.model",
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
        asked = self.recipe.best_of_n
        (file,) = self._files(asked.data, alone=True)
        name = f"best-of-n-{content_hash([file.name, asked.n])[:6]}"
        size = ["--n", asked.n] if asked.n else []
        words = ["gram", "best-of-n", file, "--model", folder / "model", "--output-dir", folder / name, *size]
        return self._add(name, f"best of n of {model}", folder, *words, needs=(convert.id,), kind="best-of-n")

    def _test_file(self, name: str) -> Path:
        """A file of its own, so that its name in a line of scores tells the set."""
        if name not in self.graph.test_files:
            (self.graph.test_files[name],) = self._files(self.recipe.evaluation[name].data, alone=True)
        return self.graph.test_files[name]

    def _files(self, data: DataSet, alone: bool = False) -> tuple[str | Path, ...]:
        if not alone and not data.is_selection:
            return data.files
        file = self.graph.out / "data" / f"{data.name}-{self._fingerprint(data)}.jsonl"
        self.graph.selections[file] = data
        return (file,)

    def _fingerprint(self, data: DataSet) -> str:
        if data.name not in self._fingerprints:
            self._fingerprints[data.name] = fingerprint(data)
        return self._fingerprints[data.name]

    def _add(self, name: str, task: str, folder: Path, *words: Any, needs=(), kind: str = "", **more: Any) -> Job:
        users = self._users.setdefault(folder, [])
        job = Job(name, kind or name, task, users, folder, tuple(map(str, words)), needs, **more)
        self.graph.jobs[job.id] = job
        return job


def _flags(stage: Stage) -> list[str]:
    return [word for name, value in stage.flags.items() for word in flag_words(name, value)]


def _content_of(value: Any) -> Any:
    """A flag's value, or the hash of the file that it names."""
    return source_fingerprint(value) if isinstance(value, str) and Path(value).is_file() else value
