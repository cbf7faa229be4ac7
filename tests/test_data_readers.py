"""Readers: the formats people have, each giving the comparison it means."""

import gzip
import json
import math

import pytest

from gram_engine.config.schema import DataConfig
from gram_engine.data.readers import read_rows
from gram_engine.data.schema import PreformattedRow
from gram_engine.errors import DataError
from tests.support.mutations import PARQUET


def read(tmp_path, *rows, name="pairs.jsonl", **settings):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_rows([path], DataConfig(**settings)))


def facts(pair):
    return pair.prompt, pair.response_a, pair.response_b, pair.preference


ROW = b'{"prompt": "x", "chosen": "a", "rejected": "b"}'
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
            {"chosen": "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: a\n\nb\n\nAssistant: yes\n\nsir",
             "rejected": "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: a\n\nb\n\nAssistant: no"},
            ("Human: hi\n\nAssistant: ho\n\nHuman: a\n\nb", "yes\n\nsir", "no", 1.0),
        ),
        ({"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, {**GOOD, "content": "no"}]}, ("hi", "yes", "no", 1.0)),
        ({"messages": [USER, GOOD], "rejected_response": "no"}, ("hi", "yes", "no", 1.0)),
        ({"instruction": "add", "input": "1 2", "chosen": "3", "rejected": "4"}, ("add\n1 2", "3", "4", 1.0)),
        ({"question": "hi", "response_j": "yes", "response_k": "no"}, ("hi", "yes", "no", 1.0)),
        (
            {"context": [USER], "response1": "no", "response2": "yes", "overall_preference": 2},
            ("hi", "no", "yes", 0.0),
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "chosen": "yes", "rejected": "no"},
            ("hi", "yes", "no", 1.0),
        ),
        ({"system": "Be kind.", "prompt": "hi", "chosen": "yes", "rejected": "no"},
         ("System: Be kind.\n\nHuman: hi", "yes", "no", 1.0)),
        (
            {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "yes"},
             "rejected": {"from": "gpt", "value": "no"}},
            ("hi", "yes", "no", 1.0),
        ),
    ],
)  # fmt: skip
def test_formats(row, expected, tmp_path):
    (pair,) = read(tmp_path, row)
    assert facts(pair) == expected and pair.source_location.endswith("pairs.jsonl:1")


def test_unlabelled_margin_and_weight(tmp_path):
    plain, rich = read(
        tmp_path,
        {"prompt": "hi", "response_a": "x", "response_b": "y"},
        {"prompt": "hi", "chosen": "x", "rejected": "y", "margin": 2, "weight": 0.5},
    )
    assert math.isnan(plain.preference) and math.isnan(plain.margin) and plain.weight == 1
    assert (rich.margin, rich.weight) == (2, 0.5)
    scored, graded = read(
        tmp_path,
        {"prompt": "hi", "chosen": "x", "rejected": "y", "score_chosen": 8.5, "score_rejected": 6},
        {"prompt": "hi", "response1": "x", "response2": "y", "overall_preference": -3},
    )
    assert scored.margin == 2.5 and (graded.preference, graded.margin) == (1.0, 3.0)


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
    assert isinstance(row, PreformattedRow) and (row.instruction, row.output) == ("judge this\n\n#Preferred:", "A")


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
    assert pairs[1].source_location.endswith("a.json:7")


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
        ({"chosen": "x", "rejected": "y"}, "field 'prompt' is missing"),
        ({"prompt": "x", "chosen": "a\ud83d", "rejected": "b"}, "'chosen' holds half of a surrogate pair at character 1"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "margin": "big"}, "field 'margin' is 'big', not a number"),
        ({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, "field 'prompt': a message has no content"),
        ({"prompt": "x", "completions": [{"completion": "a"}]}, "must be an object with completion and rank"),
        ([1], "a row must be a JSON object, not list"),
    ],
)
def test_bad_rows(row, message, tmp_path):
    with pytest.raises(DataError, match=f"pairs.jsonl:1: .*{message}"):
        read(tmp_path, row)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", ROW + b'\n{"prompt": \xff}\n', "a.jsonl:2: not UTF-8 .byte 0xff at column 12"),
        ("a.jsonl", b"[1,\n2]\n", "a.jsonl:1: not valid JSON: .* A JSON array must be in a file named .json."),
        ("a.json", b"[" + ROW + b',\n\n{"prompt" 3}]', "a.json:3: not valid JSON: Expecting ':' delimiter at column 11"),
        ("a.json", b"[" + ROW + b"\n" + ROW + b"]", "a.json:2: not valid JSON: Expecting ',' or ']' at column 1"),
        ("a.json", b'[{"a": {"b": 1, "b": 2}, "c": ]', "a.json:1: not valid JSON: Expecting value at column 31"),
        ("a.jsonl", ROW + b'\n{"prompt": \n', "a.jsonl:2: not valid JSON: Expecting value at column 11. Write one JSON object"),
        ("a.jsonl", b"\n", "a.jsonl: no rows"),
        ("a.jsonl.gz", gzip.compress(ROW + b"\n", mtime=0)[:-9], "a.jsonl.gz:2: not a whole gzip file"),
        ("a.parquet", b"PAR1", "a.parquet:1: not a readable Parquet file"),
    ],
)
def test_unreadable_files(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows([tmp_path / name], DataConfig()))


def test_a_parquet_file_whose_row_groups_miscount_is_refused(tmp_path):
    """Page checksums do not cover the counts in its footer: of 20 rows pyarrow silently reads 5 here."""
    negative = PARQUET.replace(b"\x16\x0e\x26", b"\x16\x0f\x26", 1)  # rows of the first group, zigzag: 7 -> -8
    (tmp_path / "a.parquet").write_bytes(negative)
    with pytest.raises(DataError, match="a.parquet:6: not a readable Parquet file .5 of 20 rows found"):
        list(read_rows([tmp_path / "a.parquet"], DataConfig()))


def test_a_missing_file_is_found_before_the_others_are_read(tmp_path):
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(DataError, match="none.jsonl: no such file. Check the path"):
        list(read_rows([tmp_path / "bad.jsonl", tmp_path / "none.jsonl"], DataConfig()))


def test_hub_data_sets_by_name(tmp_path):
    """A folder of JSON files stands in for a data set of the hub: `datasets` loads both by the same call."""
    pytest.importorskip("datasets", reason="the optional datasets package (extra: hub) is not installed")
    (tmp_path / "train.jsonl").write_text('{"prompt": "hi", "chosen": "yes", "rejected": "no"}\n')
    (pair,) = read_rows([f"hf:{tmp_path}"], DataConfig())
    assert facts(pair) == ("hi", "yes", "no", 1.0) and pair.source_location == f"hf:{tmp_path}:1"
    with pytest.raises(DataError, match="cannot be loaded"):
        list(read_rows([f"hf:{tmp_path}:no-such-split"], DataConfig()))
