"""A recipe: data sets, training stages, the variants made of them, and the sections of the report; YAML, checked by pydantic.

examples/recipes/tiny.yaml is a short example of every part.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Iterable, Literal, Mapping, Optional

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PositiveInt, model_validator

from gram_engine.errors import ConfigError
from gram_engine.files import read_yaml
from gram_engine.reproduce.paper import PUBLISHED

RESERVED_FLAGS = ("data", "data_path", "data_cache_path", "save", "load", "pretrained_checkpoint", "seed", "dry_run")
"""Flags that `gram reproduce` sets itself."""


def _file_name_part(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
        raise ValueError(f"the name '{name}' must be letters, digits, '.', '_', '+' or '-'.")
    return name


def _not_reserved(flag: str) -> str:
    if flag in RESERVED_FLAGS:
        raise ValueError("gram reproduce sets this flag itself. Remove it.")
    return flag


def _flag_value(value: Any) -> Any:
    if not isinstance(value, str | int | float | bool | list):
        raise ValueError(f"no flag takes {value!r}. Give a number, text, true or false, or a list of them.")
    return value


def _defined_in(part: str) -> AfterValidator:
    """Checks that a name is a key of another part of the recipe; `load_recipe` gives the whole recipe as context."""

    def check(name: str, info: pydantic.ValidationInfo) -> str:
        if isinstance(known := info.context.get(part), dict):
            _check_name(name, known, part)
        return name

    return AfterValidator(check)


def _check_name(name: Any, known: Iterable[Any], where: str) -> None:
    if name not in known:
        raise ValueError(f"'{name}' is not among {where} ({', '.join(map(str, known))}).{_hint(name, known)}")


def _hint(name: Any, known: Iterable[Any]) -> str:
    close = difflib.get_close_matches(str(name), list(map(str, known)), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def _with_names(entries: Any) -> Any:
    """Puts its name into each entry; a list is a mapping with nothing but `stages`."""
    if not isinstance(entries, dict):
        return entries
    mappings = {name: {"stages": entry} if isinstance(entry, list) else entry for name, entry in entries.items()}
    return {name: {**entry, "name": name} if isinstance(entry, dict) else entry for name, entry in mappings.items()}


Named = BeforeValidator(_with_names)
Name = Annotated[str, AfterValidator(_file_name_part)]
DataName = Annotated[str, _defined_in("data")]
VariantName = Annotated[str, _defined_in("variants")]
Label = Annotated[str, BeforeValidator(str)]
Flags = dict[Annotated[str, AfterValidator(_not_reserved)], Annotated[Any, AfterValidator(_flag_value)]]


class Part(BaseModel, strict=True):
    """A mapping of the recipe. Unknown keys, missing keys and values of the wrong type are errors."""

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, content: Any) -> Any:
        for key in content if isinstance(content, dict) else ():
            if key not in cls.model_fields:
                raise ValueError(f"unknown key '{key}'.{_hint(key, cls.model_fields)}")
        return content


class DataSet(Part):
    """Rows of some files."""

    name: Name
    files: list[str] = Field(min_length=1)
    """As --data takes them."""
    where: dict[str, Annotated[list, BeforeValidator(lambda value: value if isinstance(value, list) else [value])]] = {}
    """Field -> values: only rows in which the field has one of the values."""
    rows: Optional[PositiveInt] = None
    """Number of rows, drawn with `seed`; None: all."""
    seed: int = 0

    @property
    def is_selection(self) -> bool:
        """Whether it leaves out rows of the files."""
        return bool(self.where) or self.rows is not None


class EvaluationSet(Part):
    """Held-out pairs."""

    data: DataName
    kind: Literal["in", "out", "hhh", "task"]
    """In or out of the distribution of the training data, HHH-Alignment, or the task of an adaptation."""


class Stage(Part):
    """One training. It starts from the weights of the stage before it in a variant."""

    name: Name
    command: Literal["pretrain", "finetune"]
    data: DataName
    flags: Flags = {}
    seed: Optional[int] = None
    """The same seed in all repetitions; None: that of the repetition."""


class StageUse(Part):
    """A stage in a variant, with what differs there."""

    stage: Annotated[str, _defined_in("stages")]
    flags: Flags = {}
    data: Optional[DataName] = None


class Variant(Part):
    """A model: its stages, and the evaluation sets it is measured on."""

    name: Name
    stages: list[Annotated[StageUse, BeforeValidator(lambda use: {"stage": use} if isinstance(use, str) else use)]] = Field(
        min_length=1
    )
    evaluate: Optional[list[Annotated[str, _defined_in("evaluation")]]] = None
    """Left out: all sets but those of the kind `task`, which `Recipe` fills in."""


class Tokenizer(Part):
    """The tokenizer to train."""

    data: DataName
    vocab_size: PositiveInt


class BestOfN(Part):
    """Section 4.4: candidates, and the variants that choose among them."""

    data: DataName
    variants: list[VariantName]
    n: Optional[PositiveInt] = None


class Section(Part):
    """A part of the report: variants in a table (`rows`), or along an axis (`series`)."""

    title: str
    rows: dict[Label, VariantName] = {}
    """Label -> variant."""
    series: dict[Label, dict[float, VariantName]] = {}
    """Label of a line -> {x: variant}."""
    x: str = ""
    """Label of the x axis."""
    reference: Optional[Label] = None
    """Row that the others are compared with."""
    published: Optional[str] = None
    """Key of paper.PUBLISHED."""
    text: str = ""

    @model_validator(mode="after")
    def _check_section(self) -> Section:
        if bool(self.rows) == bool(self.series):
            raise ValueError("give either rows or series.")
        if self.reference is not None:
            _check_name(self.reference, self.rows, "its rows")
        if self.published is not None:
            _check_name(self.published, PUBLISHED, "the paper's results (paper.yaml)")
        return self


class Recipe(Part):
    """What `gram reproduce` runs. Its parts refer to each other by name."""

    title: str
    variables: dict[str, Any] = {}
    """Values of ${name}, unless --set gives others."""
    seeds: list[int] = Field(min_length=1)
    flags: Flags = {}
    """Flags of every stage."""
    start_flags: Flags = {}
    """Flags of the first stage of each variant."""
    tokenizer: Optional[Tokenizer] = None
    """None: the flags name a tokenizer."""
    launcher: str = ""
    """Words before examples/{pretrain,finetune}_gram.sh; none: `gram pretrain`, one process."""
    data: Annotated[dict[str, DataSet], Named]
    evaluation: dict[str, EvaluationSet]
    stages: Annotated[dict[str, Stage], Named]
    variants: Annotated[dict[str, Variant], Named]
    best_of_n: Optional[BestOfN] = None
    sections: list[Section]
    notes: list[Label] = []
    """What the figures do not show, for the report."""

    @model_validator(mode="after")
    def _complete(self) -> Recipe:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} must differ from each other.")
        if self.tokenizer and "tokenizer_model" in self.flags:
            raise ValueError("flags.tokenizer_model: gram reproduce sets this flag itself, to its own tokenizer. Remove it.")
        for variant in self.variants.values():
            if variant.evaluate is None:
                variant.evaluate = [name for name, one in self.evaluation.items() if one.kind != "task"]
        return self

    @property
    def template(self) -> str:
        """Judge template of all stages."""
        return self.flags.get("template", "gram-code")

    def stages_of(self, variant: Variant) -> list[Stage]:
        """The stages of a variant with all their flags: the recipe's, the stage's, the variant's, and `start_flags`."""
        stages = []
        for use in variant.stages:
            stage = self.stages[use.stage]
            flags = {**self.flags, **stage.flags, **use.flags, **({} if stages else self.start_flags)}
            stages.append(stage.model_copy(update={"flags": flags, "data": use.data or stage.data}))
        return stages


def load_recipe(path: str | Path, variables: Mapping[str, str]) -> Recipe:
    """Read and check a recipe; `variables`, those of --set, replace the recipe's own.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, missing or of the wrong type, a name is not defined.
    """
    if not Path(path).is_file():
        raise ConfigError(f"--recipe {path}: no such file.")
    content = read_yaml(path)
    try:
        if isinstance(content, dict):
            content = _substitute(content, _merge_variables(content.get("variables"), variables))
        return Recipe.model_validate(content, context=content)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {_message(problem)}" for problem in error.errors())) from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def _merge_variables(own: Any, given: Mapping[str, str]) -> dict[str, Any]:
    own = own if isinstance(own, dict) else {}
    for name in given:
        if name not in own:
            raise ValueError(f"--set {name}=...: the recipe has no such variable.{_hint(name, own)}")
    return {**own, **given}


def _substitute(value: Any, variables: Mapping[str, Any]) -> Any:
    """The content with each ${name} replaced."""
    if isinstance(value, dict):
        return {name: _substitute(entry, variables) for name, entry in value.items()}
    if isinstance(value, list):
        return [_substitute(entry, variables) for entry in value]
    if not isinstance(value, str):
        return value
    pattern = r"\$\{([^}]*)\}"
    for name in re.findall(pattern, value):
        if variables.get(name) is None:
            remedy = f"Give it: --set {name}=VALUE" if name in variables else "Name it under 'variables'."
            raise ValueError(f"'{value}': variable '{name}' has no value. {remedy}")
    return re.sub(pattern, lambda match: str(variables[match[1]]), value)


def _message(problem: Mapping[str, Any]) -> str:
    """Place, value and remedy of one of pydantic's problems."""
    *parents, key = [str(part) for part in problem["loc"] if part != "[key]"] or ["the recipe"]
    if problem["type"] == "missing":
        return f"{'.'.join(parents) or 'the recipe'}: '{key}' is missing."
    if problem["type"] == "value_error":
        return f"{'.'.join([*parents, key])}: {problem['ctx']['error']}"
    rule = re.sub(" after validation, not 0| or instance of .*", "", problem["msg"])
    rule = re.sub("^(Input|List) should", "must", rule)
    return f"{'.'.join([*parents, key])}: {rule}, not {problem['input']!r}."
