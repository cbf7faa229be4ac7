"""PREFIX.json, the manifest of preprocessed data: what the samples were made from and how. Checkpoints keep a copy."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from gram_engine.config.task import TASKS, Task
from gram_engine.data.integrity import AGAIN, SEAL, check_seal, sealed
from gram_engine.data.template import JudgeTemplate
from gram_engine.errors import DataError
from gram_engine.files import read_json, write_json

FORMAT_VERSION = 2
"""Version 2 added checksums. Data of version 1 is refused: preprocessing again costs less than training on damaged tokens."""

_OF_DATA = {"objective": str, "seq_length": int, "counts": dict, "tokenizer": dict, "template": dict, "files": dict}


@dataclass
class Manifest:
    """Fields are named as in the JSON file. An imported checkpoint's manifest has the template and the labels alone."""

    template: dict[str, Any]
    """Fields of JudgeTemplate, and its `sha256`."""
    label_ids: Optional[list[int]] = None
    """Tokens A and B; None for objectives without label tokens."""
    format_version: int = FORMAT_VERSION
    objective: Optional[str] = None
    seq_length: Optional[int] = None
    overlong: Optional[str] = None
    ties: Optional[str] = None
    pair_order: Optional[str] = None
    seed: Optional[int] = None
    counts: dict[str, int] = field(default_factory=dict)
    """Numbers of rows, samples, truncated, dropped and rejected."""
    tokens: Optional[int] = None
    """Of all samples."""
    longest: Optional[int] = None
    """Tokens of the longest sample."""
    tokenizer: dict[str, Any] = field(default_factory=dict)
    conversation: Optional[dict[str, Any]] = None
    """Fields of Conversation, for tasks with one response per sequence."""
    sources: list[dict[str, str]] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Size and checksums of .bin, .idx and .samples.npy (integrity.py)."""

    @classmethod
    def read(cls, prefix: str | Path) -> Manifest:
        """The manifest of the data at `prefix`.

        Raises:
            DataError: it is missing, damaged, or of another format version.
        """
        path = Path(f"{prefix}.json")
        if not path.is_file():
            raise DataError(f"{path}: no such file. Make it with: gram preprocess --data FILE --output-prefix {prefix}")
        content = read_json(path, DataError, AGAIN)
        version = content.get("format_version")
        if version is None:
            raise DataError(f"{path}: not a manifest of preprocessed data. {AGAIN}")
        if version != FORMAT_VERSION:
            raise DataError(f"{path}: format version {version}, this engine reads {FORMAT_VERSION}. {AGAIN}")
        check_seal(path, content)
        whole = all(isinstance(content.get(name), kind) for name, kind in _OF_DATA.items())
        known = {entry.name for entry in dataclasses.fields(cls)}
        if not whole or content["objective"] not in TASKS or not content.keys() <= known | {SEAL}:
            raise DataError(f"{path}: not a manifest of preprocessed data: a field is missing or unknown. {AGAIN}")
        return cls(**{name: value for name, value in content.items() if name != SEAL})

    def write(self, path: str | Path) -> None:
        """Write the JSON file, with a checksum of its own."""
        write_json(path, sealed(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, without fields that are not set."""
        always = ("label_ids", "conversation")
        return {name: value for name, value in vars(self).items() if name in always or value is not None}

    @property
    def task(self) -> Task:
        """The objective that the samples were made for."""
        return TASKS[self.objective]

    def judge_template(self, source: str) -> JudgeTemplate:
        """The template that the samples were made with; `source` is named in errors."""
        return JudgeTemplate.from_dict({name: value for name, value in self.template.items() if name != "sha256"}, source)


def described(template: JudgeTemplate) -> dict[str, Any]:
    """A template as a manifest keeps it."""
    return {**template.to_dict(), "sha256": template.sha256}
