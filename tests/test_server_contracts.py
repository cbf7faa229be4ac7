"""The contracts that are sent token ids, vLLM's /classify and SGLang's /v1/score, against transformers behind HTTP."""

import json
import shutil

import numpy as np
import pytest
import torch

from gram_engine.data.conversation import Conversation
from gram_engine.data.template import JudgeTemplate
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import ConfigError, ServerError
from gram_engine.scoring.server import client
from gram_engine.scoring.server.options import ServerOptions
from gram_engine.scoring.server.scorer import open_server_judge
from tests.support.judge_server import JudgeServer
from tests.support.reward_folder import PAIRS


@pytest.fixture(scope="module")
def theirs(folder):
    """transformers' own (model, tokenizer, judge template, label ids) of the export."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gram = json.loads((folder / "gram_config.json").read_text())
    template = JudgeTemplate.from_dict(gram["template"], "gram_config.json")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder), template, gram["label_ids"]


def last_logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1]


def naive_margins(theirs, comparisons) -> list[float]:
    model, tokenizer, template, (a, b) = theirs
    logits = [last_logits(model, tokenizer(template.judge(*comparison)).input_ids) for comparison in comparisons]
    return [(row[a] - row[b]).item() for row in logits]


def classify(theirs):
    """vLLM's /classify over a pair-logit model."""
    model, _, _, (a, b) = theirs

    def reply(body):
        assert body["use_activation"] is False and all(type(token) is int for token in body["input"])
        logits = last_logits(model, body["input"])
        made = {"index": 0, "label": "LABEL_0", "probs": [(logits[a] - logits[b]).item()], "num_classes": 1}
        return {"object": "list", "data": [made], "usage": {"prompt_tokens": len(body["input"]), "completion_tokens": 0}}

    return reply


def score(theirs):
    """SGLang's /v1/score over a CausalLM; its answer holds no usage."""
    model = theirs[0]

    def reply(body):
        (item,) = body["items"]
        assert item and body["query"] and not body["item_first"] and not body["apply_softmax"]
        probabilities = last_logits(model, body["query"] + item).softmax(dim=0)
        return {"scores": [probabilities[body["label_token_ids"]].tolist()], "object": "scoring", "model": "m"}

    return reply


@pytest.mark.parametrize("path, contract", [("/classify", classify), ("/v1/score", score)])
def test_margins_equal_transformers_and_the_local_judge(path, contract, theirs, folder, scorer):
    options = ServerOptions(server_tokenizer=str(folder), server_concurrency=4)
    with JudgeServer(reply=contract(theirs)) as server:
        judge = open_server_judge(server.url + path, template=None, options=options)
        scores = list(judge.score_pairs(PAIRS))
        long = judge.compare("prompt", "red stone " * 200, "blue " * 200)
        usage = judge.usage
        judge.close()
        sent = server.answered[-1]
    margins = [margin for score in scores for margin in (score.margin, score.swapped_margin)]
    orders = [order for prompt, a, b in PAIRS for order in ((prompt, a, b), (prompt, b, a))]
    np.testing.assert_allclose(margins, naive_margins(theirs, orders), atol=1e-5)
    np.testing.assert_allclose(margins, scorer.margins(orders), atol=1e-5)
    assert np.ptp(margins) > 0.01
    assert long.truncated and not any(score.truncated for score in scores)
    assert len(sent["input"] if path == "/classify" else sent["query"] + sent["items"][0]) <= 192
    assert (
        usage["prompt_tokens"] == (0 if path == "/v1/score" else pytest.approx(usage["prompt_tokens"]))
        and usage["requests"] == 16
    )


def test_scalar_rewards_by_classify(theirs, folder, tmp_path):
    tokenizer = Tokenizer.load("HuggingFaceTokenizer", folder)
    shutil.copytree(folder, tmp_path / "scalar", ignore=shutil.ignore_patterns("*.safetensors"))
    conversation = Conversation.of(tokenizer)
    gram = {"head": "scalar", "conversation": conversation.to_dict(), "seq_length": 192}
    (tmp_path / "scalar" / "gram_config.json").write_text(json.dumps(gram))
    model, hf, _, _ = theirs

    def reward(ids) -> float:
        return last_logits(model, ids)[7].item()

    def naive(prompt, response) -> float:
        return reward(hf(f"{prompt}\n\n{response}{hf.eos_token}").input_ids)

    def reply(body):
        return {"data": [{"probs": [reward(body["input"])], "num_classes": 1}], "usage": None}

    options = ServerOptions(server_tokenizer=str(tmp_path / "scalar"))
    with JudgeServer(reply=reply) as server:
        judge = open_server_judge(server.url + "/classify", template=None, options=options)
        scores = list(judge.score_pairs(PAIRS))
        ranking = judge.rank("prompt", ["red", "blue", "green"])
        judge.close()
        with pytest.raises(ConfigError, match="a scalar model has no label tokens"):
            open_server_judge(server.url + "/v1/score", template=None, options=options)
    expected = [(naive(prompt, a), naive(prompt, b)) for prompt, a, b in PAIRS]
    np.testing.assert_allclose([score.rewards for score in scores], expected, atol=1e-5)
    np.testing.assert_allclose([score.margin for score in scores], [a - b for a, b in expected], atol=1e-5)
    np.testing.assert_allclose(ranking.rewards, [naive("prompt", word) for word in ("red", "blue", "green")], atol=1e-5)
    assert ranking.reference is None


def test_another_ones_scalar_model_reads_its_own_chat_template(chat_folder, tmp_path):
    """A folder of a sequence classifier without weights: the ids are those of transformers, shortened to --seq-length."""
    from transformers import AutoTokenizer

    shutil.copytree(chat_folder, tmp_path / "scalar")
    (tmp_path / "scalar" / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    options = ServerOptions(server_tokenizer=str(tmp_path / "scalar"))
    with JudgeServer(reply=lambda body: {"data": [{"probs": [len(body["input"])]}]}) as server:
        judge = open_server_judge(server.url + "/classify", template=None, options=options)
        scored = judge.compare("hello", "yes, or no", "no")
        judge.close()
        judge = open_server_judge(server.url + "/classify", template=None, options=options, seq_length=50)
        assert judge.compare("hello", "yes " * 100, "no").truncated
        judge.close()
        sent = [body["input"] for body in server.answered]
    hf = AutoTokenizer.from_pretrained(chat_folder)
    lengths = []
    for response in ("yes, or no", "no"):
        messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": response}]
        ids = hf.apply_chat_template(messages, date_string="26 Jul 2024", tokenize=True, return_dict=False)
        assert list(ids) in sent
        lengths.append(len(ids))
    assert scored.rewards == tuple(lengths) and max(map(len, sent)) == 50


def test_a_zero_shot_model_takes_any_template(chat_folder):
    """A tokenizer's folder without gram_config.json: the ids are those of the chat template, whole."""
    from transformers import AutoTokenizer

    with JudgeServer(reply=lambda body: {"scores": [[0.3, 0.0]]}) as server:
        options = ServerOptions(server_tokenizer=str(chat_folder), server_model="m")
        judge = open_server_judge(server.url + "/v1/score", template="gram-code", options=options)
        scored = judge.compare("hello", "yes", "no")
        judge.close()
        sent = server.answered[1:]
    hf = AutoTokenizer.from_pretrained(chat_folder)
    message = {"role": "user", "content": JudgeTemplate.load("gram-code").judge("hello", "yes", "no")}
    ids = hf.apply_chat_template(
        [message], add_generation_prompt=True, date_string="26 Jul 2024", tokenize=True, return_dict=False
    )
    assert list(ids) in [body["query"] + body["items"][0] for body in sent]
    assert [hf.decode([token]) for token in sent[0]["label_token_ids"]] == ["A", "B"]
    assert scored.margin > 80 and np.isfinite(scored.margin), "a probability that was rounded to 0"


@pytest.mark.parametrize("probs", [[0.2, 0.8], [], [float("nan")], None])
def test_answers_without_one_logit_are_refused(probs, folder, monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    options = ServerOptions(server_tokenizer=str(folder), server_tries=2)
    with JudgeServer(reply=lambda body: {"data": [{"probs": probs}]}) as server:
        with pytest.raises(ServerError, match="2 tries failed, the last one with an answer that is not what was asked for"):
            open_server_judge(server.url + "/classify", template=None, options=options)
