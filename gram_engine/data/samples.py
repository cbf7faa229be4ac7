"""Text -> tokens: the one builder of training and scoring samples, for both stages and the Bradley-Terry baseline.

Stage 2 (`judge`): the judge prompt as a user's message, tokenised in one go, so that any server that is given the text
gets the same tokens; its last token is the label row, which predicts the label (the label itself is not stored).
Stage 1 (`generate`): the user's message, and then, tokenised apart, the target [y_a, y_b] and the end of the text.
Bradley-Terry (`conversations`): [x, y_a] and [x, y_b], each tokenised in one go, one behind the other in one sample; the
last token of each is where its reward is read.

Over-long samples lose text inside their slots, never template or label: the longer response first, then both alike; and
the beginning of the prompt only where the responses would otherwise get less than half of the room.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Callable, Literal

from gram_engine.data.conversation import Conversation
from gram_engine.data.schema import Pair, PreformattedRow
from gram_engine.data.template import JudgeTemplate, Layout, Span
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import ConfigError, DataError

Overlong = Literal["truncate", "drop", "error"]

LEAST_SLOT_TOKENS = 8
"""Room that the prompt and each response must have beside the template."""


class OverlongSample(DataError):
    """A sample over --seq-length that `--overlong` drop or error turns away."""


@dataclass
class Sample:
    """Tokens of one sequence, or of two; ranges are in token positions, -1 where the text does not show them.

    `middle` is where the part of the second response begins: its opening marker in stage 1, its sequence for Bradley-Terry.
    """

    tokens: list[int]
    truncated: bool = False
    target_start: int = -1
    response_a: Span = (-1, -1)
    middle: int = -1
    response_b: Span = (-1, -1)


def build_judge(
    tokenizer: Tokenizer,
    template: JudgeTemplate,
    prompt: str,
    a: str,
    b: str,
    max_tokens: int,
    overlong: Overlong = "truncate",
) -> list[int]:
    """Tokens of a judge prompt; the hidden state at the last one predicts the label.

    Raises:
        OverlongSample: it does not fit into `max_tokens` and `overlong` is not "truncate".
        ConfigError: `max_tokens` is too small for the template itself.
    """
    return judge_sample(tokenizer, template.judge_layout(prompt, a, b), max_tokens, overlong).tokens


def build_generate(
    tokenizer: Tokenizer,
    template: JudgeTemplate,
    prompt: str,
    a: str,
    b: str,
    max_tokens: int,
    overlong: Overlong = "truncate",
) -> Sample:
    """Tokens of a stage-1 sample with the ranges of its target and responses; raises as `build_judge`."""
    layout = template.generate_layout(prompt).followed_by(template.responses_layout(a, b))
    return generate_sample(tokenizer, layout, max_tokens, overlong)


def judge_sample(tokenizer: Tokenizer, layout: Layout, max_tokens: int, overlong: Overlong) -> Sample:
    """`build_judge` for a text that is already laid out."""

    def build(candidate: Layout) -> Sample:
        return Sample(tokenizer.prefix_ids + tokenizer.encode(tokenizer.wrap_user(candidate.text)))

    return _fitting(tokenizer, layout, build, max_tokens, overlong)


def generate_sample(tokenizer: Tokenizer, layout: Layout, max_tokens: int, overlong: Overlong) -> Sample:
    """`build_generate` for texts that are already laid out, prompt and target in one (`Layout.followed_by`)."""

    def build(candidate: Layout) -> Sample:
        user, target = candidate.text[: candidate.target], candidate.text[candidate.target :]
        tokens = tokenizer.prefix_ids + tokenizer.encode(tokenizer.wrap_user(user))
        encoding, start = tokenizer.encoding(target), len(tokens)

        def position(place: int) -> int:
            return start + _first_token_from(encoding, place - candidate.target) if place >= 0 else -1

        slots = [candidate.slots.get(name, (-1, -1)) for name in ("response_a", "response_b")]
        ranges = [(position(begin), position(end)) for begin, end in slots]
        tokens += [*encoding.ids, tokenizer.eos_id]
        return Sample(tokens, False, start, ranges[0], position(candidate.middle), ranges[1])

    return _fitting(tokenizer, layout, build, max_tokens, overlong)


def conversation_sample(
    tokenizer: Tokenizer, conversation: Conversation, prompt: str, response: str, max_tokens: int, overlong: Overlong
) -> Sample:
    """Tokens of [x, y], with the range of y as `response_a`; raises as `build_judge`."""

    def build(candidate: Layout) -> Sample:
        encoding, start = tokenizer.encoding(candidate.text), len(tokenizer.prefix_ids)
        first, end = (start + _first_token_from(encoding, place) for place in candidate.slots["response"])
        return Sample(tokenizer.prefix_ids + encoding.ids, response_a=(first, end))

    return _fitting(tokenizer, conversation.layout(prompt, response), build, max_tokens, overlong)


def conversations_sample(
    tokenizer: Tokenizer, conversation: Conversation, pair: Pair, max_tokens: int, overlong: Overlong
) -> Sample:
    """Tokens of [x, y_a] and [x, y_b], each of at most `max_tokens`; raises as `build_judge`."""
    one, other = (
        conversation_sample(tokenizer, conversation, pair.prompt, response, max_tokens, overlong)
        for response in (pair.response_a, pair.response_b)
    )
    middle = len(one.tokens)
    first, end = other.response_a
    return Sample(
        one.tokens + other.tokens,
        one.truncated or other.truncated,
        response_a=one.response_a,
        middle=middle,
        response_b=(first + middle, end + middle),
    )


def _first_token_from(encoding, place: int) -> int:
    """Index of the first token that begins at character `place` or later: a token counts where it begins."""
    low, high = 0, len(encoding.ids)
    while low < high:
        mid = (low + high) // 2
        span = encoding.token_to_chars(mid)
        if span is not None and span[0] < place:
            low = mid + 1
        else:
            high = mid
    return low


def _fitting(
    tokenizer: Tokenizer, layout: Layout, build: Callable[[Layout], Sample], max_tokens: int, overlong: Overlong
) -> Sample:
    """The sample as it is, or with its slots shortened until it has at most `max_tokens` tokens."""
    sample = build(layout)
    if len(sample.tokens) <= max_tokens:
        return sample
    if overlong != "truncate":
        raise OverlongSample(
            f"{len(sample.tokens)} tokens, over --seq-length {max_tokens}. Raise it, or use --overlong truncate or drop."
        )
    if layout.slots.keys() <= {"prompt"}:
        raise OverlongSample(
            f"{len(sample.tokens)} tokens, over --seq-length {max_tokens}, and the markers of the template are not found "
            "in the text, so it cannot be shortened. Raise --seq-length, or use --overlong drop."
        )
    pieces = {name: tokenizer.encoding(layout.text[slice(*span)]) for name, span in layout.slots.items()}
    counts = {name: len(piece.ids) for name, piece in pieces.items()}
    room = max_tokens - (len(sample.tokens) - sum(counts.values()))
    _check_room(room, len(layout.slots), max_tokens)
    while True:
        shorter = layout.without(_cuts(layout, pieces, _shares(counts, room)))
        sample = build(shorter)
        if len(sample.tokens) <= max_tokens:
            sample.truncated = True
            return sample
        # Text that is cut open tokenises a little differently at the cut; take the difference off and try again.
        room -= len(sample.tokens) - max_tokens
        _check_room(room, len(layout.slots), max_tokens)


def check_seq_length(
    tokenizer: Tokenizer, template: JudgeTemplate, conversation: Conversation | None, text: str, max_tokens: int
) -> None:
    """Raise ConfigError if `max_tokens` leaves no room beside the template, or the conversation, of a task's `text`."""
    if text == "conversations":
        layout = conversation.layout("", "")
        empty = conversation_sample(tokenizer, conversation, "", "", sys.maxsize, "error")
    else:
        layout = layout_of(Pair("", "", "", 0.5), template, text, swapped=False)
        builder = judge_sample if text == "judge" else generate_sample
        empty = builder(tokenizer, layout, sys.maxsize, "error")
    _check_room(max_tokens - len(empty.tokens), len(layout.slots), max_tokens)


def label_ids(tokenizer: Tokenizer, template: JudgeTemplate) -> tuple[int, int]:
    """Ids of the template's two labels where a judge prompt ends; raises ConfigError where they are not single tokens."""
    context = tokenizer.wrap_user(template.judge("x", "y", "z"))
    return tokenizer.label_ids(template.label_a, template.label_b, context)


def _check_room(room: int, num_slots: int, max_tokens: int) -> None:
    least = LEAST_SLOT_TOKENS * num_slots
    if room < least:
        needed = max_tokens - room + least
        raise ConfigError(
            f"--seq-length {max_tokens} is too short for the template: template and chat markers alone take "
            f"{max_tokens - room} tokens, and prompt and responses need at least {least}. Use --seq-length {needed} or more."
        )


def _shares(counts: dict[str, int], room: int) -> dict[str, int]:
    """Tokens that each slot may keep: of two responses the longer one gives first, then both alike.

    The responses have at least half of the room if they need it; the prompt has what they leave.
    """
    wanted = {name: count for name, count in counts.items() if name != "prompt"}
    prompt = counts.get("prompt", 0)
    for_responses = min(sum(wanted.values()), max(room - prompt, room - room // 2))
    shorter = min(wanted.values())
    cap = max(for_responses - shorter, for_responses // len(wanted))
    return {**{name: min(count, cap) for name, count in wanted.items()}, "prompt": min(prompt, room - for_responses)}


def _cuts(layout: Layout, pieces: dict, shares: dict[str, int]) -> list[Span]:
    """Character ranges to take out: the beginning of the prompt (its oldest turns), the ends of the responses."""
    cuts = []
    for name, (start, end) in layout.slots.items():
        piece, keep = pieces[name], shares[name]
        if keep >= len(piece.ids):
            continue
        if name == "prompt":
            cuts.append((start, start + piece.token_to_chars(len(piece.ids) - keep)[0]))
        else:
            cuts.append((start + piece.token_to_chars(keep - 1)[1], end))
    return cuts


def layout_of(row: Pair | PreformattedRow, template: JudgeTemplate, text: str, swapped: bool) -> Layout:
    """The layout of a row for a task's `text` (judge or generate), with its responses as given or swapped.

    Raises:
        DataError: a ready-made row cannot serve this objective (its text without the place).
    """
    if isinstance(row, Pair):
        a, b = (row.response_b, row.response_a) if swapped else (row.response_a, row.response_b)
        if text == "judge":
            return template.judge_layout(row.prompt, a, b)
        return template.generate_layout(row.prompt).followed_by(template.responses_layout(a, b))
    if text == "judge":
        layout = template.find_judge(row.instruction) or Layout(row.instruction, {})
    else:
        user = template.find_generate(row.instruction) or Layout(row.instruction, {})
        layout = user.followed_by(template.find_responses(row.output) or Layout(row.output, {}))
    return _swap_responses(layout) if swapped else layout


def pair_of(row: Pair | PreformattedRow, template: JudgeTemplate) -> Pair | None:
    """The row as a pair; of a ready-made row what stands between the template's markers, None where they are not there."""
    if isinstance(row, Pair):
        return row
    layout = template.find_judge(row.instruction)
    if layout is None:
        return None
    texts = (layout.text[slice(*layout.slots[name])] for name in ("prompt", "response_a", "response_b"))
    return Pair(*texts, preference_of(row, template), row.weight, source_location=row.source_location)


def _swap_responses(layout: Layout) -> Layout:
    """A ready-made text with its two responses swapped between their markers."""
    (a_start, a_end), (b_start, b_end) = layout.slots["response_a"], layout.slots["response_b"]
    text = layout.text
    a, between, b = text[a_start:a_end], text[a_end:b_start], text[b_start:b_end]
    shift = len(b) - len(a)
    slots = {**layout.slots, "response_a": (a_start, a_end + shift), "response_b": (b_start + shift, b_end)}
    text = text[:a_start] + b + between + a + text[b_end:]
    return replace(layout, text=text, slots=slots, middle=layout.middle + shift)


def preference_of(row: Pair | PreformattedRow, template: JudgeTemplate) -> float:
    """Probability that A is better in the given order; nan where a row is unlabelled (also stage-1 ready-made rows)."""
    if isinstance(row, Pair):
        return row.preference
    return {template.label_a: 1.0, template.label_b: 0.0}.get(row.output.strip(), float("nan"))
