"""Scorer against a naive computation with transformers, its files, and folders that cannot score."""

import json

import numpy as np
import pytest
import torch

from gram_engine.data.samples import label_ids
from gram_engine.data.template import JudgeTemplate
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import CheckpointError, ConfigError
from gram_engine.scoring.scorer import RewardModelScorer, main
from tests.conftest import TEMPLATE
from tests.hf_models import write_hf_model

SEQ_LENGTH = 192
PAIRS = [
    (f"{number} " + "what colour " * number, "red stone " * (1 + 3 * number), "quiet river cloud " * (7 - number))
    for number in range(7)
]


@pytest.fixture(scope="module")
def folder(tiny_data, tmp_path_factory):
    """A folder as `gram convert` writes it, of a random model."""
    folder = tmp_path_factory.mktemp("scoring")
    tokenizer, template = Tokenizer.load("auto", tiny_data["tokenizer"]), JudgeTemplate.load(TEMPLATE)
    write_hf_model(folder, tokenizer.vocab_size, True, "plain")
    tokenizer.save_pretrained(folder)
    labels = list(label_ids(tokenizer, template))
    gram = {"template": template.to_dict(), "label_ids": labels, "seq_length": SEQ_LENGTH}
    (folder / "gram_config.json").write_text(json.dumps(gram))
    return folder


@pytest.fixture(scope="module")
def scorer(folder):
    torch.set_num_threads(1)
    return RewardModelScorer.from_pretrained(folder)


def naive_rewards(folder) -> list[float]:
    """Eq. 3 as the authors' evaluation computes it: full logits, one text at a time, softmax over the two labels."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    gram = json.loads((folder / "gram_config.json").read_text())
    template = JudgeTemplate.from_dict(gram["template"], "gram_config.json")

    def label_probabilities(*comparison):
        inputs = tokenizer(template.judge(*comparison), return_tensors="pt")
        assert inputs.input_ids.shape[1] <= SEQ_LENGTH
        with torch.no_grad():
            return model(**inputs).logits[0, -1, gram["label_ids"]].softmax(dim=0).tolist()

    return [0.5 * (label_probabilities(prompt, a, b)[0] + label_probabilities(prompt, b, a)[1]) for prompt, a, b in PAIRS]


def test_rewards_equal_a_naive_computation(folder, scorer):
    found = scorer.score_pairs(PAIRS)
    assert np.ptp(found["reward_a"]) > 0.01, "rewards must differ for the comparison to mean anything"
    np.testing.assert_allclose(found["reward_a"], naive_rewards(folder), atol=1e-5)
    assert not found["truncated"].any()


def test_margins_do_not_depend_on_padding_or_batch_mates(scorer):
    together = scorer.margins(PAIRS, batch_tokens=100_000)
    np.testing.assert_allclose(scorer.margins(PAIRS, batch_tokens=1), together, atol=1e-5)
    np.testing.assert_allclose(scorer.margins(PAIRS[::-1], batch_tokens=400)[::-1], together, atol=1e-5)


def test_exchanged_responses_give_the_other_reward(scorer):
    given = scorer.score_pairs(PAIRS)
    exchanged = scorer.score_pairs([(prompt, b, a) for prompt, a, b in PAIRS])
    np.testing.assert_allclose(given["reward_a"] + exchanged["reward_a"], 1.0, atol=1e-6)


def test_long_responses_are_shortened_and_counted(scorer):
    found = scorer.score_pairs([PAIRS[0], ("one", "red " * 500, "green")])
    assert found["truncated"].tolist() == [False, True] and np.isfinite(found["reward_a"]).all()


def test_files_in_and_out(folder, scorer, tmp_path, capsys):
    prompts = [{"prompt": prompt, "chosen": a, "rejected": b} for prompt, a, b in PAIRS]
    prompts[0] = {"prompt": PAIRS[0][0], "response_a": PAIRS[0][1], "response_b": PAIRS[0][2]}
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    files = [str(tmp_path / name) for name in ("in.jsonl", "out.jsonl")]
    main([*files, "--model", str(folder), "--report", str(tmp_path / "report.json")])

    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    rewards = scorer.score_pairs(PAIRS)["reward_a"]
    np.testing.assert_allclose([line["reward_a"] for line in lines], rewards, atol=1e-5)
    np.testing.assert_allclose([line["reward_b"] for line in lines], 1.0 - rewards, atol=1e-5)
    assert [line["preference"] for line in lines] == [None] + [1.0] * 6
    assert [line["place"] for line in lines] == [f"{files[0]}:{number}" for number in range(1, 8)]

    report = json.loads((tmp_path / "report.json").read_text())
    assert report == json.loads(capsys.readouterr().out)
    assert report["pairs"] == 6 and report["truncated"] == 0
    assert report["accuracy"] == pytest.approx((rewards[1:] > 0.5).mean())


def test_folders_that_cannot_score_are_named(folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    with pytest.raises(ConfigError, match="gram_config.json: no such file. --model needs a folder written by `gram convert`"):
        RewardModelScorer.from_pretrained(tmp_path)
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = broken / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="margins are not finite"):
        RewardModelScorer.from_pretrained(broken).margins(PAIRS[:1])
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="broken: the model cannot be loaded"):
        RewardModelScorer.from_pretrained(broken)
    shutil.copy(folder / "model.safetensors", weights)
    gram = json.loads((broken / "gram_config.json").read_text())
    (broken / "gram_config.json").write_text(json.dumps({**gram, "label_ids": [5, 99999]}))
    with pytest.raises(ConfigError, match=r"label_ids \[5, 99999\] lie outside the vocabulary of \d+ tokens"):
        RewardModelScorer.from_pretrained(broken)
