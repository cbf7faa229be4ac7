"""A server's answers, each written down when it comes, so that no rerun asks for it again."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Iterator, Optional

from gram_engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said to one request, and what it cost."""

    margin: Optional[float]
    """Z_A - Z_B, or the reward of a scalar model; None: no verdict could be read, or the server refused this request."""
    text: str = ""
    """What a chat model wrote, or why the request was refused."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Answers:
    """Answers by the key of their request; in memory only where a file keeps them.

    The file has a line for each answer, in the order in which they came: {"key", "margin", "text", "prompt_tokens",
    "completion_tokens"}. A line that a killed process left unfinished is passed over.

    Args:
        path: the file; None: nothing is kept.

    Raises:
        ConfigError: the file cannot be read or written.
    """

    def __init__(self, path: Optional[str | Path]):
        self.prompt_tokens = self.completion_tokens = 0
        self._known: dict[str, Answer] = {}
        self._file = None
        if path is not None:
            try:
                self._open(Path(path))
            except OSError as error:
                raise ConfigError(f"--server-answers {path}: {error.strerror}. Name a file that can be written.") from None

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Optional[Answer]:
        """The answer to the request with this key, without its text; None: it was not asked yet."""
        return self._known.get(key)

    def add(self, key: str, answer: Answer) -> None:
        """Keep an answer. It is in the file when this returns."""
        if self._file is not None:
            self._file.write(json.dumps({"key": key, **asdict(answer)}).encode() + b"\n")
        self._remember(key, answer)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab+", buffering=0)  # each answer is one write at the end of the file
        self._file.seek(0)
        content = self._file.read()
        for key, answer in _whole_lines(content):
            self._remember(key, answer)
        if content and not content.endswith(b"\n"):
            self._file.write(b"\n")

    def _remember(self, key: str, answer: Answer) -> None:
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens
        if self._file is not None:
            self._known[key] = replace(answer, text="")


_FIELDS = {field.name for field in fields(Answer)} | {"key"}


def _whole_lines(content: bytes) -> Iterator[tuple[str, Answer]]:
    for line in content.splitlines():
        try:
            fields_of_line: Any = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(fields_of_line, dict) or fields_of_line.keys() != _FIELDS:
            continue
        key, answer = fields_of_line.pop("key"), Answer(**fields_of_line)
        if isinstance(key, str) and _is_answer(answer):
            yield key, answer


def _is_answer(answer: Answer) -> bool:
    counts = (answer.prompt_tokens, answer.completion_tokens)
    margin = answer.margin is None or (type(answer.margin) in (int, float) and math.isfinite(answer.margin))
    return margin and all(type(count) is int for count in counts)
