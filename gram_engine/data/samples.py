"""From texts to tokens, for training and scoring alike. A task's `text` names one of three kinds of samples:

judge (stage 2): the judge prompt as a user's message, tokenised as one text, so that any server that gets the text makes the
same tokens. Its last token is the label row, which predicts the label; the label itself is not stored.
generate (stage 1): the user's message, and the target [y_a, y_b] with the end of the text, which is tokenised separately.
conversations (Bradley-Terry): [x, y_a] followed by [x, y_b], each tokenised as one text; the reward is read at its last token.

In samples over --seq-length text is cut from the slots, never from the template: from the longer response first, then from both
alike, and from the beginning of the prompt only if the responses would otherwise have less than half of the room.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Callable, Literal

from gram_engine.data.conversation import Conversation, RenderedConversation
from gram_engine.data.schema import Pair, PreformattedRow
from gram_engine.data.template import JudgeTemplate, Layout, Span
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import ConfigError, DataError

Overlong = Literal["truncate", "drop", "error"]

LEAST_SLOT_TOKENS = 8
"""The prompt and each response must have room for this many tokens beside the template."""


class OverlongSample(DataError):
    """A sample over --seq-length that cannot be shortened, or that `--overlong` drop or error refuses."""


@dataclass
class Sample:
    """The tokens of a sample; ranges are token positions in it, -1: unknown.

    `middle` is where the part of the second response begins: its opening marker in stage 1, its sequence for Bradley-Terry.
    """

    tokens: list[int]
    truncated: bool = False
    target_start: int = -1
    response_a: Span = (-1, -1)
    middle: int = -1
    response_b: Span = (-1, -1)


def judge_sample(tokenizer: Tokenizer, layout: Layout, max_tokens: int, overlong: Overlong) -> Sample:
    """Tokens of a judge prompt; the hidden state at the last one predicts the label.

    Raises:
        OverlongSample: it has more than `max_tokens` tokens and `overlong` is not "truncate", or it cannot be shortened.
        ConfigError: `max_tokens` is too small for the template itself.
    """

    def build(candidate: Layout) -> Sample:
        prefix = tokenizer.default_prefix_ids if candidate.add_bos else tokenizer.prefix_ids
        return Sample(prefix + tokenizer.encode(tokenizer.wrap_user(candidate.text)))

    return _fitting(tokenizer, layout, build, max_tokens, overlong)


def generate_sample(tokenizer: Tokenizer, layout: Layout, max_tokens: int, overlong: Overlong) -> Sample:
    """Tokens of a stage-1 sample, prompt and target in one layout (`Layout.followed_by`); raises as `judge_sample`."""

    def build(candidate: Layout) -> Sample:
        user, target = candidate.text[: candidate.target], candidate.text[candidate.target :]
        tokens = tokenizer.prefix_ids + tokenizer.encode(tokenizer.wrap_user(user))
        encoding, start = tokenizer.encoding(target), len(tokens)

        def position(character: int) -> int:
            return start + _first_token_from(encoding, character - candidate.target) if character >= 0 else -1

        slots = [candidate.slots.get(name, (-1, -1)) for name in ("response_a", "response_b")]
        ranges = [(position(begin), position(end)) for begin, end in slots]
        tokens += [*encoding.ids, tokenizer.eos_id]
        return Sample(tokens, False, start, ranges[0], position(candidate.middle), ranges[1])

    return _fitting(tokenizer, layout, build, max_tokens, overlong)


def conversation_sample(
    tokenizer: Tokenizer,
    conversation: Conversation | RenderedConversation,
    prompt: str,
    response: str,
    max_tokens: int,
    overlong: Overlong,
) -> Sample:
    """Tokens of [x, y], with the range of y as `response_a` where the layout knows it; raises as `judge_sample`."""

    def build(candidate: Layout) -> Sample:
        encoding, start = tokenizer.encoding(candidate.text), len(tokenizer.prefix_ids)
        if "response" not in candidate.slots:
            return Sample(tokenizer.prefix_ids + encoding.ids)
        first, end = (start + _first_token_from(encoding, character) for character in candidate.slots["response"])
        return Sample(tokenizer.prefix_ids + encoding.ids, response_a=(first, end))

    return _fitting(tokenizer, conversation.layout(prompt, response), build, max_tokens, overlong)


def conversations_sample(
    tokenizer: Tokenizer, conversation: Conversation, pair: Pair, max_tokens: int, overlong: Overlong
) -> Sample:
    """Tokens of [x, y_a] and [x, y_b], each of at most `max_tokens`; raises as `judge_sample`."""
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


def _first_token_from(encoding, character: int) -> int:
    """Index of the first token that begins at `character` or later."""
    low, high = 0, len(encoding.ids)
    while low < high:
        mid = (low + high) // 2
        span = encoding.token_to_chars(mid)
        if span is not None and span[0] < character:
            low = mid + 1
        else:
            high = mid
    return low


def _fitting(
    tokenizer: Tokenizer, layout: Layout, build: Callable[[Layout], Sample], max_tokens: int, overlong: Overlong
) -> Sample:
    """The sample as it is, or with its slots shortened to at most `max_tokens` tokens; raises as `judge_sample`."""
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
        # At a cut the text may tokenise differently: subtract the difference from the room and try again.
        room -= len(sample.tokens) - max_tokens
        _check_room(room, len(layout.slots), max_tokens)


def check_seq_length(
    tokenizer: Tokenizer, template: JudgeTemplate, conversation: Conversation | None, text: str, max_tokens: int
) -> None:
    """Raise ConfigError if `max_tokens` leaves no room beside the template, or beside the conversation's texts."""
    if text == "conversations":
        layout = conversation.layout("", "")
        empty = conversation_sample(tokenizer, conversation, "", "", sys.maxsize, "error")
    else:
        layout = layout_of(Pair("", "", "", 0.5), template, text, swapped=False)
        builder = judge_sample if text == "judge" else generate_sample
        empty = builder(tokenizer, layout, sys.maxsize, "error")
    _check_room(max_tokens - len(empty.tokens), len(layout.slots), max_tokens)


def label_ids(tokenizer: Tokenizer, template: JudgeTemplate) -> tuple[int, int]:
    """Ids of the template's two labels after a judge prompt; raises ConfigError if they are not single tokens there."""
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
    """Tokens that each slot may keep: the longer of two responses is cut first, then both alike.

    The responses get at least half of the room if they need it; the prompt gets the rest.
    """
    wanted = {name: count for name, count in counts.items() if name != "prompt"}
    prompt = counts.get("prompt", 0)
    for_responses = min(sum(wanted.values()), max(room - prompt, room - room // 2))
    shorter = min(wanted.values())
    cap = max(for_responses - shorter, for_responses // len(wanted))
    return {**{name: min(count, cap) for name, count in wanted.items()}, "prompt": min(prompt, room - for_responses)}


def _cuts(layout: Layout, pieces: dict, shares: dict[str, int]) -> list[Span]:
    """Character ranges to remove: the beginning of the prompt (its oldest turns), the ends of the responses."""
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
    """The layout of a row for a task's `text` (judge or generate), with its responses as given or swapped."""
    if isinstance(row, Pair):
        a, b = (row.response_b, row.response_a) if swapped else (row.response_a, row.response_b)
        if text == "judge":
            return template.judge_layout(row.prompt, a, b)
        return template.generate_layout(row.prompt).followed_by(template.responses_layout(a, b))
    if text == "judge":
        layout = template.find_judge(row.instruction) or Layout(row.instruction, {}, add_bos=template.add_bos)
    else:
        user = template.find_generate(row.instruction) or Layout(row.instruction, {})
        layout = user.followed_by(template.find_responses(row.output) or Layout(row.output, {}))
    return _swap_responses(layout) if swapped else layout


def pair_of(row: Pair | PreformattedRow, template: JudgeTemplate) -> Pair | None:
    """The row as a pair: for a preformatted row the texts between the template's markers, or None if markers are missing."""
    if isinstance(row, Pair):
        return row
    layout = template.find_judge(row.instruction)
    if layout is None:
        return None
    texts = (layout.text[slice(*layout.slots[name])] for name in ("prompt", "response_a", "response_b"))
    return Pair(*texts, preference_of(row, template), row.weight, source_location=row.source_location)


def _swap_responses(layout: Layout) -> Layout:
    """A preformatted text with its two responses swapped between their markers."""
    (a_start, a_end), (b_start, b_end) = layout.slots["response_a"], layout.slots["response_b"]
    text = layout.text
    a, between, b = text[a_start:a_end], text[a_end:b_start], text[b_start:b_end]
    shift = len(b) - len(a)
    slots = {**layout.slots, "response_a": (a_start, a_end + shift), "response_b": (b_start + shift, b_end)}
    text = text[:a_start] + b + between + a + text[b_end:]
    return replace(layout, text=text, slots=slots, middle=layout.middle + shift)


def preference_of(row: Pair | PreformattedRow, template: JudgeTemplate) -> float:
    """Probability that A is better in the given order; nan if the row has no label, as a preformatted row of stage 1."""
    if isinstance(row, Pair):
        return row.preference
    return {template.label_a: 1.0, template.label_b: 0.0}.get(row.output.strip(), float("nan"))
