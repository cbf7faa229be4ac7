"""A recipe: data, stages of training, the variants made of them, and the sections of the report. YAML -> checked dataclasses.

examples/recipes/tiny.yaml is a short example of every part.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Mapping, Optional, get_args

import yaml

from gram_engine.errors import ConfigError
from gram_engine.reproduce.paper import PUBLISHED

Kind = Literal["in", "out", "hhh", "task"]
FlagValue = str | int | float | bool | list

OWN_FLAGS = ("data", "data_path", "data_cache_path", "save", "load", "pretrained_checkpoint", "seed", "dry_run")
"""Flags that the runner gives, so that no recipe may."""
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
_VARIABLE = re.compile(r"\$\{([^}]*)\}")


@dataclass(frozen=True)
class DataSet:
    """Rows of some files."""

    name: str
    files: tuple[str, ...]
    """As --data takes them."""
    where: Mapping[str, list] = field(default_factory=dict)
    """Only rows whose field has one of the values."""
    rows: Optional[int] = None
    """So many of them, drawn with `seed`; None: all."""
    seed: int = 0

    @property
    def is_selection(self) -> bool:
        """Whether the rows differ from those of the files."""
        return bool(self.where) or self.rows is not None


@dataclass(frozen=True)
class EvaluationSet:
    """Held-out pairs, and what they stand for."""

    name: str
    data: DataSet
    kind: Kind
    """in and out of the distribution of the training data, HHH-Alignment, or the task of an adaptation."""


@dataclass(frozen=True)
class Stage:
    """One training. Its weights come from the stage before it in a variant."""

    name: str
    command: Literal["pretrain", "finetune"]
    data: DataSet
    flags: Mapping[str, FlagValue]
    """All flags but OWN_FLAGS."""
    seed: Optional[int] = None
    """The same in all repetitions; None: the repetition's."""


@dataclass(frozen=True)
class Variant:
    """A model: its stages, and the sets it is measured on."""

    name: str
    stages: tuple[Stage, ...]
    evaluate: tuple[str, ...]


@dataclass(frozen=True)
class BestOfN:
    """Section 4.4: candidates, and the variants that choose among them."""

    data: DataSet
    variants: tuple[str, ...]
    n: Optional[int] = None


@dataclass(frozen=True)
class Section:
    """A part of the report: variants side by side (`rows`), or along an axis (`series`)."""

    title: str
    rows: Mapping[str, str] = field(default_factory=dict)
    """Label -> variant."""
    series: Mapping[str, Mapping[float, str]] = field(default_factory=dict)
    """Label of a line -> {place on the axis: variant}."""
    x: str = ""
    """What the axis shows."""
    reference: Optional[str] = None
    """Row that the others are compared with."""
    published: Optional[str] = None
    """Key of paper.PUBLISHED."""
    text: str = ""


@dataclass(frozen=True)
class Recipe:
    """Everything a reproduction is made of."""

    title: str
    seeds: tuple[int, ...]
    variants: Mapping[str, Variant]
    evaluation: Mapping[str, EvaluationSet]
    sections: tuple[Section, ...]
    template: str = "gram-code"
    """The --template of all stages."""
    tokenizer: Optional[tuple[DataSet, int]] = None
    """Data and size of the vocabulary to train; None: the flags name one."""
    launcher: tuple[str, ...] = ()
    """Words before examples/{pretrain,finetune}_gram.sh; none: `gram pretrain`, one process."""
    best_of_n: Optional[BestOfN] = None
    notes: tuple[str, ...] = ()
    """What the figures do not show, for the report."""


def load_recipe(path: str | Path, variables: Mapping[str, str]) -> Recipe:
    """Read and check a recipe; `variables` are --set's, and win over the recipe's own.

    Raises:
        ConfigError: the file is missing or no YAML, a key is unknown, missing or of the wrong type, a name is not defined.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"--recipe {path}: no such file.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    try:
        return _recipe(content, variables)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _recipe(content: Any, variables: Mapping[str, str]) -> Recipe:
    parts = dict(
        title=str, variables=dict, seeds=list, tokenizer=dict, launcher=str, flags=dict, start_flags=dict, data=dict,
        evaluation=dict, stages=dict, variants=dict, best_of_n=dict, sections=list, notes=list,
    )  # fmt: skip
    top = _fields(content, "the recipe", parts, ("title", "seeds", "data", "evaluation", "stages", "variants", "sections"))
    top = _substituted(top, _variables(top.get("variables", {}), variables))
    data = {name: _data_set(name, entry) for name, entry in _named(top["data"], "data")}
    evaluation = {name: _evaluation_set(name, entry, data) for name, entry in top["evaluation"].items()}
    common = _flags(top.get("flags", {}), "flags", bool(top.get("tokenizer")))
    stages = {name: _stage(name, entry, data, common) for name, entry in _named(top["stages"], "stages")}
    start = _flags(top.get("start_flags", {}), "start_flags", False)
    defaults = tuple(name for name, one in evaluation.items() if one.kind != "task")
    variants = {
        name: _variant(name, entry, stages, data, evaluation, start, defaults)
        for name, entry in _named(top["variants"], "variants")
    }
    seeds = top["seeds"]
    if not seeds or len(set(seeds)) < len(seeds) or any(type(seed) is not int for seed in seeds):
        raise ConfigError(f"seeds must be different whole numbers, not {seeds}.")
    return Recipe(
        title=top["title"],
        seeds=tuple(seeds),
        variants=variants,
        template=common.get("template", "gram-code"),
        evaluation=evaluation,
        sections=tuple(_section(entry, variants) for entry in top["sections"]),
        tokenizer=_tokenizer(top["tokenizer"], data) if "tokenizer" in top else None,
        launcher=tuple(top.get("launcher", "").split()),
        best_of_n=_best_of_n(top["best_of_n"], data, variants) if "best_of_n" in top else None,
        notes=tuple(map(str, top.get("notes", []))),
    )


def _variables(own: dict, given: Mapping[str, str]) -> dict[str, str]:
    for name in given:
        if name not in own:
            raise ConfigError(f"--set {name}=...: the recipe has no such variable.{_hint(name, own)}")
    return {**own, **given}


def _substituted(value: Any, variables: Mapping[str, Any]) -> Any:
    """The content with each ${name} replaced."""
    if isinstance(value, dict):
        return {name: _substituted(entry, variables) for name, entry in value.items()}
    if isinstance(value, list):
        return [_substituted(entry, variables) for entry in value]
    if not isinstance(value, str):
        return value
    for name in _VARIABLE.findall(value):
        if variables.get(name) is None:
            remedy = f"Give it: --set {name}=VALUE" if name in variables else "Name it under 'variables'."
            raise ConfigError(f"'{value}': variable '{name}' has no value. {remedy}")
    return _VARIABLE.sub(lambda match: str(variables[match[1]]), value)


def _data_set(name: str, entry: Any) -> DataSet:
    place = f"data.{name}"
    kinds = dict(files=list, where=dict, rows=int, seed=int)
    fields = _fields(entry, place, kinds, ("files",))
    where = {key: value if isinstance(value, list) else [value] for key, value in fields.get("where", {}).items()}
    if fields.get("rows", 1) < 1 or not fields["files"]:
        raise ConfigError(f"{place}: needs at least one file and one row.")
    return DataSet(**{**fields, "name": name, "files": tuple(map(str, fields["files"])), "where": where})


def _evaluation_set(name: str, entry: Any, data: Mapping[str, DataSet]) -> EvaluationSet:
    place = f"evaluation.{name}"
    fields = _fields(entry, place, dict(data=str, kind=str), ("data", "kind"))
    _one_of(fields["kind"], get_args(Kind), f"{place}.kind")
    return EvaluationSet(name, _lookup(fields["data"], data, place, "data"), fields["kind"])


def _stage(name: str, entry: Any, data: Mapping[str, DataSet], common: dict) -> Stage:
    place = f"stages.{name}"
    fields = _fields(entry, place, dict(command=str, data=str, flags=dict, seed=int), ("command", "data"))
    _one_of(fields["command"], ("pretrain", "finetune"), f"{place}.command")
    flags = {**common, **_flags(fields.get("flags", {}), f"{place}.flags", False)}
    return Stage(name, fields["command"], _lookup(fields["data"], data, place, "data"), flags, fields.get("seed"))


def _variant(name: str, entry: Any, stages, data, evaluation, start: dict, defaults: tuple[str, ...]) -> Variant:
    place = f"variants.{name}"
    if isinstance(entry, list):
        entry = {"stages": entry}
    fields = _fields(entry, place, dict(stages=list, evaluate=list), ("stages",))
    if not fields["stages"]:
        raise ConfigError(f"{place}: has no stage.")
    used = [_use(one, place, stages, data) for one in fields["stages"]]
    used[0] = replace(used[0], flags={**used[0].flags, **start})
    for one in fields.get("evaluate", []):
        _lookup(one, evaluation, place, "evaluation")
    return Variant(name, tuple(used), tuple(fields.get("evaluate", defaults)))


def _use(entry: Any, place: str, stages: Mapping[str, Stage], data: Mapping[str, DataSet]) -> Stage:
    """A stage of a variant: its name, or {stage, flags, data} with what differs."""
    if isinstance(entry, str):
        return _lookup(entry, stages, place, "stages")
    fields = _fields(entry, place, dict(stage=str, flags=dict, data=str), ("stage",))
    stage = _lookup(fields["stage"], stages, place, "stages")
    flags = {**stage.flags, **_flags(fields.get("flags", {}), place, False)}
    return replace(stage, flags=flags, data=_lookup(fields.get("data", stage.data.name), data, place, "data"))


def _section(entry: Any, variants: Mapping[str, Variant]) -> Section:
    kinds = dict(title=str, rows=dict, series=dict, x=str, reference=str, published=str, text=str)
    fields = _fields(entry, "a section", kinds, ("title",))
    place = f"section '{fields['title']}'"
    if ("rows" in fields) == ("series" in fields):
        raise ConfigError(f"{place}: give either rows or series.")
    for label, points in fields.get("series", {}).items():
        if not isinstance(points, dict) or any(type(at) not in (int, float) for at in points):
            raise ConfigError(f"{place}: series '{label}' must be {{number: variant}}.")
    named = [*fields.get("rows", {}).values(), *(name for line in fields.get("series", {}).values() for name in line.values())]
    for name in named:
        _lookup(name, variants, place, "variants")
    for key, known in (("reference", fields.get("rows", {})), ("published", PUBLISHED)):
        if key in fields:
            _lookup(fields[key], known, place, "its rows" if key == "reference" else "the paper's tables (paper.yaml)")
    return Section(**fields)


def _tokenizer(entry: Any, data: Mapping[str, DataSet]) -> tuple[DataSet, int]:
    fields = _fields(entry, "tokenizer", dict(data=str, vocab_size=int), ("data", "vocab_size"))
    return _lookup(fields["data"], data, "tokenizer", "data"), fields["vocab_size"]


def _best_of_n(entry: Any, data: Mapping[str, DataSet], variants: Mapping[str, Variant]) -> BestOfN:
    fields = _fields(entry, "best_of_n", dict(data=str, variants=list, n=int), ("data", "variants"))
    for name in fields["variants"]:
        _lookup(name, variants, "best_of_n", "variants")
    return BestOfN(_lookup(fields["data"], data, "best_of_n", "data"), tuple(fields["variants"]), fields.get("n"))


def _flags(flags: dict, place: str, has_tokenizer: bool) -> dict[str, FlagValue]:
    for name, value in flags.items():
        if name in OWN_FLAGS or (has_tokenizer and name == "tokenizer_model"):
            raise ConfigError(f"{place}.{name}: the runner gives this flag itself. Leave it out.")
        if not isinstance(value, FlagValue):
            raise ConfigError(f"{place}.{name}: {value!r} is no value of a flag.")
    return flags


def _fields(content: Any, place: str, kinds: Mapping[str, type], required: tuple[str, ...]) -> dict[str, Any]:
    """A mapping whose keys and types are as they must be."""
    if not isinstance(content, dict):
        raise ConfigError(f"{place}: must be a mapping with the keys {', '.join(kinds)}, not {content!r}.")
    for name, value in content.items():
        if name not in kinds:
            raise ConfigError(f"{place}: unknown key '{name}'.{_hint(name, kinds)}")
        if not isinstance(value, kinds[name]) or isinstance(value, bool):
            raise ConfigError(f"{place}.{name}: must be a {kinds[name].__name__}, not {value!r}.")
    for name in required:
        if name not in content:
            raise ConfigError(f"{place}: '{name}' is missing.")
    return dict(content)


def _named(entries: dict, place: str):
    """Items whose names can be parts of file names."""
    for name, entry in entries.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(f"{place}: the name {name!r} must be letters, digits, '.', '_', '+' or '-'.")
        yield name, entry


def _lookup(name: Any, known: Mapping[str, Any], place: str, what: str) -> Any:
    if name not in known:
        raise ConfigError(f"{place}: '{name}' is not among {what} ({', '.join(map(str, known))}).{_hint(name, known)}")
    return known[name]


def _one_of(value: str, choices: tuple[str, ...], place: str) -> None:
    if value not in choices:
        raise ConfigError(f"{place}: '{value}' must be one of {', '.join(choices)}.")


def _hint(name: Any, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(str(name), list(map(str, known)), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
