"""Exported folders as other programs read them: tokenizer files, chat template, padding, configuration and model card."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from gram_engine.config.schema import DataConfig
from gram_engine.convert.export_hf import export_hf
from gram_engine.convert.import_checkpoint import import_checkpoint
from gram_engine.data.conversation import Conversation
from gram_engine.data.preprocess import preprocess
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.scoring.scorer import RewardModelScorer
from tests.conftest import TEMPLATE
from tests.support.hf_models import write_hf_model
from tests.support.reward_folder import write_chat_tokenizer
from tests.support.tiny import tiny_config, tiny_trainer

ROWS = [
    ("which one", "red blue", "quiet river of stone"),
    ('  a "quoted"\n\n{{ prompt }} ', "\n{% x %} ", "\\n \u00fc \U0001f600"),
    ("what else", "paper </s> <s>", "green"),
]
"""Prompts with two responses."""


def write_plain_tokenizer(folder: Path) -> Path:
    """The chat tokenizer without chat template, which adds <bos> and has the post-processor of LLaMA 3's base models."""
    write_chat_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    content = json.loads((folder / "tokenizer.json").read_text())
    adds_bos = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    steps = [tokenizers.processors.ByteLevel(trim_offsets=False), adds_bos]
    content["post_processor"] = json.loads(tokenizers.processors.Sequence(steps).__getstate__())
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def write_metaspace_tokenizer(folder: Path) -> Path:
    """A tokenizer that writes a space before a text, but not after a special token in it."""
    write_plain_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True}
    content["model"]["vocab"]["\u2581"] = len(content["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def scalar_export(pool, tiny_data, tmp_path_factory):
    """Makes an export of an untrained scalar head with one of the kinds of tokenizer; returns both folders."""
    made = {}

    def make(kind: str) -> tuple[str, Path]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            writers = {"chat": write_chat_tokenizer, "plain": write_plain_tokenizer, "metaspace": write_metaspace_tokenizer}
            tokenizer = tiny_data["tokenizer"] if kind == "sentencepiece" else str(writers[kind](folder / "tokenizer"))
            cfg = DataConfig(tokenizer_model=tokenizer, seq_length=192, template=TEMPLATE)
            preprocess([tiny_data["jsonl"]], str(folder / "rows"), objective="bradley-terry", cfg=cfg, both_orders=False)
            pool.run(save_untrained, 1, str(folder / "rows"), tokenizer, str(folder / "run"))
            made[kind] = tokenizer, export_hf(folder / "run", folder / "hf")
        return made[kind]

    return make


def save_untrained(prefix, tokenizer, folder):
    flags = "--num-layers 2 --objective bradley-terry --init-method-std 0.2 --max-position-embeddings 192"
    tiny_trainer(tiny_config(prefix, tokenizer, f"{flags} --save {folder}")).save()


def messages(prompt, response):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


@pytest.mark.parametrize("kind", ["sentencepiece", "plain", "chat"])
def test_the_chat_template_of_a_scalar_head_writes_what_it_was_trained_with(kind, scalar_export):
    from transformers import AutoTokenizer, pipeline

    trained_with, folder = scalar_export(kind)
    trained_with, server = Tokenizer.load("auto", trained_with), AutoTokenizer.from_pretrained(folder)
    conversation = Conversation.of(trained_with)
    exported = Conversation.from_dict(json.loads((folder / "gram_config.json").read_text())["conversation"], "")
    texts = [(prompt, response) for prompt, *responses in ROWS for response in responses]
    for prompt, response in texts:
        wanted = trained_with.prefix_ids + trained_with.encode(conversation.layout(prompt, response).text)
        text = server.apply_chat_template(messages(prompt, response), tokenize=False)
        assert text == exported.layout(prompt, response).text
        assert wanted == server(text).input_ids == server(text, add_special_tokens=False).input_ids
        assert wanted == server.apply_chat_template(messages(prompt, response), return_dict=False)
        assert wanted[0] == server.bos_token_id != wanted[1] and wanted[-1] == server.eos_token_id
        opening = server.apply_chat_template(messages(prompt, response)[:1], tokenize=False, add_generation_prompt=True)
        assert text.startswith(opening)

    # As leaderboards do: text of the chat template, padded batches, no activation asked for.
    pipe = pipeline("text-classification", str(folder), batch_size=4)
    rendered = [server.apply_chat_template(messages(*text), tokenize=False) for text in texts]
    found = [result["score"] for result in pipe(rendered, padding=True)]
    scores = RewardModelScorer.from_pretrained(folder).score_pairs(ROWS)
    np.testing.assert_allclose(found, np.array([score.rewards for score in scores]).ravel(), atol=1e-5)
    assert min(found) < 0, "a sigmoid would have made it positive"
    assert pipe.model.config.problem_type == "regression"


def test_several_turns_have_one_end(scalar_export):
    from transformers import AutoTokenizer

    server = AutoTokenizer.from_pretrained(scalar_export("plain")[1])
    turns = [*messages("one", "two"), *messages("three", "four")]
    assert server.apply_chat_template(turns, tokenize=False) == "<bos>one\n\ntwo\n\nthree\n\nfour<|end|>"


def test_a_tokenizer_that_would_encode_in_another_way_gets_no_chat_template(scalar_export):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    _, folder = scalar_export("metaspace")
    server = AutoTokenizer.from_pretrained(folder)
    assert server.chat_template is None
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        found = model(**server("which one\n\nred blue" + server.eos_token, return_tensors="pt")).logits
    reward = RewardModelScorer.from_pretrained(folder).reward("which one", "red blue")
    assert reward == pytest.approx(float(found), abs=1e-5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint that was imported from a chat model without padding token."""
    folder = tmp_path_factory.mktemp("imported")
    source = write_chat_tokenizer(folder / "source")
    write_hf_model(source, Tokenizer.load("auto", source).vocab_size, True, "qwen3")
    return import_checkpoint(source, folder / "run", template=TEMPLATE)


def test_tokenizer_files_are_those_of_transformers_4(checkpoint, tmp_path):
    """Whether its own code reads them, tools/check_peers.sh shows."""
    from transformers import AutoTokenizer

    for head in ("causal-lm", "pair-logit"):
        folder = export_hf(checkpoint, tmp_path / head, head=head)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert config["model_input_names"] == ["input_ids", "attention_mask"]
        server = AutoTokenizer.from_pretrained(folder)
        assert server("which", return_token_type_ids=None).keys() == {"input_ids", "attention_mask"}

    source = AutoTokenizer.from_pretrained(folder, extra_special_tokens=["<|user|>", "<|assistant|>"])
    source.save_pretrained(tmp_path / "source")
    Tokenizer.load("auto", tmp_path / "source").save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert config["additional_special_tokens"] == ["<|user|>", "<|assistant|>"] and "extra_special_tokens" not in config
    assert AutoTokenizer.from_pretrained(tmp_path / "again").extra_special_tokens == ["<|user|>", "<|assistant|>"]


def test_a_pair_logit_export_runs_in_padded_batches(checkpoint, tmp_path):
    from transformers import pipeline

    folder = export_hf(checkpoint, tmp_path / "hf", head="pair-logit")
    scorer = RewardModelScorer.from_pretrained(folder)
    pipe = pipeline("text-classification", str(folder), batch_size=4, function_to_apply="none")
    assert pipe.tokenizer.pad_token_id == pipe.model.config.pad_token_id is not None
    prompts = [
        pipe.tokenizer.apply_chat_template(
            [{"role": "user", "content": scorer.template.judge(*row)}], tokenize=False, add_generation_prompt=True
        )
        for row in ROWS
    ]
    found = [result["score"] for result in pipe(prompts, padding=True)]
    np.testing.assert_allclose(found, scorer.margins(ROWS), atol=1e-4)


def test_card_and_configuration_say_what_the_model_is_and_wants(checkpoint, scalar_export, tmp_path):
    folders = {head: export_hf(checkpoint, tmp_path / head, head=head) for head in ("causal-lm", "pair-logit")}
    folders["scalar"] = scalar_export("plain")[1]
    cards = {head: (folder / "README.md").read_text() for head, folder in folders.items()}
    configs = {head: json.loads((folder / "config.json").read_text()) for head, folder in folders.items()}
    assert all("not trained" in card and "Trained with" not in card for card in cards.values())
    assert "Imported from" in cards["pair-logit"] and "Random initial weights" in cards["scalar"]
    assert "a prompt with one response" in cards["pair-logit"] and "means nothing" in configs["pair-logit"]["gram_input"]
    assert "means nothing" not in cards["causal-lm"] + cards["scalar"] and "gram_input" not in configs["causal-lm"]
    assert [configs[head].get("problem_type") for head in folders] == [None, None, "regression"]


ROOT = Path(__file__).parents[1]


def test_the_comparison_with_other_programs_tells_equal_from_different(folder, scorer, tmp_path, monkeypatch, capsys):
    (tmp_path / "exports").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "exports" / "random-causal-lm").symlink_to(folder)
    margins = scorer.margins(ROWS)
    row = {"tool": "trl", "version": "1", "export": "random-causal-lm", "what": "a test", "texts": ROWS}
    rows = {
        "equal": {"found": list(margins)},
        "other": {"found": [*margins[:-1], margins[-1] + 0.01]},
        "broken": {"error": "no"},
    }
    for name, found in rows.items():
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps([{**row, **found}]))

    compared = runpy.run_path(str(ROOT / "tools/peers/compare.py"))["main"]

    def compare(*names):
        monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path), *names])
        return compared(), capsys.readouterr().out

    status, table = compare("equal")
    assert status == 0 and "of 3 numbers" in table and "| ok |" in table
    status, table = compare("equal", "other", "broken", "absent")
    assert status == 1 and "| ok |" in table and "| 1.0e-02 of 3 numbers" in table and "| DIFFERS |" in table
    assert "| | no |" in table and "absent" in table and table == (tmp_path / "table.md").read_text()


def test_unknown_programs_are_refused_before_anything_is_installed(tmp_path):
    command = ["bash", "tools/check_peers.sh", tmp_path / "peers", "trl", "nonesuch"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "VENV": sys.prefix}, capture_output=True, text=True)
    assert done.returncode == 2 and "nonesuch: unknown program" in done.stderr and not (tmp_path / "peers").exists()
