"""The template gram-eval against the procedure of the GRAM authors' evaluation/gram_eval.py, written anew with transformers."""

import itertools
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from gram_engine.data.samples import judge_sample
from gram_engine.data.template import JudgeTemplate
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import ConfigError
from gram_engine.scoring.judges import open_judge
from tests.conftest import TEMPLATE, WORDS
from tests.support.judge_models import write_model

ROOT = Path(__file__).parents[1]
SMOLLM2 = Path(os.environ.get("GRAM_SMOLLM2", ROOT / "runs" / "SmolLM2-135M-Instruct"))
REAL_PAIRS = Path(os.environ.get("GRAM_SMOLLM2_PAIRS", ROOT.parent / "shared" / "data" / "train" / "preferences.jsonl"))

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}"
    "<|assistant|>{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CHATS = {"as it is": CHAT, "trimmed": CHAT.replace("m.content", "m.content | trim")}


def authors_scores(folder, pairs):
    """(score of the first response, score of the second) of each pair, as their script computes them, in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    label_a, label_b = (tokenizer.convert_tokens_to_ids(label) for label in "AB")
    template, scores = JudgeTemplate.load("gram-code"), []
    for prompt, first, second in pairs:
        judge_prompts = [template.judge(prompt, a, b) + " " for a, b in ((first, second), (second, first))]
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            for text in judge_prompts
        ]
        inputs = tokenizer(chats, padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits[:, -1]
        wins_first = torch.gather(logits, 1, torch.tensor([[label_a, label_b], [label_b, label_a]])).softmax(dim=1)
        scores.append(wins_first.mean(dim=0).tolist())
    return np.array(scores)


def agree(folder, pairs, spread):
    expected = authors_scores(folder, pairs)
    found = [score.reward_a for score in open_judge(folder, template="gram-eval", dtype="float32").score_pairs(pairs)]
    assert len(pairs) == 30 and np.ptp(expected[:, 0]) > spread
    np.testing.assert_allclose(found, expected[:, 0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(1 - np.array(found), expected[:, 1], rtol=0, atol=1e-5)
    assert ((np.array(found) > 0.5) == (expected[:, 0] > 0.5)).all()
    return expected[:, 0]


@pytest.fixture(scope="module")
def llama_3(chat_folder, tmp_path_factory):
    """A random LLaMA whose chat template writes a beginning-of-sequence token, and whose tokenizer adds one as well."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer.chat_template = CHATS["as it is"]
    folder = tmp_path_factory.mktemp("llama 3")
    write_model(folder, "llama", "ForCausalLM", chat_folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs():
    """30 pairs of random words."""
    draw = random.Random(0)
    text = lambda: " ".join(draw.choices(WORDS, k=draw.randint(1, 8)))  # noqa: E731
    return [(text(), text(), text()) for _ in range(30)]


@pytest.mark.parametrize("chat", CHATS)
def test_scores_are_the_authors(chat, llama_3, pairs):
    (llama_3 / "chat_template.jinja").write_text(CHATS[chat])
    expected = agree(llama_3, pairs, 0.01)
    for judge in (open_judge(llama_3), open_judge(llama_3, template="gram-code")):
        other = [score.reward_a for score in judge.score_pairs(pairs)]
        assert np.abs(other - expected).max() > 1e-4, "the default template gives other scores, or this test shows nothing"


def test_the_template_differs_by_a_space_and_a_token(llama_3):
    (llama_3 / "chat_template.jinja").write_text(CHATS["as it is"])
    tokenizer = Tokenizer.load("auto", llama_3)
    ours, theirs = (JudgeTemplate.load(name) for name in ("gram-code", "gram-eval"))
    assert theirs.judge("x", "y", "z") == ours.judge("x", "y", "z") + " "
    (one, other) = (
        judge_sample(tokenizer, template.judge_layout("x", "red " * 99, "z"), 400, "truncate") for template in (ours, theirs)
    )
    assert one.truncated and other.truncated
    assert one.tokens[:2] != [0, 0] and other.tokens[:2] == [0, 0] and other.tokens[2] == one.tokens[1] != 0
    assert ours.sha256 == JudgeTemplate.from_dict(ours.to_dict(), "").sha256
    assert JudgeTemplate.from_dict(theirs.to_dict(), "") == theirs != ours
    with pytest.raises(ConfigError, match="'add_bos' is of type str. Write true or false"):
        JudgeTemplate.from_dict({**ours.to_dict(), "add_bos": "yes"}, "mine")
    assert "add_bos" not in JudgeTemplate.load(TEMPLATE).to_dict(), "hashes of other templates stay"


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"no model in {SMOLLM2}: python tools/get_smollm2.py")
@pytest.mark.skipif(not REAL_PAIRS.is_file(), reason=f"no pairs in {REAL_PAIRS}: GRAM_SMOLLM2_PAIRS names a file")
def test_scores_of_a_real_model_are_the_authors():
    with open(REAL_PAIRS, encoding="utf-8") as lines:
        rows = (json.loads(line) for line in lines)
        short = (row for row in rows if sum(len(row[key]) for key in ("prompt", "chosen", "rejected")) < 300)
        pairs = [(row["prompt"], row["chosen"], row["rejected"]) for row in itertools.islice(short, 30)]
    agree(SMOLLM2, pairs, 0.01)
