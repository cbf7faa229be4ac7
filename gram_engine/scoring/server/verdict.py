"""From a chat model's answer to a margin: by the log-probabilities of its first token, or else by the verdict it wrote."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Iterable, Mapping, Optional

CERTAIN = 40.0
"""Margin of a verdict that was written without probabilities: the label's probability is 1 in float64."""

_THOUGHTS_END = re.compile(r"</think(?:ing)?>|<\|?/?end_of_thought\|?>")
_THOUGHTS_BEGIN = re.compile(r"<think(?:ing)?>")


def margin_of_logprobs(top: Mapping[str, float], label_a: str, label_b: str) -> Optional[float]:
    """log p(A) - log p(B) by the most probable first tokens; None if neither label is among them.

    Tokens that spell a label exactly count first; only if there is none, those that spell one between spaces or quotation
    marks do. A label that is not listed gets the most that it can have: the least listed probability, or what the listed ones
    leave of 1, whichever is smaller. Then the margin is a lower bound of the true one's size, towards the listed label.

    Args:
        top: tokens and their log-probabilities (natural logarithm).
    """
    exact = {label: top[label] for label in (label_a, label_b) if label in top}
    found = exact or _spelled_loosely(top, label_a, label_b)
    if not found:
        return None
    bound = _most_of_an_unlisted_token(top.values())
    margin = found.get(label_a, bound) - found.get(label_b, bound)
    # An even margin with one label listed: both are as improbable as the list is long, so the text has to tell.
    return margin if margin or len(found) == 2 else None


def _spelled_loosely(top: Mapping[str, float], label_a: str, label_b: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for token, logprob in top.items():
        label = token.strip(" \t\n\"'`*")
        if label in (label_a, label_b):
            found[label] = max(logprob, found.get(label, -math.inf))
    return found


def _most_of_an_unlisted_token(listed: Iterable[float]) -> float:
    """Upper bound of the log-probability of a token that is not among the most probable ones, the `listed`."""
    rest = 1.0 - math.fsum(map(math.exp, listed))
    return min(min(listed), math.log(rest) if rest > 0 else math.inf)


def margin_of_text(text: str, label_a: str, label_b: str) -> Optional[float]:
    """CERTAIN for a verdict for A, -CERTAIN for B, None if the text holds none.

    Only what follows the model's thoughts counts, and of that the last verdict of the most explicit form that occurs:
    "[[A]]", "\\boxed{A}", "<answer>A</answer>"; "Preferred: A", "the better response is A", "I choose A", "A is better"; a
    label in quotation marks or bold; a label that is the first or last line, or that punctuation follows at the beginning.
    The judge prompt's own instruction, repeated ('"A" if assistant A is better'), is no verdict.
    """
    *_, text = _THOUGHTS_END.split(text)
    if _THOUGHTS_BEGIN.search(text):  # thoughts without an end: the model was cut off
        return None
    instruction, forms = _forms(label_a, label_b)
    text = instruction.sub("", text)
    for form in forms:
        found = [next(filter(None, match.groups())) for match in form.finditer(text)]
        if found:
            return CERTAIN if found[-1] == label_a else -CERTAIN
    return None


@lru_cache
def _forms(label_a: str, label_b: str) -> tuple[re.Pattern, list[re.Pattern]]:
    """(the instruction, forms of a verdict with the most explicit first); each group of a form matches a label."""
    either = f"(?:{re.escape(label_a)}|{re.escape(label_b)})"
    label = f"({either})"
    whom = r"(?i:assistant|response|answer|option|model|one)"
    subject = r"(?i:preferred|preference|verdict|judge?ment|answer|winner|choice|decision|better|best)"
    choose = r"(?i:prefer|choose|pick|select)"
    quality = r"(?i:better|best|preferred|superior|the\s+winner|more\s+helpful)"
    mark = r"[\s\"'`*_:\[\](]*"
    between = rf"(?:\s+{whom})?[\"'`*_]*\s*(?:(?i:is|would\s+be)\b|[:=])"
    return re.compile(rf"[\"'\[]*{either}[\"'\]]*\s+if\s+(?:{whom}\s+)?{either}\s+is\s+better"), [
        re.compile(rf"\[\[\s*{label}\s*\]\]|\\boxed\{{\s*(?:\\text\{{)?\s*{label}|<answer>\s*{label}\s*</answer>"),
        re.compile(
            rf"(?:{subject}{between}|{choose}){mark}(?:{whom}{mark})?{label}(?!\w)"
            rf"|(?<!\w){label}{mark}(?i:is)\s+(?:(?i:the|clearly|slightly|much)\s+)*{quality}"
        ),
        re.compile(rf"(?:\"|'|`|\*\*|“){label}(?:\"|'|`|\*\*|”)"),
        re.compile(rf"\A\W*(?:{whom}\s+)?{label}(?=\s*(?:[.,:;)\]\n]|\Z))|^\W*(?:{whom}\s+)?{label}\W*\Z", re.MULTILINE),
    ]
