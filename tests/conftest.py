"""Fixtures that several test files share."""

import json
import os
import random
from pathlib import Path

import pytest
import torch

from tests.support.pool import Pool

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are defined

TEMPLATE = str(Path(__file__).parents[1] / "examples" / "configs" / "quickstart-template.yaml")
WORDS = "red blue green stone river cloud apple seven quiet bright table window garden music paper silver".split()


PARTS = {
    "faults": "bad_input checkpoint_faults config_faults data_faults interruptions numerics run_lock security",
    "examples": "demo docs launch quickstart reproduce_recipes reproduce_report reproduce_runner",
}
"""Files (test_NAME.py) of two parts. Of the other tests, those that take the pool are `distributed`, the rest `unit`."""


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items):
    """Give each test its part of the suite (`make test PART=unit`), and its lane for pytest-xdist.

    Tests of several processes run one after the other on one pool of workers, and beside them the other tests, file by file.
    """
    parts = {f"test_{name}": part for part, names in PARTS.items() for name in names.split()}
    for item in items:
        distributed = {"pool", "tries"} & set(item.fixturenames)
        item.add_marker(parts.get(item.path.stem, "distributed" if distributed else "unit"))
        item.add_marker(pytest.mark.xdist_group("processes" if distributed else item.path.name))


@pytest.fixture(scope="session")
def pool(tmp_path_factory):
    """Four worker processes for tests of several ranks."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        (tmp_path_factory.getbasetemp().parent / "pool").mkdir()  # FileExistsError: another lane has a pool too
    workers = Pool(4)
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A few dozen preference pairs of varied length, preprocessed for both stages.

    Keys: tokenizer (SentencePiece file), jsonl, stage1, stage2 (prefixes), longest (tokens of the longest sample).
    """
    return make_tiny_data(tmp_path_factory.mktemp("tiny"))


def make_tiny_data(folder) -> dict:
    """What the fixture `tiny_data` gives."""
    jsonl = folder / "pairs.jsonl"
    write_pairs(jsonl, rows=48)
    tokenizer = train_tokenizer(jsonl, folder / "tokenizer.model")
    made = {"tokenizer": tokenizer, "jsonl": str(jsonl), "longest": {}}
    from gram_engine.config.schema import DataConfig
    from gram_engine.data.preprocess import preprocess

    for stage, objective in (("stage1", "response-lm"), ("stage2", "pair-preference")):
        made[stage] = str(folder / stage)
        cfg = DataConfig(tokenizer_model=tokenizer, seq_length=192, template=TEMPLATE)
        manifest = preprocess([jsonl], made[stage], objective=objective, cfg=cfg, both_orders=False)
        made["longest"][stage] = manifest.longest
    return made


@pytest.fixture(scope="session")
def folder(tiny_data, tmp_path_factory):
    """A folder as `gram convert` writes it, of a random model; sequences of up to 192 tokens."""
    from tests.support.reward_folder import write_reward_model

    return write_reward_model(tmp_path_factory.mktemp("scoring"), tiny_data["tokenizer"], TEMPLATE, 192)


@pytest.fixture(scope="session")
def scorer(folder):
    """The scorer of `folder`."""
    from gram_engine.scoring.scorer import RewardModelScorer

    return RewardModelScorer.from_pretrained(folder)


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory):
    """A tokenizer with a chat template."""
    from tests.support.reward_folder import write_chat_tokenizer

    return write_chat_tokenizer(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def fault_work(tmp_path_factory):
    """Preprocessed data, tokenizers and a folder to damage files in."""
    from tests.support.data_faults import Work

    return Work(tmp_path_factory.mktemp("faults"))


def write_pairs(path, rows: int, seed: int = 0) -> None:
    """Preference rows of random words."""
    draw = random.Random(seed)
    text = lambda low, high: " ".join(draw.choices(WORDS, k=draw.randint(low, high)))  # noqa: E731
    with open(path, "w", encoding="utf-8") as handle:
        for number in range(rows):
            chosen, rejected = f"yes {text(1, 25)}", f"no {text(1, 25)}"
            row = {"prompt": f"{number} {text(2, 12)}", "chosen": chosen, "rejected": rejected}
            handle.write(json.dumps(row) + "\n")


def train_tokenizer(jsonl, path, vocab_size: int = 512) -> str:
    """A SentencePiece model of the pairs and of the judge template."""
    import sentencepiece

    from gram_engine.data.template import JudgeTemplate

    template = JudgeTemplate.load(TEMPLATE)
    lines = [*[template.judge("x", "y", "z")] * 20, *jsonl.read_text().splitlines()]
    text = path.with_suffix(".txt")
    text.write_text("\n".join(lines) + "\nA\nB\n")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(path.with_suffix("")),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return str(path)
