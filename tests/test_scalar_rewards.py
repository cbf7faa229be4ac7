"""From rows to scalar rewards: how a conversation is written and shortened, and the whole way of the data to scores."""

import json

import numpy as np
import pytest
import torch

from gram_engine.config.schema import DataConfig
from gram_engine.data.conversation import Conversation
from gram_engine.data.dataset import PairDataset
from gram_engine.data.inspect import InspectArguments, describe
from gram_engine.data.loader import PackedLoader
from gram_engine.data.preprocess import preprocess
from gram_engine.data.samples import OverlongSample, conversation_sample, conversations_sample
from gram_engine.data.schema import Pair
from gram_engine.data.template import JudgeTemplate
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import ConfigError, DataError
from tests.conftest import TEMPLATE
from tests.support.tiny import SHAPE, tiny_trainer

ROWS = [
    {"prompt": "which one", "response_a": "red blue", "response_b": "quiet river of stone", "label": "A"},
    {"prompt": "which one", "response_a": "green", "response_b": "apple garden", "label": "B"},
    {"prompt": "what else", "response_a": "paper", "response_b": "silver moon", "label": "tie"},
]


@pytest.fixture(scope="module")
def plain(tiny_data):
    return Tokenizer.load("auto", tiny_data["tokenizer"])


def test_a_chat_models_conversation_has_the_servers_tokens(chat_folder):
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.load("auto", chat_folder)
    conversation = Conversation.of(tokenizer)
    sample = conversation_sample(tokenizer, conversation, " hello ", "yes\n\nno ", 500, "error")
    messages = [{"role": "user", "content": " hello "}, {"role": "assistant", "content": "yes\n\nno "}]
    server = AutoTokenizer.from_pretrained(chat_folder)
    rendered = server.apply_chat_template(messages, date_string="26 Jul 2024", return_dict=False, tokenize=True)
    assert sample.tokens == list(rendered)
    start, end = sample.response_a
    assert tokenizer.decode(sample.tokens[start:end]) == "yes\n\nno" and sample.tokens[end:] == [tokenizer.eos_id]
    assert conversation.pad_id(tokenizer) == tokenizer.bos_id, "without a padding token; never the last token"

    server.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    tokenizer.hf = server
    with pytest.raises(ConfigError, match="the chat template changes the text of a message"):
        Conversation.of(tokenizer)
    server.chat_template, server.bos_token = None, None
    tokenizer.bos_id = None
    with pytest.raises(ConfigError, match="no token is left to pad with"):
        Conversation.of(tokenizer)


def test_long_texts_are_shortened_in_prompt_and_response_only(plain):
    conversation = Conversation.of(plain)
    prompt, response = " ".join(f"p{number}" for number in range(60)), " ".join(f"r{number}" for number in range(90))
    whole = conversation_sample(plain, conversation, prompt, response, 10_000, "error")
    assert plain.decode(whole.tokens[1:]).replace("</s>", "").strip() == f"{prompt}\n\n{response}"
    short = conversation_sample(plain, conversation, prompt, response, 100, "truncate")
    text = plain.decode(short.tokens[1:])
    assert short.truncated and 90 < len(short.tokens) <= 100
    assert short.tokens[0] == plain.bos_id and short.tokens[-1] == plain.eos_id
    assert "p59\n\nr0 r1" in text and "p0 " not in text and "r89" not in text
    pair = Pair(prompt, response, "yes", 1.0)
    both = conversations_sample(plain, conversation, pair, 100, "truncate")
    assert both.tokens[: both.middle] == short.tokens and both.truncated and len(both.tokens) - both.middle <= 100
    assert plain.decode(both.tokens[slice(*both.response_b)]).strip() == "yes"
    with pytest.raises(OverlongSample, match="tokens, over --seq-length 100"):
        conversations_sample(plain, conversation, pair, 100, "drop")


def make(rows, folder, tokenizer, both_orders=False, **settings):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = DataConfig(tokenizer_model=tokenizer, seq_length=192, template=TEMPLATE, **settings)
    preprocess([file], folder / "rows", objective="bradley-terry", cfg=cfg, both_orders=both_orders)
    return PairDataset(folder / "rows")


def test_packs_hold_both_texts_and_name_the_better_responses_tokens(plain, tiny_data, tmp_path):
    dataset = make(ROWS, tmp_path, tiny_data["tokenizer"])
    names = ("response_a", "response_b")
    texts = [[plain.prefix_ids + plain.encode(f"{row['prompt']}\n\n{row[name]}</s>") for name in names] for row in ROWS]
    assert [dataset.tokens(number).tolist() for number in range(3)] == [a + b for a, b in texts]
    assert dataset.parts.tolist() == [[len(a), len(b)] for a, b in texts]
    settings = dict(global_batch_size=3, pack_tokens=384, pad_multiple=64, dp_rank=0, dp_size=1)
    (pack,) = PackedLoader(dataset, seed=0, sft=True, **settings).batch(0).microbatches
    bounds, rows = pack.cu_seqlens.tolist(), pack.rows.tolist()
    order = [text for number in pack.sample_ids.tolist() for text in texts[number]]
    assert [pack.tokens[a:b].tolist() for a, b in zip(bounds[:6], bounds[1:7])] == order
    assert rows == [end - 1 for end in bounds[1:7]]
    assert all(pack.position_ids[bounds[n] : bounds[n + 1]].tolist() == list(range(len(text))) for n, text in enumerate(order))
    learnt = {(int(weight * 2), int(target)) for weight, target in zip(pack.sft_weight, pack.sft_targets)}
    wanted = {(2, token) for token in texts[0][0][-2:] + texts[1][1][-2:]} | {(1, token) for token in texts[2][0][-1:]}
    assert wanted <= learnt and {weight for weight, _ in learnt} == {1, 2}
    better = [texts[0][0], texts[1][1], texts[2][0], texts[2][1]]
    prompts = [plain.prefix_ids + plain.encode(f"{row['prompt']}\n\n") for row in (*ROWS, ROWS[2])]
    assert len(pack.sft_rows) == sum(len(text) - len(prompt) for text, prompt in zip(better, prompts))
    assert torch.equal(pack.tokens[pack.sft_rows + 1], pack.sft_targets)
    shown = "\n".join(describe(InspectArguments(str(tmp_path / "rows"))))
    assert shown.count("reward row") == 6 and all(row[name] in shown for row in ROWS for name in names)


def test_ready_made_rows_ties_and_rows_that_cannot_serve(tiny_data, tmp_path):
    template = JudgeTemplate.load(TEMPLATE)
    ready = [
        {"instruction": template.judge(row["prompt"], row["response_a"], row["response_b"]), "output": row["label"]}
        for row in ROWS[:2]
    ]
    for name in ("ready", "fields"):
        (tmp_path / name).mkdir()
    found = make(ready, tmp_path / "ready", tiny_data["tokenizer"])
    wanted = make(ROWS, tmp_path / "fields", tiny_data["tokenizer"])
    for number in range(2):
        assert np.array_equal(found.tokens(number), wanted.tokens(number))
    assert (found.samples["preference"] == wanted.samples["preference"][:2]).all()
    assert len(make(ROWS, tmp_path, tiny_data["tokenizer"], ties="drop")) == 2
    with pytest.raises(DataError, match="rows.jsonl:1: a preformatted row without the markers of the template quickstart"):
        make([{"instruction": "which?", "output": "A"}], tmp_path, tiny_data["tokenizer"])
    with pytest.raises(DataError, match="rows.jsonl:1: no label, which bradley-terry needs"):
        make([{**ROWS[0], "label": None}], tmp_path, tiny_data["tokenizer"])
    with pytest.raises(ConfigError, match="the same in both orders"):
        make(ROWS, tmp_path, tiny_data["tokenizer"], both_orders=True)


def trained(flags):
    """Metrics of the flags' run, data and all."""
    from gram_engine.config.parse import parse
    from gram_engine.config.validate import check
    from gram_engine.model.shapes import resolve_shape
    from gram_engine.platform.environment import world_size

    config = parse([*SHAPE.split(), "--objective", "bradley-terry", "--num-layers", "2", *flags])
    resolve_shape(config)
    check(config, world_size())
    return tiny_trainer(config).train()


def test_from_rows_to_scores(pool, tiny_data, tmp_path, capsys):
    """Train from a file, export, score, rank and evaluate by the commands, and start again from the exported folder."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from gram_engine.convert import command
    from gram_engine.evaluation.evaluate import EvaluateArguments, evaluate
    from gram_engine.scoring import command as scoring
    from gram_engine.scoring.scorer import RewardModelScorer

    jsonl, folder = tiny_data["jsonl"], tmp_path / "hf"
    data = ["--data", jsonl, "--tokenizer-model", tiny_data["tokenizer"], "--data-cache-path", str(tmp_path / "cache")]
    flags = [*data, "--valid-data", jsonl, "--save", str(tmp_path / "run"), "--qk-layernorm", "True", "--train-iters", "12"]
    (metrics,) = pool.run(trained, 1, [*flags, "--sft-loss-weight", "0.001"])
    assert metrics.keys() >= {"loss", "accuracy", "margin", "sft_loss"} and "swap_consistency" not in metrics
    command.main(["--load", str(tmp_path / "run"), "--save", str(folder), "--verify"])
    card = (folder / "README.md").read_text()
    assert "Trained with gram_engine, objective `bradley-terry`, checkpoint `iter_0000012`" in card
    with pytest.raises(SystemExit):
        command.main(["--load", str(tmp_path / "run"), "--save", str(tmp_path / "lm"), "--head", "causal-lm"])
    assert "was trained with --objective bradley-terry. Leave --head out" in capsys.readouterr().err

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "Qwen3ForSequenceClassification" and model.config.num_labels == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    rows = [json.loads(line) for line in open(jsonl)]
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    texts = [f"{bos}{row['prompt']}\n\n{row[name]}{eos}" for row in rows for name in ("chosen", "rejected")]
    with torch.no_grad():
        wanted = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.view(-1, 2).double().numpy()

    scoring.main([jsonl, str(tmp_path / "scores.jsonl"), "--model", str(folder)])
    lines = [json.loads(line) for line in open(tmp_path / "scores.jsonl")]
    np.testing.assert_allclose([line["rewards"] for line in lines], wanted, atol=1e-5)
    difference = wanted[:, 0] - wanted[:, 1]
    np.testing.assert_allclose([line["reward_a"] for line in lines], 1 / (1 + np.exp(-difference)), atol=1e-5)
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx((difference > 0).mean()) == metrics["accuracy"]
    report = evaluate(EvaluateArguments(files=(jsonl,), model=str(folder), output_dir=str(tmp_path / "report")))
    assert report["figures"]["accuracy"] == pytest.approx(metrics["accuracy"])
    assert report["kind"] == "scalar" and report["tokens"] == sum(map(len, tokenizer(texts).input_ids))

    responses = [row["chosen"] for row in rows[:5]]
    (tmp_path / "lists.jsonl").write_text(json.dumps({"prompt": "which one", "responses": responses}))
    scoring.rank_main([str(tmp_path / "lists.jsonl"), str(tmp_path / "ranks.jsonl"), "--model", str(folder)])
    ranks = json.loads((tmp_path / "ranks.jsonl").read_text())
    scorer = RewardModelScorer.from_pretrained(folder, batch_tokens=50)
    rewards = [scorer.reward("which one", response) for response in responses]
    np.testing.assert_allclose(ranks["rewards"], rewards, atol=1e-5)
    assert ranks["best"] == ranks["order"][0] == int(np.argmax(rewards)) and ranks["comparisons"] == 0
    assert scorer.best_of_n("which one", responses, "tournament").index == ranks["best"]
    assert scorer.compare("which one", *responses[:2]).winner == ("a" if rewards[0] > rewards[1] else "b")

    again = ["--data", jsonl, "--data-cache-path", str(tmp_path / "cache"), "--save", str(tmp_path / "again")]
    pool.run(trained_from, 1, [*again, "--load-hf", str(folder), "--lr", "0", "--train-iters", "1"])
    command.main(["--load", str(tmp_path / "again"), "--save", str(tmp_path / "hf2")])
    second = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf2").state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(SystemExit):
        command.main(["import", "--hf-path", str(folder), "--megatron-path", str(tmp_path / "imported")])
    assert "Start from it with --load-hf and --objective bradley-terry" in capsys.readouterr().err


def trained_from(flags):
    """A run whose shape is the Hugging Face folder's."""
    from gram_engine.config.parse import parse
    from gram_engine.model.shapes import resolve_shape

    config = parse(["--objective", "bradley-terry", "--seq-length", "192", "--global-batch-size", "8", *flags])
    resolve_shape(config)
    tiny_trainer(config).train()
