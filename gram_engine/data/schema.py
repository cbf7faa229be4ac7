"""The rows of preference data, independent of the file format that they came from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Sequence


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, and which of them is better.

    `preference` is the probability that A is better: 1.0 A, 0.0 B, 0.5 tie, nan unlabelled. `margin` tells by how much the
    better response is better (nan: unknown). `source_location` is "file:line", for error messages.
    """

    prompt: str
    response_a: str
    response_b: str
    preference: float
    weight: float = 1.0
    margin: float = math.nan
    source_location: str = ""


@dataclass(frozen=True)
class PreformattedRow:
    """A row whose text is already in the form of the judge template (`instruction` -> `output`); it is used unchanged."""

    instruction: str
    output: str
    weight: float = 1.0
    source_location: str = ""


@dataclass(frozen=True)
class ResponseList:
    """Responses to one prompt, to be ranked; `reference` is the index of the one they are compared with, if the data has it."""

    prompt: str
    responses: tuple[str, ...]
    reference: int | None = None
    source_location: str = ""


# Names of speakers in chat data and how they are written in a prompt; other names stay as they are.
_ROLES = {
    "user": "Human",
    "human": "Human",
    "prompter": "Human",
    "assistant": "Assistant",
    "gpt": "Assistant",
    "chatbot": "Assistant",
    "bot": "Assistant",
    "model": "Assistant",
    "system": "System",
    "tool": "Tool",
    "function": "Tool",
    "observation": "Tool",
}


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: JSON and YAML can contain half of a surrogate pair, which is not a character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def message_of(entry: Any) -> tuple[str, str]:
    """(speaker, text) of one chat message, `{role, content}` or `{from, value}`; text parts are joined.

    Raises:
        ValueError: the entry is no message, or holds something other than text.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"a message must be an object with role and content, not {type(entry).__name__}")
    role = entry.get("role", entry.get("from"))
    content = entry.get("content", entry.get("value"))
    if not isinstance(role, str):
        raise ValueError("a message has no role (or from)")
    if isinstance(content, list):
        if any(not isinstance(part, dict) or not isinstance(part.get("text"), str) for part in content):
            raise ValueError("a message holds a part that is not text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError("a message has no content (or value)")
    return _ROLES.get(role.strip().lower(), role.strip().capitalize()), content


def dialogue_text(messages: Sequence[tuple[str, str]]) -> str:
    """Plain text of a conversation: a single user turn is its own text, several are "Human: ...\\n\\nAssistant: ..."."""
    if len(messages) == 1 and messages[0][0] == "Human":
        return messages[0][1]
    return "\n\n".join(f"{speaker}: {text}" for speaker, text in messages)
