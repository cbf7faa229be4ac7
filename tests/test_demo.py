"""The demonstration task: verifiable, balanced, deterministic, and held-out prompts are held out."""

import json

import pytest

from gram_engine.data import demo


@pytest.fixture(scope="module")
def rows():
    return list(demo.pairs(4000, seed=1, held_out=False))


def test_chosen_is_right_and_rejected_is_wrong(rows):
    for row in rows[:400]:
        assert demo.is_right(row, row["chosen"]), row
        assert not demo.is_right(row, row["rejected"]), row


def test_both_responses_hold_the_same_words(rows):
    for row in rows:
        chosen, rejected = row["chosen"].split(", "), row["rejected"].split(", ")
        assert sorted(chosen) == sorted(rejected) and chosen[0] == rejected[0]
        assert len(row["chosen"]) == len(row["rejected"])


def test_every_prompt_is_on_one_side_only(rows):
    held_out = {row["prompt"] for row in demo.pairs(4000, seed=1, held_out=True)}
    trained = {row["prompt"] for row in rows}
    assert not held_out & trained
    assert len(held_out) > 100 and len(trained) > 500


def test_files_are_the_same_for_the_same_seed(tmp_path):
    contents = []
    for name in ("first", "second"):
        config = demo.DemoConfig(output_dir=str(tmp_path / name), train_pairs=50, test_pairs=20)
        contents.append([file.read_bytes() for file in demo.write(config)])
    assert contents[0] == contents[1]
    assert len(contents[0][1].splitlines()) == 20
    assert set(json.loads(contents[0][0].splitlines()[0])) == {"prompt", "chosen", "rejected", "kind"}
