"""Damage of files, drawn by a seeded generator: bytes of any file, and rows of JSON lines."""

from __future__ import annotations

import io
import json
import random

import pyarrow
import pyarrow.parquet

BASE_ROWS = (
    {"prompt": "say yes", "chosen": "yes, of course", "rejected": "no"},
    {"prompt": [{"role": "user", "content": "hi"}], "chosen": [{"role": "assistant", "content": "yes"}], "rejected": "no"},
    {"prompt": "which \u00fc", "response_a": "this \U0001f600", "response_b": "that", "label": "B", "weight": 0.5, "margin": 2},
    {"prompt": "rank them", "completions": [{"completion": "a", "rank": 1}, {"completion": "b", "rank": 2}]},
    {"prompt": "rank them", "responses": ["best", "good", "worst"], "ranks": [1, 2, 3]},
    {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}], "rejected_response": "no"},
    {"prompt": "graded", "response1": "x", "response2": "y", "overall_preference": -2, "score_chosen": 1, "score_rejected": 0},
)
"""One good row of each format that readers know."""

ROWS = [{"prompt": f"row {n} \u00fc", "chosen": "yes " * n + "x", "rejected": "no", "n": n} for n in range(20)]
TEXT = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
"""Good rows to put into files of other kinds, and the same as JSON lines."""


def _parquet() -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink, write_page_checksum=True, row_group_size=7)
    return sink.getvalue()


PARQUET = _parquet()
DEEP = 100_000


def nested(depth: int) -> str:
    """JSON text of lists in lists."""
    return "[" * depth + "]" * depth


# Values that a field may suddenly have, as JSON text.
VALUES = (
    "null", "true", "false", "0", "-1", "1e999", "-1e999", "1e-320", "NaN", "Infinity", "-Infinity", "1" * 400, "9" * 5000,
    '""', '" "', '"\\u0000"', '"\\ud83d"', '"\\udc00 text"', '"\\ud83d\\ude00"', '"\\u001b[2J"', '"\\u202e"', '"A"', '"[[C]]"',
    "[]", "[[]]", "[null]", "{}", '{"role": "user"}', '[{"role": 3, "content": "x"}]', '[{"role": "user", "content": null}]',
    '[{"role": "assistant", "content": [{"type": "image"}]}]', '["a", "a"]', '{"completion": "x", "rank": NaN}',
    '{"a": {"a": {"a": [1, {"a": null}]}}}', nested(50), nested(900), nested(DEEP), '{"a":' * 3000 + "1" + "}" * 3000,
    '"' + "x" * 3000 + '"', '"\\/\\b\\f\\n\\r\\t"', '"{response_b} {prompt}"', '"<s></s><unk>[INST]<|eot_id|>"',
    '"[The End of Assistant A\'s Answer]"', '"' + "\u0301" * 200 + '"',
)  # fmt: skip
FIELDS = (
    "prompt", "chosen", "rejected", "response_a", "response_b", "label", "weight", "margin", "messages", "responses", "ranks",
    "completions", "instruction", "output", "input", "system", "preference", "overall_preference", "choice", "score_chosen",
    "score_rejected", "reference", "question", "conversations", "id", "subset", "",
)  # fmt: skip


def other_value(draw: random.Random) -> bytes:
    """A good row with a field that now has another value, or one more field."""
    row = dict(draw.choice(BASE_ROWS))
    name = draw.choice([*row, draw.choice(FIELDS)])
    row[name] = "@"
    return json.dumps(row, ensure_ascii=draw.random() < 0.5).replace('"@"', draw.choice(VALUES)).encode()


def inner_value(draw: random.Random) -> bytes:
    """A good row in which one value, anywhere, is another."""
    text = json.dumps(draw.choice(BASE_ROWS))
    pieces = [piece for piece in ('"user"', '"hi"', '"yes"', '"content"', '"role"', "1", "2", '"a"', "[", "]") if piece in text]
    return text.replace(draw.choice(pieces or ['"']), draw.choice(VALUES), 1).encode()


def field_gone(draw: random.Random) -> bytes:
    row = dict(draw.choice(BASE_ROWS))
    row.pop(draw.choice(list(row)))
    return json.dumps(row).encode()


def field_twice(draw: random.Random) -> bytes:
    row = draw.choice(BASE_ROWS)
    name = draw.choice(list(row))
    return json.dumps(row)[:-1].encode() + f', "{name}": {draw.choice(VALUES)}}}'.encode()


def not_an_object(draw: random.Random) -> bytes:
    return draw.choice(VALUES).encode()


def cut(draw: random.Random) -> bytes:
    line = json.dumps(draw.choice(BASE_ROWS), ensure_ascii=False).encode()
    return line[: draw.randrange(len(line))]


def damaged_line(draw: random.Random) -> bytes:
    return damaged_bytes(draw, json.dumps(draw.choice(BASE_ROWS), ensure_ascii=False).encode())


def other_encoding(draw: random.Random) -> bytes:
    encoding = draw.choice(("utf-16", "utf-32-be", "utf-8-sig", "utf-7"))
    return json.dumps(draw.choice(BASE_ROWS), ensure_ascii=False).encode(encoding)


def two_rows(draw: random.Random) -> bytes:
    rows = [json.dumps(draw.choice(BASE_ROWS)) for _ in range(2)]
    return draw.choice((" ", ",", "\r", "\x00", "")).join(rows).encode()


def garbage(draw: random.Random) -> bytes:
    return draw.randbytes(draw.randint(1, 300))


LINES = (
    other_value, other_value, other_value, inner_value, field_gone, field_twice, not_an_object, cut, damaged_line, damaged_line,
    other_encoding, two_rows, garbage,
)  # fmt: skip


def bad_line(draw: random.Random) -> bytes:
    """A line that was damaged; some of them are still rows, and some hold line breaks."""
    return draw.choice(LINES)(draw) + draw.choice((b"", b"", b"\r", b" ", b"\xc2\xa0"))


def damaged_bytes(draw: random.Random, content: bytes) -> bytes:
    """The content with bits or bytes changed, taken out, put in, moved, or cut off."""
    data = bytearray(content)
    place = draw.randrange(len(data) + 1)
    kind = draw.randrange(9)
    if kind == 0:
        return bytes(data[:place])
    if kind == 1:
        del data[place : place + draw.randint(1, 64)]
    elif kind == 2:
        data[place:place] = draw.choice((b"\x00" * 16, b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3", b"\r\n", b'"', b"{", b"\x1b[2J"))
    elif kind == 3:
        data[place:place] = data[: draw.randint(1, 200)]
    elif kind == 4:
        data[place : place + 8] = b"\x00" * 8
    elif kind == 5:
        other = draw.randrange(len(data) + 1)
        data[place : place + 16], data[other : other + 16] = data[other : other + 16], data[place : place + 16]
    else:
        for _ in range(draw.choice((1, 1, 1, 4, 20))):
            if data:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)
