"""Readers: the formats people have, each giving the comparison it means."""

import gzip
import json
import math

import pytest

from gram_engine.config import DataConfig
from gram_engine.data.readers import read_rows
from gram_engine.data.schema import Pair, Verbatim
from gram_engine.errors import DataError


def read(tmp_path, *rows, name="pairs.jsonl", **settings):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_rows([path], DataConfig(**settings)))


def facts(pair):
    return pair.prompt, pair.response_a, pair.response_b, pair.preference


USER, GOOD, BAD = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}, "no")


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"prompt": "hi", "chosen": "yes", "rejected": "no"}, ("hi", "yes", "no", 1.0)),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": "no"}, ("hi", "yes", "no", 1.0)),
        ({"chosen": [USER, GOOD], "rejected": [USER, {**GOOD, "content": "no"}]}, ("hi", "yes", "no", 1.0)),
        ({"prompt": "hi", "response_a": "no", "response_b": "yes", "label": "B"}, ("hi", "no", "yes", 0.0)),
        ({"prompt": "hi", "response_a": "no", "response_b": "yes", "winner": "tie"}, ("hi", "no", "yes", 0.5)),
        ({"question": "hi", "answer_a": "yes", "answer_b": "no", "winner": "[[A]]"}, ("hi", "yes", "no", 1.0)),
        ({"prompt": "hi", "response_a": "x", "response_b": "y", "preference": 0.25}, ("hi", "x", "y", 0.25)),
        (
            {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
            ("hi", "yes", "no", 1.0),
        ),
        (
            {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "yes"},
             "rejected": {"from": "gpt", "value": "no"}},
            ("hi", "yes", "no", 1.0),
        ),
    ],
)  # fmt: skip
def test_formats(row, expected, tmp_path):
    (pair,) = read(tmp_path, row)
    assert facts(pair) == expected and pair.place.endswith("pairs.jsonl:1")


def test_unlabelled_margin_and_weight(tmp_path):
    plain, rich = read(
        tmp_path,
        {"prompt": "hi", "response_a": "x", "response_b": "y"},
        {"prompt": "hi", "chosen": "x", "rejected": "y", "margin": 2, "weight": 0.5},
    )
    assert math.isnan(plain.preference) and math.isnan(plain.margin) and plain.weight == 1
    assert (rich.margin, rich.weight) == (2, 0.5)


def test_several_turns_become_a_dialogue(tmp_path):
    turns = [USER, GOOD, {"role": "user", "content": "more"}]
    (pair,) = read(tmp_path, {"prompt": turns, "chosen": "a", "rejected": "b"})
    assert pair.prompt == "Human: hi\n\nAssistant: yes\n\nHuman: more"


def test_ranked_list_gives_all_pairs_that_weigh_as_one(tmp_path):
    pairs = read(tmp_path, {"prompt": "hi", "responses": ["best", "good", "worst"]})
    assert [(pair.response_a, pair.response_b) for pair in pairs] == [
        ("best", "good"), ("best", "worst"), ("good", "worst"),
    ]  # fmt: skip
    assert sum(pair.weight for pair in pairs) == pytest.approx(1) and {pair.preference for pair in pairs} == {1.0}
    completions = [{"completion": "x", "rank": 2}, {"completion": "y", "rank": 1}, {"completion": "z", "rank": 2}]
    by_rank = read(tmp_path, {"prompt": "hi", "completions": completions})
    assert [pair.preference for pair in by_rank] == [0.0, 0.5, 1.0]


def test_the_authors_rows_are_taken_as_they_are(tmp_path):
    (row,) = read(tmp_path, {"instruction": "judge this\n\n#Preferred:", "input": "", "output": "A"})
    assert isinstance(row, Verbatim) and (row.instruction, row.output) == ("judge this\n\n#Preferred:", "A")


def test_containers(tmp_path):
    import pyarrow
    import pyarrow.parquet

    row = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
    (tmp_path / "a.json").write_text(json.dumps([row, row], indent=1))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as handle:
        handle.write(json.dumps(row) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "c.parquet")
    pairs = list(read_rows([tmp_path / "a.json", tmp_path / "b.jsonl.gz", tmp_path / "c.parquet"], DataConfig()))
    assert len(pairs) == 4 and all(facts(pair) == ("hi", "yes", "no", 1.0) for pair in pairs)
    assert pairs[1].place.endswith("a.json:7")


def test_keys_can_be_named(tmp_path):
    row = {"q": "hi", "good": "yes", "bad": "no"}
    (pair,) = read(tmp_path, row, prompt_key="q", chosen_key="good", rejected_key="bad")
    assert facts(pair) == ("hi", "yes", "no", 1.0)
    with pytest.raises(DataError, match=r"pairs.jsonl:1: field 'worse' \(--rejected-key\) is missing"):
        read(tmp_path, row, prompt_key="q", chosen_key="good", rejected_key="worse")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "x", "response_a": "a", "response_b": "b", "label": "C?"}, "label is 'C\\?'. Write A, B or tie."),
        ({"prompt": "x", "response_a": "a", "response_b": "b", "label": 1}, "label is 1, which different data sets"),
        ({"prompt": "x", "chosen": None, "rejected": "b"}, "field 'chosen' is null, not text"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "weight": -1}, "weight is -1"),
        ({"prompt": "x", "responses": ["a"]}, "A comparison needs at least two"),
        ({"text": "x"}, "no responses among its fields"),
        ([1], "a row must be a JSON object, not list"),
    ],
)
def test_bad_rows(row, message, tmp_path):
    with pytest.raises(DataError, match=f"pairs.jsonl:1: .*{message}"):
        read(tmp_path, row)


def test_order_exchanged_keeps_the_meaning():
    pair = Pair("x", "a", "b", 1.0, place="f:1")
    assert facts(pair.exchanged()) == ("x", "b", "a", 0.0) and pair.exchanged().exchanged() == pair
