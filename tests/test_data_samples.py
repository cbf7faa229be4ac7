"""From text to tokens: tokenizers, the judge template, spans, truncation."""

import json
from pathlib import Path

import pytest

from gram_engine.data.samples import OverlongSample, generate_sample, judge_sample, layout_of
from gram_engine.data.schema import Pair, PreformattedRow
from gram_engine.data.template import JudgeTemplate
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import ConfigError
from tests.conftest import TEMPLATE

AWKWARD = [" two  spaces", "tab\tand\nlines\n\n\n", "naïve café 東京 🙂", "\u200b\u00a0odd", "a" * 70, "<s> </s> <unk>"]


def build_judge(tokenizer, template, prompt, a, b, max_tokens, overlong="truncate"):
    """Tokens of a judge prompt."""
    return judge_sample(tokenizer, template.judge_layout(prompt, a, b), max_tokens, overlong).tokens


def build_generate(tokenizer, template, prompt, a, b, max_tokens):
    """A stage-1 sample."""
    layout = template.generate_layout(prompt).followed_by(template.responses_layout(a, b))
    return generate_sample(tokenizer, layout, max_tokens, "truncate")


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(tiny_data):
    return Tokenizer.load("auto", tiny_data["tokenizer"])


@pytest.mark.parametrize("text", AWKWARD)
def test_sentencepiece_file_encodes_as_sentencepiece_and_text_survives(text, tiny_data, sentencepiece_tokenizer):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=tiny_data["tokenizer"])
    if "<s>" not in text:  # SentencePiece does not know control symbols in text
        assert sentencepiece_tokenizer.encode(text) == model.encode(text)
        assert sentencepiece_tokenizer.decode(sentencepiece_tokenizer.encode(text)).strip(" ") == text.strip(" ")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("collapse", [True, False])
def test_other_kinds_of_sentencepiece_models(kind, rule, collapse, tiny_data, tmp_path):
    import sentencepiece

    text = Path(tiny_data["tokenizer"]).with_suffix(".txt")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=400, model_type=kind, normalization_rule_name=rule,
        remove_extra_whitespaces=collapse, byte_fallback=kind == "bpe", minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    tokenizer = Tokenizer.load("auto", tmp_path / "m.model")
    for awkward in [*AWKWARD[:-1], "", " ", "  lines \n\n with ends \n", "a\u2581b \u2581", "=" * 33 + "\n" + "=" * 34]:
        assert tokenizer.encode(awkward) == model.encode(awkward), awkward


@pytest.mark.parametrize("text", AWKWARD)
def test_saved_folder_encodes_the_same_through_transformers(text, sentencepiece_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    sentencepiece_tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode(text, add_special_tokens=False) == sentencepiece_tokenizer.encode(text)


def test_judge_sample_of_a_chat_model_has_one_bos_a_pinned_date_and_equals_the_servers_tokens(chat_folder):
    from transformers import AutoTokenizer

    tokenizer, template = Tokenizer.load("auto", chat_folder), JudgeTemplate.load("gram-code")
    tokens = build_judge(tokenizer, template, "hello", "yes", "no", 2048)
    assert tokens.count(tokenizer.bos_id) == 1 and tokens[0] == tokenizer.bos_id
    text = tokenizer.decode(tokens)
    assert "[26 Jul 2024]" in text and text.endswith("#Preferred:<|end|><|assistant|>")
    message = [{"role": "user", "content": template.judge("hello", "yes", "no")}]
    server = AutoTokenizer.from_pretrained(chat_folder)
    rendered = server.apply_chat_template(
        message, add_generation_prompt=True, date_string="26 Jul 2024", return_dict=False, tokenize=True
    )
    assert tokens == list(rendered)


def test_labels_are_single_distinct_tokens(chat_folder, sentencepiece_tokenizer):
    for tokenizer in (Tokenizer.load("auto", chat_folder), sentencepiece_tokenizer):
        context = tokenizer.wrap_user(JudgeTemplate.load("gram-code").judge("x", "y", "z"))
        label_a, label_b = tokenizer.label_ids("A", "B", context)
        assert label_a != label_b and tokenizer.decode([label_a]).strip() == "A"
        with pytest.raises(ConfigError, match="preferable"):
            tokenizer.label_ids("preferable", "B", context)


def test_template_wording_and_hash(tmp_path):
    template = JudgeTemplate.load("gram-code")
    text = template.judge("Q?", "one", "two")
    assert text.endswith(
        "[User Question]\nQ?\n\n[The Start of Assistant A's Answer]\none\n[The End of Assistant A's Answer]\n\n"
        "[The Start of Assistant B's Answer]\ntwo\n[The End of Assistant B's Answer]\n\n#Preferred:"
    )
    assert text == template.judge("Q?", "one", "two") and "{" not in text
    (tmp_path / "t.yaml").write_text(template.to_yaml())
    assert JudgeTemplate.load(tmp_path / "t.yaml").sha256 == template.sha256 != JudgeTemplate.load(TEMPLATE).sha256
    assert template.judge("{response_a}", "{prompt}", "x").count("{response_a}") == 1, "slots are not filled twice"


def test_stage_1_spans_hold_the_responses(sentencepiece_tokenizer):
    template = JudgeTemplate.load(TEMPLATE)
    pair = Pair("red blue?", "stone river", "quiet cloud window", 1.0)
    sample = generate_sample(sentencepiece_tokenizer, layout_of(pair, template, "generate", False), 500, "error")
    part = lambda start, end: sentencepiece_tokenizer.decode(sample.tokens[start:end]).strip()  # noqa: E731
    assert part(*sample.response_a) == "stone river" and part(*sample.response_b) == "quiet cloud window"
    assert part(sample.target_start, sample.middle).startswith("[The Start of Assistant A's Answer]")
    assert part(sample.middle, len(sample.tokens)).startswith("[The Start of Assistant B's Answer]")
    assert sample.tokens[-1] == sentencepiece_tokenizer.eos_id
    assert part(0, sample.target_start).endswith("red blue?")


def test_a_ready_made_row_equals_the_pair_it_was_made_from(sentencepiece_tokenizer):
    template = JudgeTemplate.load("gram-code")
    pair = Pair("red?", "stone", "river cloud", 0.0)
    ready = PreformattedRow(template.judge("red?", "stone", "river cloud"), "B")
    for swapped in (False, True):
        tokens = [
            judge_sample(sentencepiece_tokenizer, layout_of(row, template, "judge", swapped), 2000, "error").tokens
            for row in (pair, ready)
        ]
        assert tokens[0] == tokens[1]


@pytest.mark.parametrize("limit", [130, 150, 200])
def test_truncation_keeps_template_and_label_row(limit, sentencepiece_tokenizer):
    template = JudgeTemplate.load(TEMPLATE)
    prompt, a, b = "question " * 10, "long answer " * 40, "short"
    tokens = build_judge(sentencepiece_tokenizer, template, prompt, a, b, limit)
    text = sentencepiece_tokenizer.decode(tokens)
    assert limit - 6 <= len(tokens) <= limit
    assert text.endswith("#Preferred:") and "short" in text and text.count("[The ") == 4
    assert template.judge("", "", "").split("\n")[0] in text
    stage_1 = build_generate(sentencepiece_tokenizer, template, prompt, a, b, limit)
    assert stage_1.truncated and limit - 6 <= len(stage_1.tokens) <= limit
    assert stage_1.tokens[-1] == sentencepiece_tokenizer.eos_id


def test_of_the_prompt_its_end_is_kept_and_the_responses_have_half_of_the_room(sentencepiece_tokenizer):
    template = JudgeTemplate.load(TEMPLATE)
    count = lambda text: len(sentencepiece_tokenizer.encode(text))  # noqa: E731
    room = 200 - len(build_judge(sentencepiece_tokenizer, template, "", "", "", 500))
    prompt, a, b = "first " + "turn " * 200 + "last", "red " * 200, "blue " * 200
    text = sentencepiece_tokenizer.decode(build_judge(sentencepiece_tokenizer, template, prompt, a, b, 200))
    kept = template.find_judge(text).slots
    kept = {name: text[start:end] for name, (start, end) in kept.items()}
    assert kept["prompt"].endswith("turn last") and "first" not in kept["prompt"]
    assert count(kept["prompt"]) == pytest.approx(room / 2, abs=4)
    assert count(kept["response_a"]) == pytest.approx(count(kept["response_b"]), abs=4)


def test_over_long_samples_can_be_refused_and_so_are_ready_made_ones_without_markers(sentencepiece_tokenizer):
    template = JudgeTemplate.load(TEMPLATE)
    with pytest.raises(OverlongSample, match="tokens, over --seq-length 150. Raise it, or use --overlong"):
        build_judge(sentencepiece_tokenizer, template, "x", "word " * 200, "y", 150, "drop")
    strange = layout_of(PreformattedRow("judge " * 200, "A"), template, "judge", False)
    with pytest.raises(OverlongSample, match="markers of the template are not found"):
        judge_sample(sentencepiece_tokenizer, strange, 150, "truncate")


def test_the_authors_rows_without_a_line_break_before_the_closing_marker(sentencepiece_tokenizer):
    template = JudgeTemplate.load("gram-code")
    row = PreformattedRow(
        "[User Question]\nCan dogs get covid?\n\n",
        "[The Start of Assistant A's Answer]\nYes. [The End of Assistant A's Answer]\n\n"
        "[The Start of Assistant B's Answer]\nMany\n[The End of Assistant B's Answer]",
    )
    layout = layout_of(row, template, "generate", False)
    assert layout.text == row.instruction + row.output
    slots = {name: layout.text[start:end] for name, (start, end) in layout.slots.items()}
    assert (slots["response_a"].strip(), slots["response_b"]) == ("Yes.", "Many")
    assert layout.text[layout.middle :].startswith("[The Start of Assistant B's Answer]")
    swapped = layout_of(row, template, "generate", True)
    assert swapped.text[slice(*swapped.slots["response_a"])] == "Many"
    assert swapped.text[swapped.middle :].startswith("[The Start of Assistant B's Answer]\nYes.")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"judge": "{prompt} {response_b} {response_a}"}, "'judge' must hold each of {prompt}, {response_a}, {response_b}"),
        ({"label_b": "A"}, "label_a 'A' and label_b 'A' must be two different words"),
        ({"colour": "red"}, "unknown: colour"),
    ],
)
def test_wrong_templates_are_refused(change, message, tmp_path):
    content = {**JudgeTemplate.load("gram-code").to_dict(), **change}
    with pytest.raises(ConfigError, match=message):
        JudgeTemplate.from_dict(content, "t.yaml")


def test_a_chat_template_that_changes_the_message_is_refused(chat_folder, tmp_path):
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(chat_folder)
    hf.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    hf.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="the chat template changes the text of a user's message"):
        Tokenizer.load("auto", tmp_path)


def test_the_exported_chat_template_prints_the_pinned_date_by_itself(chat_folder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.load("auto", chat_folder)
    tokenizer.save_pretrained(tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    message = [{"role": "user", "content": " hi "}]
    assert exported.apply_chat_template(message, add_generation_prompt=True, tokenize=False) == tokenizer.wrap_user(" hi ")
    assert Tokenizer.load("auto", tmp_path).fingerprint == tokenizer.fingerprint


def test_unknown_template_and_tokenizer_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="gram-code"):
        JudgeTemplate.load("no-such-template")
    with pytest.raises(ConfigError, match="no such file or folder"):
        Tokenizer.load("auto", tmp_path / "none.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({}))
    with pytest.raises(ConfigError):
        Tokenizer.load("auto", tmp_path)
