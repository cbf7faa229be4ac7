"""Names and meanings of the fields of a preference row: from one raw row to checked pairs."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any, Optional, Sequence

from gram_engine.config.schema import DataConfig
from gram_engine.data.schema import Pair, PreformattedRow, ResponseList, dialogue_text, message_of

PROMPT_NAMES = ("prompt", "question", "instruction", "query", "context", "messages", "conversations", "conversation", "input")
CHOSEN_NAMES = ("chosen", "chosen_response", "response_chosen", "chosen_messages", "response_j", "preferred_response")
REJECTED_NAMES = (
    "rejected",
    "rejected_response",
    "response_rejected",
    "rejected_messages",
    "response_k",
    "dispreferred_response",
)
AB_NAMES = (
    ("response_a", "response_b"),
    ("answer_a", "answer_b"),
    ("response_0", "response_1"),
    ("response1", "response2"),
    ("response_1", "response_2"),
    ("output_1", "output_2"),
    ("conversation_a", "conversation_b"),
)
LABEL_NAMES = ("label", "winner", "preferred", "preference", "choice", "overall_preference", "better_response_id")

_SPELLINGS = {
    **dict.fromkeys(("a", "[[a]]", "model_a", "response_a", "answer_a", "assistant a", "a>b", "a>>b", "first"), 1.0),
    **dict.fromkeys(("b", "[[b]]", "model_b", "response_b", "answer_b", "assistant b", "b>a", "b>>a", "second"), 0.0),
    **dict.fromkeys(("tie", "[[c]]", "c", "equal", "same", "draw", "both", "a=b", "tie (bothbad)", "both_bad"), 0.5),
}

_SUPPORTED = (
    "{prompt, chosen, rejected}, {prompt, response_a, response_b, label}, {prompt, responses} (best first), "
    "{prompt, completions: [{completion, rank}]} or {instruction, input, output}"
)


MOST_RANKED = 256
"""Responses in a ranked list: it becomes K(K-1)/2 pairs."""
_LEAST_WEIGHT, _MOST = 1e-30, 1e30
"""Bounds of weights and margins, which are stored in fp32 and summed."""


class BadRow(Exception):
    """Why a row cannot be used, and the remedy; readers.py adds file and line."""


def row_to_samples(row: Any, source_location: str, data: DataConfig) -> list[Pair | PreformattedRow]:
    """The pairs in a raw row: one, several of a ranked list, or a preformatted row.

    Raises:
        BadRow: a field is missing, empty, of the wrong type, or the responses are equal.
    """
    if not isinstance(row, dict):
        raise BadRow(f"a row must be a JSON object, not {type(row).__name__}. Supported: {_SUPPORTED}.")
    try:
        return _convert(row, data, source_location)
    except ValueError as error:
        raise BadRow(f"{error}.") from None


def row_to_list(row: Any, source_location: str, data: DataConfig) -> list[ResponseList]:
    """The list of responses in a raw row's field `responses` (or `completions`); it needs no ranks.

    Raises:
        BadRow: a field is missing or empty, or `reference` names no response.
    """
    entries = row.get("responses", row.get("completions")) if isinstance(row, dict) else None
    if not isinstance(entries, list) or not entries:
        raise BadRow("a row must be {prompt, responses: [...]} with at least one response.")
    name = _prompt_name(row, data, exclude=("responses", "completions"))
    if name is None:
        raise BadRow("field 'prompt' is missing. Add it, or name it with --prompt-key.")
    reference = row.get("reference")
    if reference is not None and not (type(reference) is int and 0 <= reference < len(entries)):
        raise BadRow(f"reference is {_shown(reference)}. It must be the number of one of the {len(entries)} responses, from 0.")
    try:
        context = _context(row, name)
        texts = [_response(_completion_text(entry), f"responses[{number}]", context) for number, entry in enumerate(entries)]
    except ValueError as error:
        raise BadRow(f"{error}.") from None
    prompt = dialogue_text(context)
    _refuse_empty(prompt=prompt, **{f"responses[{number}]": text for number, text in enumerate(texts)})
    return [ResponseList(prompt, tuple(texts), reference, source_location)]


def _completion_text(entry: Any) -> Any:
    """The response in an entry of a list: of an object such as {completion, rank} its text, of others the entry itself."""
    if isinstance(entry, dict) and "role" not in entry and "from" not in entry:
        return next((entry[key] for key in ("completion", "response", "text", "content") if key in entry), None)
    return entry


def _convert(row: dict, data: DataConfig, source_location: str) -> list[Pair | PreformattedRow]:
    weight = _number(row, "weight", 1.0)
    if not (weight == 0 or _LEAST_WEIGHT <= weight <= _MOST):
        raise BadRow(f"weight is {weight}. It must be a finite number: 0, or from {_LEAST_WEIGHT} to {_MOST}.")
    chosen = _name_in(row, data.chosen_key, CHOSEN_NAMES, "--chosen-key")
    rejected = _name_in(row, data.rejected_key, REJECTED_NAMES, "--rejected-key")
    if chosen or rejected:
        return [_chosen_rejected(row, data, chosen, rejected, weight, source_location)]
    for name_a, name_b in AB_NAMES:
        if name_a in row or name_b in row:
            return [_labelled_pair(row, data, name_a, name_b, weight, source_location)]
    if isinstance(row.get("responses"), list) or isinstance(row.get("completions"), list):
        return _ranked(row, data, weight, source_location)
    if "instruction" in row and "output" in row:
        instruction = _instruction(row)
        output = _text(row["output"], "output")
        _refuse_empty(instruction=instruction, output=output)
        return [PreformattedRow(instruction, output, weight, source_location)]
    names = ", ".join(map(str, row)) or "none"
    raise BadRow(
        f"no responses among its fields ({names}). Supported: {_SUPPORTED}; or name yours with --chosen-key and --rejected-key."
    )


def _chosen_rejected(row, data, chosen: Optional[str], rejected: Optional[str], weight: float, source_location: str) -> Pair:
    messages = row.get("messages")
    if rejected and not chosen and isinstance(messages, list) and not isinstance(row[rejected], list):
        prompt, better = _split_answer(_messages(messages))  # the conversation ends with the chosen response
        worse = _text(row[rejected], rejected)
    else:
        if not chosen or not rejected:
            have, lack = (chosen, "rejected") if chosen else (rejected, "chosen")
            raise BadRow(f"field '{lack}' is missing beside '{have}'. Add it, or name it with --{lack}-key.")
        name = _prompt_name(row, data, exclude=(chosen, rejected))
        if name is None:
            prompt, better, worse = _implicit_prompt(row[chosen], row[rejected])
        else:
            context = _context(row, name)
            better = _response(row[chosen], chosen, context)
            worse = _response(row[rejected], rejected, context)
            prompt = dialogue_text(context)
    margin = _margin(row)
    return _checked(Pair(prompt, better, worse, 1.0, weight, margin, source_location), (chosen or "messages", rejected))


def _labelled_pair(row, data, name_a: str, name_b: str, weight: float, source_location: str) -> Pair:
    for name in (name_a, name_b):
        if name not in row:
            raise BadRow(f"field '{name}' is missing beside '{name_a if name == name_b else name_b}'. Add it.")
    context, name = [], _prompt_name(row, data, exclude=(name_a, name_b))
    if name is not None:
        context = _context(row, name)
        prompt = dialogue_text(context)
        response_a, response_b = _response(row[name_a], name_a, context), _response(row[name_b], name_b, context)
    else:
        prompt, response_a, response_b = _implicit_prompt(row[name_a], row[name_b])
    label = next((name for name in LABEL_NAMES if name in row and row[name] is not None), None)
    preference, margin = (math.nan, math.nan) if label is None else _preference(row[label], label)
    stated = _margin(row)
    margin = stated if math.isfinite(stated) else margin
    return _checked(Pair(prompt, response_a, response_b, preference, weight, margin, source_location), (name_a, name_b))


def _ranked(row, data, weight: float, source_location: str) -> list[Pair]:
    """All pairs of a ranked list; their weights sum to that of one comparison (InstructGPT's 1 / (K choose 2))."""
    name = _prompt_name(row, data, exclude=("responses", "completions"))
    if name is None:
        raise BadRow("field 'prompt' is missing. Add it, or name it with --prompt-key.")
    context = _context(row, name)
    if isinstance(row.get("responses"), list):
        ranks = row.get("ranks", row.get("rank", list(range(len(row["responses"])))))
        entries, what = row["responses"], "responses"
        if not isinstance(ranks, list) or len(ranks) != len(entries):
            raise BadRow(f"field 'ranks' must hold one number for each of the {len(entries)} responses. Lower is better.")
    else:
        entries, what = row["completions"], "completions"
        if any(not isinstance(entry, dict) or "rank" not in entry for entry in entries):
            raise BadRow("each entry of 'completions' must be an object with completion and rank. Lower is better.")
        ranks = [entry["rank"] for entry in entries]
        entries = [_completion_text(entry) for entry in entries]
    if not 2 <= len(entries) <= MOST_RANKED:
        raise BadRow(f"field '{what}' holds {len(entries)} responses. A comparison needs at least two, at most {MOST_RANKED}.")
    if any(isinstance(rank, bool) or not isinstance(rank, (int, float)) or rank != rank for rank in ranks):
        raise BadRow("a rank is not a number. Lower is better, equal ranks are ties.")
    texts = [_response(entry, f"{what}[{number}]", context) for number, entry in enumerate(entries)]
    prompt = dialogue_text(context)
    share = 2.0 / (len(texts) * (len(texts) - 1))
    pairs = []
    for i, j in combinations(range(len(texts)), 2):
        preference = 0.5 if ranks[i] == ranks[j] else float(ranks[i] < ranks[j])
        pair = Pair(prompt, texts[i], texts[j], preference, weight * share, math.nan, source_location)
        pairs.append(_checked(pair, (f"{what}[{i}]", f"{what}[{j}]")))
    return pairs


def _checked(pair: Pair, names: tuple[str, str]) -> Pair:
    _refuse_empty(**{"prompt": pair.prompt, names[0]: pair.response_a, names[1]: pair.response_b})
    if pair.response_a == pair.response_b:
        raise BadRow(f"'{names[0]}' and '{names[1]}' are equal. Nothing can be preferred: remove the row.")
    return pair


def _refuse_empty(**texts: str) -> None:
    for name, text in texts.items():
        if not text.strip():
            raise BadRow(f"'{name}' is empty. Fill it in, or remove the row.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow(
                f"'{name}' holds half of a surrogate pair at character {error.start} (a cut-off emoji). "
                "Fix it, or remove the row."
            ) from None


def _name_in(row: dict, wanted: Optional[str], names: Sequence[str], flag: str) -> Optional[str]:
    if wanted is not None:
        if wanted not in row:
            raise BadRow(f"field '{wanted}' ({flag}) is missing. The row has: {', '.join(map(str, row))}.")
        return wanted
    return next((name for name in names if name in row), None)


def _prompt_name(row: dict, data: DataConfig, exclude: Sequence[str]) -> Optional[str]:
    if data.prompt_key is not None:
        return _name_in(row, data.prompt_key, (), "--prompt-key")
    return next((name for name in PROMPT_NAMES if row.get(name) is not None and name not in exclude), None)


def _instruction(row: dict) -> str:
    """Alpaca's prompt fields `instruction` and `input`, joined as LLaMA-Factory does."""
    instruction, extra = _text(row["instruction"], "instruction"), row.get("input")
    return f"{instruction}\n{extra}" if isinstance(extra, str) and extra else instruction


def _context(row: dict, name: str) -> list[tuple[str, str]]:
    """The conversation before the responses, as a list of (speaker, text)."""
    value = row[name]
    if name == "instruction":
        value = _instruction(row)
    system = row.get("system")
    opening = [("System", system)] if isinstance(system, str) and system.strip() else []
    if isinstance(value, list):
        return opening + _messages(value, name)
    return opening + [("Human", _text(value, name))]


def _messages(value: list, name: str = "messages") -> list[tuple[str, str]]:
    try:
        return [message_of(entry) for entry in value]
    except ValueError as error:
        raise BadRow(f"field '{name}': {error}. Use a string, or messages with role and content.") from None


def _response(value: Any, name: str, context: list[tuple[str, str]]) -> str:
    """A response that is given as text, as one message, or as messages (with or without those of the prompt)."""
    if isinstance(value, dict):
        return _messages([value], name)[0][1]
    if not isinstance(value, list):
        return _text(value, name)
    messages = _messages(value, name)
    dialogue = [message for message in context if message[0] != "System"]
    bare = [message for message in messages if message[0] != "System"]
    if dialogue and bare[: len(dialogue)] == dialogue:
        messages = bare[len(dialogue) :]
    return _answer_text(messages, name)


def _answer_text(messages: list[tuple[str, str]], name: str) -> str:
    if not messages or messages[0][0] != "Assistant":
        raise BadRow(f"field '{name}' does not begin with the assistant's message after the prompt. Give only the response.")
    return messages[0][1] if len(messages) == 1 else dialogue_text(messages).removeprefix("Assistant: ")


def _split_answer(messages: list[tuple[str, str]]) -> tuple[str, str]:
    if len(messages) < 2 or messages[-1][0] != "Assistant":
        raise BadRow("field 'messages' must end with the assistant's chosen response.")
    return dialogue_text(messages[:-1]), messages[-1][1]


def _implicit_prompt(chosen: Any, rejected: Any) -> tuple[str, str, str]:
    """Prompt and responses of a row whose two fields hold whole conversations (TRL's implicit prompt, Anthropic's HH)."""
    if isinstance(chosen, list) and isinstance(rejected, list):
        first, second = _messages(chosen, "chosen"), _messages(rejected, "rejected")
    elif isinstance(chosen, str) and isinstance(rejected, str):
        first, second = _turns(chosen), _turns(rejected)
    else:
        first = second = []
    shared = 0
    while shared < min(len(first), len(second)) - 1 and first[shared] == second[shared]:
        shared += 1
    while shared > 0 and (first[shared][0] != "Assistant" or second[shared][0] != "Assistant"):
        shared -= 1
    if shared == 0:
        raise BadRow(
            "field 'prompt' is missing. Add it, name it with --prompt-key, or begin both responses with the same dialogue."
        )
    answers = _answer_text(first[shared:], "chosen"), _answer_text(second[shared:], "rejected")
    return dialogue_text(first[:shared]), *answers


def _turns(text: str) -> list[tuple[str, str]]:
    """Turns of a "\\n\\nHuman: ...\\n\\nAssistant: ..." dialogue; [] if the text does not begin as one."""
    turns: list[tuple[str, str]] = []
    for block in ("\n\n" + text.lstrip()).split("\n\n")[1:]:
        speaker, colon, rest = block.partition(":")
        if colon and speaker in ("Human", "Assistant"):
            turns.append((speaker, rest.removeprefix(" ")))
        elif turns:
            turns[-1] = (turns[-1][0], f"{turns[-1][1]}\n\n{block}")
        else:
            return []
    return turns


def _preference(value: Any, name: str) -> tuple[float, float]:
    """(probability that A is better, margin or nan) of a label in one of the usual spellings."""
    if isinstance(value, str):
        known = _SPELLINGS.get(value.strip().lower())
        if known is None:
            raise BadRow(f"{name} is '{value}'. Write A, B or tie.")
        return known, math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _MOST:
        raise BadRow(f"{name} is {_shown(value)}. Write A, B or tie.")
    if name == "overall_preference":  # HelpSteer: -3 (first much better) ... 3 (second much better)
        return (0.5 if value == 0 else float(value < 0)), abs(float(value))
    if name == "choice" and value in (0, 1):  # index of the better response
        return 1.0 - value, math.nan
    if name == "preference" and 0 <= value <= 1:
        return float(value), math.nan
    raise BadRow(
        f"{name} is {value}, which different data sets read differently. Write A, B or tie, or use 'preference': "
        "a number from 0 (B is better) to 1 (A is better)."
    )


def _margin(row: dict) -> float:
    margin = _number(row, "margin", math.nan)
    if math.isnan(margin) and row.get("score_chosen") is not None and row.get("score_rejected") is not None:
        margin = _number(row, "score_chosen", math.nan) - _number(row, "score_rejected", math.nan)
    if abs(margin) > _MOST:
        raise BadRow(f"margin is {margin}. It must be a finite number, or be left out.")
    return margin


def _number(row: dict, name: str, default: float) -> float:
    value = row.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRow(f"field '{name}' is {_shown(value)}, not a number. Write a number, or leave it out.")
    try:
        return float(value)
    except OverflowError:
        raise BadRow(f"field '{name}' is too large a number. Write a smaller one, or leave it out.") from None


def _shown(value: Any) -> str:
    """A value as it is shown in an error; of lists and objects the type alone."""
    return f"a {type(value).__name__}" if isinstance(value, (list, dict)) else repr(value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise BadRow(f"field '{name}' is {kind}, not text. Use a string, or messages with role and content.")
    return value
