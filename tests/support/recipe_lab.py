"""Small recipes on the demonstration task, for the tests of the reproduction."""

import copy

import yaml

from gram_engine.data import demo
from gram_engine.reproduce.recipe import load_recipe
from tests.conftest import TEMPLATE


def demonstration(folder):
    """The folder, with demonstration pairs and candidates in it."""
    demo.write(demo.DemoConfig(output_dir=str(folder), train_pairs=60, test_pairs=24, candidates=4))
    return folder


def content(data) -> dict:
    """A recipe of three variants, two of which begin with the same stage 1."""
    return {
        "title": "A test",
        "variables": {"data": str(data)},
        "seeds": [1, 2],
        "tokenizer": {"data": "train", "vocab_size": 640},
        "flags": {"model": "tiny", "template": TEMPLATE, "seq_length": 192, "train_iters": 2, "global_batch_size": 4},
        "data": {
            "train": {"files": ["${data}/train.jsonl"]},
            "few": {"files": ["${data}/train.jsonl"], "rows": 20},
            "test": {"files": ["${data}/test.jsonl"], "where": {"kind": ["days", "months"]}},
            "letters": {"files": ["${data}/test.jsonl"], "where": {"kind": "letters"}},
            "candidates": {"files": ["${data}/candidates.jsonl"]},
        },
        "evaluation": {"known": {"data": "test", "kind": "in"}, "letters": {"data": "letters", "kind": "out"}},
        "stages": {
            "stage1": {"command": "pretrain", "data": "train"},
            "stage2": {"command": "finetune", "data": "few", "flags": {"label_smoothing": 0.1}},
        },
        "variants": {
            "gram": ["stage1", "stage2"],
            "plain": ["stage1", {"stage": "stage2", "flags": {"label_smoothing": 0}}],
            "v1": ["stage2"],
        },
        "best_of_n": {"data": "candidates", "n": 4, "variants": ["gram"]},
        "sections": [
            {"title": "Parts", "rows": {"GRAM": "gram", "GRAM-v1": "v1"}, "reference": "GRAM", "published": "table-4"},
            {"title": "Smoothing", "x": "eps", "series": {"GRAM": {0: "plain", 0.1: "gram"}}, "published": "figure-10"},
        ],
    }


def recipe_of(tmp_path, recipe: dict, **variables):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return load_recipe(path, variables)


def changed(recipe: dict, path: str, value) -> dict:
    """The recipe with one entry replaced (None: removed)."""
    recipe = copy.deepcopy(recipe)
    *parents, last = path.split(".")
    entry = recipe
    for name in parents:
        entry = entry[int(name) if name.isdigit() else name]
    if value is None:
        del entry[last]
    else:
        entry[last] = value
    return recipe
