"""The judge prompt [c, x, y_a, y_b] of GRAM as a YAML file with named slots, a version and a hash.

Stage 2 uses `judge`, which ends before the label; stage 1 uses `generate` (the user's message, x) and `responses` (the target,
[y_a, y_b]). Training and scoring use the same template: it is stored with the data set, the checkpoint and the exported folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Optional

import yaml

from gram_engine.data.schema import is_unicode
from gram_engine.errors import ConfigError
from gram_engine.files import read_yaml

Span = tuple[int, int]
"""Half-open range of characters, or of tokens."""

DEFAULT_TEMPLATE = "gram-code"

_SLOT = re.compile(r"\{(prompt|response_a|response_b)\}")
_FIELDS = {"judge": ("prompt", "response_a", "response_b"), "generate": ("prompt",), "responses": ("response_a", "response_b")}


@dataclass(frozen=True)
class Layout:
    """A filled-in text with the character ranges of its slots.

    `middle` is where B's opening marker begins, `target` where a stage-1 target begins; -1: unknown or none. `add_bos` is the
    template's.
    """

    text: str
    slots: dict[str, Span]
    middle: int = -1
    target: int = -1
    add_bos: bool = False

    @property
    def has_responses(self) -> bool:
        """Whether the ranges of both responses are known."""
        return "response_a" in self.slots and "response_b" in self.slots

    def followed_by(self, other: Layout) -> Layout:
        """This text and another one after it: the stage-1 prompt and its target."""
        start = len(self.text)
        moved = {name: (begin + start, end + start) for name, (begin, end) in other.slots.items()}
        middle = other.middle + start if other.middle >= 0 else -1
        return Layout(self.text + other.text, {**self.slots, **moved}, middle, start)

    def without(self, cuts: list[Span]) -> Layout:
        """The layout without some character ranges, which are ascending and inside slots."""
        kept, position = [], 0
        for start, end in cuts:
            kept.append(self.text[position:start])
            position = end
        text = "".join(kept) + self.text[position:]

        def moved(position: int) -> int:
            return position - sum(min(position, end) - start for start, end in cuts if start < position)

        slots = {name: (moved(start), moved(end)) for name, (start, end) in self.slots.items()}
        return Layout(text, slots, moved(self.middle), moved(self.target), self.add_bos)


@dataclass(frozen=True)
class JudgeTemplate:
    """A judge template; see gram_engine/data/templates/gram-code.yaml for an example."""

    name: str
    version: int
    judge_format: str
    generate_format: str
    responses_format: str
    label_a: str
    label_b: str
    add_bos: bool = False
    """Whether a judge prompt begins with the token that the tokenizer by default begins a text with, also where the chat
    template writes that token itself."""

    @classmethod
    def load(cls, name_or_path: str | Path) -> JudgeTemplate:
        """A template that ships with the engine, by name, or a YAML file, by path.

        Raises:
            ConfigError: there is no such template, or a slot or key is missing in the file.
        """
        source = Path(name_or_path)
        if str(name_or_path) in shipped_templates():
            source = resources.files("gram_engine.data") / "templates" / f"{name_or_path}.yaml"
        if not source.is_file():
            raise ConfigError(
                f"--template {name_or_path}: neither a template of the engine ({', '.join(shipped_templates())}) nor a file."
            )
        return cls.from_dict(read_yaml(source), str(source))

    @classmethod
    def from_dict(cls, content: Any, source: str) -> JudgeTemplate:
        """The template that `to_dict` wrote; `source` is named in errors.

        Raises:
            ConfigError: a slot or a key is missing, unknown, or of another type.
        """
        if not isinstance(content, dict):
            raise ConfigError(f"{source}: a template is a mapping with the keys {', '.join(_KEYS)}.")
        missing, unknown = sorted(_KEYS - content.keys()), sorted(map(str, content.keys() - _KEYS - {"add_bos"}))
        if missing or unknown:
            found = f"missing: {', '.join(missing)}" if missing else f"unknown: {', '.join(unknown)}"
            raise ConfigError(f"{source}: a template has the keys {', '.join(sorted(_KEYS))}; {found}.")
        content = dict(content)
        add_bos = content.pop("add_bos", False)
        if not isinstance(add_bos, bool):
            raise ConfigError(f"{source}: 'add_bos' is of type {type(add_bos).__name__}. Write true or false.")
        for key, value in content.items():
            if isinstance(value, bool) or not isinstance(value, _KINDS[key]):
                wanted = "a whole number" if key == "version" else "text, in quotes where YAML would read it as something else"
                raise ConfigError(f"{source}: '{key}' is of type {type(value).__name__}. Write {wanted}.")
            if not is_unicode(str(value)):
                raise ConfigError(f"{source}: '{key}' holds half of a surrogate pair. Write the whole character.")
        for key, slots in _FIELDS.items():
            if _SLOT.findall(content[key]) != list(slots):
                wanted = ", ".join(f"{{{slot}}}" for slot in slots)
                raise ConfigError(f"{source}: '{key}' must hold each of {wanted} once, in this order.")
        label_a, label_b = str(content["label_a"]), str(content["label_b"])
        if not label_a or not label_b or label_a == label_b:
            raise ConfigError(f"{source}: label_a '{label_a}' and label_b '{label_b}' must be two different words.")
        texts = (content["judge"], content["generate"], content["responses"])
        return cls(str(content["name"]), int(content["version"]), *texts, label_a, label_b, add_bos)

    def to_dict(self) -> dict[str, Any]:
        """The template as the mapping that a template file holds."""
        content = {key.removesuffix("_format"): value for key, value in asdict(self).items()}
        if not self.add_bos:
            del content["add_bos"]  # templates have the hash that they had before there was this key
        return content

    def to_yaml(self) -> str:
        """The template as the text of a template file; `load` reads it back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @property
    def sha256(self) -> str:
        """Hash of all fields; comments in the file do not change it."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def judge(self, prompt: str, response_a: str, response_b: str) -> str:
        """Stage 2: the judge prompt, which ends before the label."""
        return self.judge_layout(prompt, response_a, response_b).text

    def generate(self, prompt: str) -> str:
        """Stage 1: the user's message."""
        return self.generate_layout(prompt).text

    def responses(self, response_a: str, response_b: str) -> str:
        """Stage 1: the target, with both responses between their markers."""
        return self.responses_layout(response_a, response_b).text

    def judge_layout(self, prompt: str, response_a: str, response_b: str) -> Layout:
        """`judge` with the ranges of its slots."""
        layout = _fill(self.judge_format, prompt=prompt, response_a=response_a, response_b=response_b)
        return replace(layout, add_bos=self.add_bos)

    def generate_layout(self, prompt: str) -> Layout:
        """`generate` with the range of its slot."""
        return _fill(self.generate_format, prompt=prompt)

    def responses_layout(self, response_a: str, response_b: str) -> Layout:
        """`responses` with the ranges of its slots."""
        return _fill(self.responses_format, response_a=response_a, response_b=response_b)

    def find_judge(self, text: str) -> Optional[Layout]:
        """Layout of a preformatted judge prompt, or None if it lacks a marker of this template."""
        layout = _find(self.judge_format, text)
        return layout and replace(layout, add_bos=self.add_bos)

    def find_generate(self, text: str) -> Optional[Layout]:
        """Layout of a preformatted stage-1 prompt, or None if it lacks the marker of this template."""
        return _find(self.generate_format, text)

    def find_responses(self, text: str) -> Optional[Layout]:
        """Layout of a preformatted stage-1 target, or None if it lacks a marker of this template."""
        return _find(self.responses_format, text)


_KINDS = {"name": str, "version": int, **dict.fromkeys(_FIELDS, str), **dict.fromkeys(("label_a", "label_b"), (str, int))}
_KEYS = set(_KINDS)


def shipped_templates() -> list[str]:
    """Names of the templates in gram_engine/data/templates."""
    folder = resources.files("gram_engine.data") / "templates"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def _fill(form: str, **values: str) -> Layout:
    # Slots are replaced in one pass over the template, so that "{response_b}" inside a response stays as it is.
    pieces = _SLOT.split(form)
    text, slots, middle = [pieces[0]], {}, -1
    length = len(pieces[0])
    for slot, literal in zip(pieces[1::2], pieces[2::2]):
        slots[slot] = (length, length + len(values[slot]))
        text += [values[slot], literal]
        length = slots[slot][1] + len(literal)
        if slot == "response_a":
            middle = length - len(_opening_marker(literal))
    return Layout("".join(text), slots, middle)


def _opening_marker(between: str) -> str:
    """B's opening marker in the text between A and B: the last line that is not empty, and what follows it."""
    return between[between.rstrip().rfind("\n") + 1 :]


def _find(form: str, text: str) -> Optional[Layout]:
    """Layout of a text that was filled in elsewhere; None if a marker is missing.

    Markers are matched without the line breaks around them: rows of the authors' data lack one before a closing marker.
    """
    pieces = _SLOT.split(form)
    names, literals = pieces[1::2], pieces[0::2]
    start, last = text.find(literals[0].strip()), literals[-1].strip()
    end = text.rfind(last) if last else len(text)
    slots, position, middle = {}, start + len(literals[0].strip()), -1
    for number, name in enumerate(names, start=1):
        marker = literals[number].strip()
        found = end if number == len(names) else text.find(marker, position)
        if start < 0 or found < position:
            return None
        slots[name] = _without_line_breaks(text, (position, found), literals[number - 1], literals[number])
        position = found + len(marker)
        if name == "response_a":
            middle = position - len(_opening_marker(marker))
    return Layout(text, slots, middle)


def _without_line_breaks(text: str, span: Span, before: str, after: str) -> Span:
    """The range without those line breaks at its ends that belong to the template."""
    start, end = span
    for _ in range(len(before) - len(before.rstrip("\n"))):
        start += text.startswith("\n", start, end)
    for _ in range(len(after) - len(after.lstrip("\n"))):
        end -= text.endswith("\n", start, end)
    return start, end
