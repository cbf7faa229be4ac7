"""Models that others made as judges: rewards against transformers itself, what is packed and what is not, folders refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from gram_engine.config.schema import ModelConfig
from gram_engine.data.template import JudgeTemplate
from gram_engine.data.tokenizer import PINNED_DATE
from gram_engine.errors import CheckpointError, ConfigError
from gram_engine.evaluation import best_of_n
from gram_engine.hf.folder import HuggingFaceFolder
from gram_engine.kernels.attention import AttentionBounds
from gram_engine.model.shapes import shape_from_hf
from gram_engine.scoring import command, transformers_model
from gram_engine.scoring.judge_model import JudgeModel
from gram_engine.scoring.judges import open_judge
from gram_engine.scoring.scorer import RewardModelScorer, ScalarScorer
from gram_engine.scoring.transformers_model import CannotPack, TransformersModel
from tests.conftest import TEMPLATE
from tests.support.judge_models import WINDOW, write_model
from tests.support.judge_server import JudgeServer, completion, true_margin, with_logprobs
from tests.support.reward_folder import PAIRS

PACKED = ("qwen2", "mistral", "gemma3", "phi3", "gpt_neox", "gpt2", "granite", "mixtral")
PADDED = {"gemma2": "takes softcap", "gpt_oss": "takes s_aux", "falcon_h1": "cannot be replaced"}
LONG = ("phi3", "gpt2", "mixtral", "gpt_oss", "falcon_h1")
KINDS = [pytest.param(kind, marks=pytest.mark.long if kind in LONG else ()) for kind in (*PACKED, *PADDED)]
RESPONSES = ["red " * (1 + 2 * number) + "stone" for number in range(6)]


@pytest.fixture(scope="module")
def write(chat_folder, tmp_path_factory):
    """write(kind, head="ForCausalLM", **changes of the configuration): the folder of a random model, made once."""
    made = {}

    def get(kind, head="ForCausalLM", **changes):
        key = (kind, head, str(changes))
        if key not in made:
            made[key] = write_model(tmp_path_factory.mktemp(kind), kind, head, chat_folder, **changes)
        return made[key]

    return get


def chat_tokens(tokenizer, *messages, **flags):
    """Tokens of messages in the tokenizer's chat template; user and assistant alternate."""
    roles = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(messages)]
    text = tokenizer.apply_chat_template(roles, tokenize=False, date_string=PINNED_DATE, **flags)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


def naive_rewards(folder, pairs, template=TEMPLATE):
    """Eq. 3 by AutoModelForCausalLM with full logits, one text at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    template = JudgeTemplate.load(template)
    labels = tokenizer.convert_tokens_to_ids(["A", "B"])

    def probabilities(*comparison):
        tokens = chat_tokens(tokenizer, template.judge(*comparison), add_generation_prompt=True)
        with torch.no_grad():
            return model(tokens, attention_mask=torch.ones_like(tokens)).logits[0, -1, labels].softmax(dim=0).tolist()

    return [0.5 * (probabilities(prompt, a, b)[0] + probabilities(prompt, b, a)[1]) for prompt, a, b in pairs]


def naive_scalars(folder, texts):
    """Rewards by AutoModelForSequenceClassification of (prompt, response), one text at a time."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [model(chat_tokens(tokenizer, *text)).logits.item() for text in texts]


def rewards_of(judge, pairs=PAIRS):
    return [score.reward_a for score in judge.score_pairs(pairs)]


def check_against_naive(judge, folder):
    expected = naive_rewards(folder, PAIRS)
    assert np.ptp(expected) > 0.01, "rewards must differ for the comparison to mean anything"
    np.testing.assert_allclose(rewards_of(judge), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_shot_rewards_equal_a_naive_computation(kind, write):
    folder = write(kind)
    judge = open_judge(folder, template=TEMPLATE)
    assert type(judge) is RewardModelScorer and type(judge.model) is TransformersModel
    assert (judge.model.padded_because is None) == (kind in PACKED)
    assert PADDED.get(kind, "") in (judge.model.padded_because or "")
    if kind in ("mistral", "gemma3"):
        assert judge.model.longest == WINDOW, "so that some texts are packed and others padded"
    check_against_naive(judge, folder)
    ranking = judge.rank("which one", RESPONSES, reference=3)
    one_by_one = [judge.score("which one", response, RESPONSES[3]) for response in RESPONSES]
    one_by_one[3] = 0.5
    np.testing.assert_allclose(ranking.rewards, one_by_one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_llama_and_qwen3_keep_the_fast_path(kind, write):
    judge = open_judge(write(kind), template=TEMPLATE)
    assert type(judge.model) is JudgeModel
    check_against_naive(judge, write(kind))


def test_a_llama_with_features_that_the_engine_lacks_goes_through_transformers(write):
    folder = write("llama", attention_bias=True)
    judge = open_judge(folder, template=TEMPLATE)
    assert type(judge.model) is TransformersModel and judge.model.padded_because is None
    check_against_naive(judge, folder)


def test_frequencies_that_depend_on_the_longest_text_of_a_batch(write):
    """longrope: texts over original_max_position_embeddings turn by other frequencies than shorter ones."""
    draw = np.random.default_rng(0)
    factors = {name: draw.uniform(1, 4, 6).tolist() for name in ("short_factor", "long_factor")}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": WINDOW, **factors}
    folder = write("phi3", rope_parameters=rope | {"partial_rotary_factor": 1.0}, original_max_position_embeddings=WINDOW)
    judge = open_judge(folder, template=TEMPLATE)
    assert judge.model.longest == WINDOW and judge.model.padded_because is None
    check_against_naive(judge, folder)


def test_half_precision_is_packed_as_well(write):
    judge = open_judge(write("qwen2"), template=TEMPLATE, dtype="bfloat16")
    assert judge.model.dtype == torch.bfloat16 and judge.model.padded_because is None
    np.testing.assert_allclose(rewards_of(judge), naive_rewards(write("qwen2"), PAIRS), rtol=0, atol=0.05)


def test_a_model_that_looks_at_neighbours_without_attention_is_found_out(write, monkeypatch):
    """Nothing in such a model's configuration says so: the comparison of a few texts does."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    forward = Qwen2MLP.forward

    def shifted(self, hidden):
        return forward(self, hidden + nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1])

    monkeypatch.setattr(Qwen2MLP, "forward", shifted)
    judge = open_judge(write("qwen2"), template=TEMPLATE)
    assert "packed texts give other results" in judge.model.padded_because
    check_against_naive(judge, write("qwen2"))


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"sliding_window": 2}, "sliding window of 2"),
        ({"softcap": 50.0}, "softcap"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"is_causal": False}, "looks ahead"),
        ({"dropout": 0.1}, "dropout"),
        ({"attention_mask": torch.zeros(1)}, "mask of its own"),
    ],
)
def test_the_attention_function_refuses_what_it_does_not_honour(options, reason):
    part = torch.randn(1, 2, 3, 8)
    one = torch.tensor([3])
    token = transformers_model._PASS.set(transformers_model._Pass(AttentionBounds.of_rows(one, one, torch.arange(3))))
    arguments = {"attention_mask": None, "scaling": 0.5, "sliding_window": None, "softcap": None, "position_ids": one}
    try:
        attended, _ = transformers_model._attend(nn.Module(), part, part, part, **arguments)
        expected = nn.functional.scaled_dot_product_attention(part, part, part, is_causal=True, scale=0.5)
        torch.testing.assert_close(attended, expected.transpose(1, 2))
        with pytest.raises(CannotPack, match=reason):
            transformers_model._attend(nn.Module(), part, part, part, **(arguments | options))
    finally:
        transformers_model._PASS.reset(token)


SCALAR_TEXTS = [(prompt, response) for prompt, a, b in PAIRS for response in (a, b)]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "gpt_neox", "gemma2", "bert"])
def test_scalar_rewards_equal_auto_model_for_sequence_classification(kind, write):
    folder = write(kind, "ForSequenceClassification", num_labels=1)
    judge = open_judge(folder)
    assert type(judge) is ScalarScorer and type(judge.model) is (JudgeModel if kind == "llama" else TransformersModel)
    if kind != "llama":
        assert (judge.model.padded_because is None) == (kind not in ("gemma2", "bert"))
    expected = naive_scalars(folder, SCALAR_TEXTS)
    assert np.ptp(expected) > 0.01
    found = [reward for score in judge.score_pairs(PAIRS) for reward in score.rewards]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    ranked = naive_scalars(folder, [("which one", response) for response in RESPONSES])
    np.testing.assert_allclose(judge.rank("which one", RESPONSES).rewards, ranked, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_a_text_that_ends_in_padding_is_read_before_it(kind, write):
    """As transformers does: many reward models pad with the token that ends an answer."""
    folder = write(kind, "ForSequenceClassification", num_labels=1, pad_token_id=3)
    judge = open_judge(folder)
    assert judge.tokenizer.encode("<|end|>") == [3]
    np.testing.assert_allclose(
        [judge.reward(*text) for text in SCALAR_TEXTS], naive_scalars(folder, SCALAR_TEXTS), rtol=0, atol=1e-5
    )


def test_without_padding_token_texts_run_alone(write):
    folder = write("gemma2", "ForSequenceClassification", num_labels=1, pad_token_id=None)
    judge = open_judge(folder)
    found = [reward for score in judge.score_pairs(PAIRS) for reward in score.rewards]
    np.testing.assert_allclose(found, naive_scalars(folder, SCALAR_TEXTS), rtol=0, atol=1e-5)


def with_chat_template(folder, target, template):
    """A copy of the folder with another chat template; None: with none."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shutil.copytree(folder, target))
    (target / "chat_template.jinja").unlink()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(target)
    return target


def test_a_chat_template_may_change_messages(write, tmp_path):
    changing = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | replace('stone', 'STONE') }}<|end|>{% endfor %}"
    folder = with_chat_template(write("qwen2", "ForSequenceClassification", num_labels=1), tmp_path / "model", changing)
    judge = open_judge(folder)
    found = [reward for score in judge.score_pairs(PAIRS) for reward in score.rewards]
    np.testing.assert_allclose(found, naive_scalars(folder, SCALAR_TEXTS), rtol=0, atol=1e-5)
    (score,) = open_judge(folder, seq_length=100).score_pairs([("red", "blue " * 300, "green")])
    assert score.truncated and np.isfinite(score.rewards).all()


def test_texts_are_as_long_as_the_model_takes(write):
    long = ("one", "red " * 3000, "green")
    judge = open_judge(write("qwen2"), template=TEMPLATE)
    assert judge.max_tokens == 1024
    (score,) = judge.score_pairs([long])
    assert score.truncated and np.isfinite(score.margin)
    assert open_judge(write("qwen2"), template=TEMPLATE, seq_length=300).max_tokens == 300
    with pytest.raises(ConfigError, match="--seq-length 1025: .* takes from 1 to 1024 tokens"):
        open_judge(write("qwen2"), template=TEMPLATE, seq_length=1025)


def test_exports_keep_their_template_and_open_by_the_same_door(folder, scorer, capfd):
    judge = open_judge(str(folder), template="gram-paper")
    assert np.array_equal(judge.margins(PAIRS), scorer.margins(PAIRS)), "bit for bit"
    out, line = capfd.readouterr()
    assert out == "" and line.startswith("model: export, labels A=") and line.count("\n") == 1
    assert "template quickstart of its gram_config.json, --template gram-paper is not for it" in line
    assert open_judge(folder, seq_length=100).max_tokens == 100
    with pytest.raises(ConfigError, match="takes from 1 to 192 tokens"):
        open_judge(folder, seq_length=193)


def test_every_command_takes_such_models(write, tmp_path, capfd):
    rows = [{"prompt": prompt, "chosen": a, "rejected": b} for prompt, a, b in PAIRS]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [str(tmp_path / name) for name in ("in.jsonl", "out.jsonl")]
    command.main([*files, "--model", str(write("qwen2")), "--template", TEMPLATE])
    out, err = capfd.readouterr()
    assert json.loads(out)["pairs"] == 7
    assert "model: zero-shot judge, Qwen2ForCausalLM, labels A=36 B=37, template quickstart, packed by transformers\n" in err
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([line["reward_a"] for line in lines], naive_rewards(write("qwen2"), PAIRS), atol=1e-5)

    lists = [{"prompt": f"which {number}", "responses": RESPONSES[: 4 + number]} for number in range(2)]
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lists))
    scalar = write("qwen2", "ForSequenceClassification", num_labels=1)
    models = ["--model", str(write("llama")), "--template", TEMPLATE, "--oracle", str(scalar), "--seq-length", "900"]
    best_of_n.main([str(tmp_path / "lists.jsonl"), *models, "--output-dir", str(tmp_path / "best")])
    err = capfd.readouterr().err
    assert "model: zero-shot judge, LlamaForCausalLM" in err
    assert "model: scalar reward model, Qwen2ForSequenceClassification" in err
    oracle = [json.loads(line)["rewards"] for line in (tmp_path / "best" / "oracle.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(oracle[0], naive_scalars(scalar, [("which 0", text) for text in RESPONSES[:4]]), atol=1e-5)


def test_an_address_is_asked_for_rewards(tmp_path, capfd):
    template = JudgeTemplate.load("gram-code")

    def reply(body):
        return completion("It depends.") if "5 what" in body["messages"][0]["content"] else with_logprobs(body)

    rows = [{"prompt": prompt, "chosen": a, "rejected": b} for prompt, a, b in PAIRS]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [str(tmp_path / name) for name in ("in.jsonl", "out.jsonl")]
    with JudgeServer(reply=reply) as server:
        command.main([*files, "--model", server.url, "--server-model", "judge", "--server-concurrency", "4"])
        best_of_n.main([files[0], "--model", server.url, "--server-model", "judge", "--output-dir", str(tmp_path / "best")])
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    margins = [true_margin(template.judge(*pair)) if number != 5 else 0.0 for number, pair in enumerate(PAIRS)]
    np.testing.assert_allclose([line["margin"] for line in lines], margins, atol=1e-9)
    assert [line["unparsable"] for line in lines] == [0] * 5 + [2, 0]
    out, err = capfd.readouterr()
    assert json.loads(out[: out.index("}") + 1])["pairs"] == 7 and "14 answers" in err
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "best"}, "answers are kept no longer"


def test_results_of_another_template_are_not_continued(tmp_path):
    def depends_on(**flags):
        return command.ModelArguments(model="x", **flags).depends_on()

    mine = tmp_path / "mine.yaml"
    mine.write_text(JudgeTemplate.load("gram-code").to_yaml())
    before = depends_on(template=str(mine))
    assert before == depends_on(template="gram-code") != depends_on(template="gram-eval")
    mine.write_text(JudgeTemplate.load("gram-paper").to_yaml())
    assert before != depends_on(template=str(mine)) and depends_on() != depends_on(seq_length=5)


def refused(folder, error, match, **flags):
    with pytest.raises(error, match=match) as found:
        open_judge(folder, **flags)
    assert "\n" not in str(found.value)


def changed(folder, target, **changes):
    """A copy of the folder with other fields in config.json."""
    path = shutil.copytree(folder, target) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return target


def test_folders_that_are_no_judges_are_named(write, tmp_path):
    refused(tmp_path, ConfigError, "config.json: no such file. --model takes a folder written by `gram convert`")
    qwen, scalar = write("qwen2"), write("qwen2", "ForSequenceClassification", num_labels=1)
    two = write("qwen2", "ForSequenceClassification", num_labels=2)
    refused(two, ConfigError, "config.json: 2 labels; one is needed")
    two = write("llama", "ForSequenceClassification", num_labels=2)
    refused(two, ConfigError, "config.json: 2 labels; one is needed")
    with pytest.raises(CheckpointError, match="2 labels; one is needed"):  # as --load-hf
        HuggingFaceFolder(two).check(ModelConfig(**shape_from_hf(two)), other_head="score.weight")
    own = changed(qwen, tmp_path / "own", architectures=["LlamaForRewardModelWithGating"], auto_map={"AutoModel": "modeling.X"})
    refused(own, ConfigError, r"LlamaForRewardModelWithGating is code of the model's own \(auto_map\), which is not run. Serve")
    encoder = changed(qwen, tmp_path / "encoder", architectures=["BertForMaskedLM"])
    refused(encoder, ConfigError, "BertForMaskedLM is neither a causal language model nor a sequence classifier")
    refused(changed(qwen, tmp_path / "no class", architectures=None), ConfigError, "'architectures' names no class")
    unknown = changed(qwen, tmp_path / "unknown", model_type="new", auto_map={"AutoConfig": "configuration.X"})
    refused(unknown, ConfigError, "config.json: transformers cannot use it")
    refused(with_chat_template(scalar, tmp_path / "none", None), ConfigError, "no chat template, so it is not known how")
    no_answer = "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no answers') }}{% endif %}x"
    refused(with_chat_template(scalar, tmp_path / "raises", no_answer), ConfigError, r"cannot write .* answer \(no answers\)")
    split = tmp_path / "split.yaml"
    split.write_text(JudgeTemplate.load(TEMPLATE).to_yaml().replace("label_a: A", "label_a: first one"))
    refused(qwen, ConfigError, "label 'first one' is not a single token after", template=str(split))
    refused(write("mamba", max_position_embeddings=None), ConfigError, "says how long a text may be. Give --seq-length")


def test_weights_that_cannot_be_used_are_named(write, tmp_path):
    from safetensors.torch import load_file, save_file

    def with_weights(name, tensors):
        folder = shutil.copytree(write("qwen2"), tmp_path / name)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    tensors = load_file(write("qwen2") / "model.safetensors")
    lacking = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp" not in name}
    refused(with_weights("lacking", lacking), CheckpointError, "3 weights are missing or have another shape: model.layers.1")
    loud = with_weights("loud", {name: tensor * (3e4 if "down_proj" in name else 1) for name, tensor in tensors.items()})
    with pytest.raises(ConfigError, match="results are not finite in float16. Give --dtype bfloat16 or"):
        open_judge(loud, template=TEMPLATE, dtype="float16").compare(*PAIRS[0])
    tensors["model.norm.weight"][5] = float("inf")
    refused(with_weights("infinite", tensors), CheckpointError, "model.norm.weight holds NaN or infinity")
    cut = shutil.copytree(write("qwen2"), tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:5000])
    refused(cut, CheckpointError, "model.safetensors: not a whole safetensors file")
    (cut / "model.safetensors").rename(cut / "pytorch_model.bin")
    refused(cut, CheckpointError, "weights are pickles, which can run code.*CLASS.from_pretrained")
    small = write("qwen2", vocab_size=37)
    refused(small, ConfigError, "label tokens .36, 37. lie outside the vocabulary of 37", template=TEMPLATE)
