"""What a server's answers mean: log-probabilities, verdicts as text, addresses, flags, the file of answers."""

import json
import math

import pytest
import tyro

from gram_engine.errors import ConfigError
from gram_engine.scoring.server.answers import Answer, Answers
from gram_engine.scoring.server.options import ServerOptions, endpoint
from gram_engine.scoring.server.verdict import CERTAIN, margin_of_logprobs, margin_of_text

LOG = math.log


@pytest.mark.parametrize(
    "top, margin",
    [
        ({"A": LOG(0.6), "B": LOG(0.3), "C": LOG(0.1)}, LOG(2)),
        ({"B": -0.1, "A": -3.1}, -3.0),
        ({"A": LOG(0.6), " B": LOG(0.39), "B": LOG(0.001)}, LOG(600)),  # exact spellings first
        ({'"A': -1.0, '"B': -1.5, "The": -3.0}, 0.5),
        ({" A": -1.0, "A\n": -0.5, " B": -2.0}, 1.5),
        ({"A": LOG(0.9), "The": LOG(0.06), "I": LOG(0.03)}, LOG(90)),  # B has at most what is left of 1
        ({"A": LOG(0.5), "The": LOG(0.1), "I": LOG(0.05)}, LOG(10)),  # B has at most the least listed
        ({"B": LOG(0.9)}, LOG(1 / 9)),
        ({"The": -0.2, "A": -4.0}, None),  # as improbable as the list is long
        ({"The": -0.2, "I": -4.0}, None),
        ({"A": 0.0, "B": -9999.0}, 9999.0),
    ],
)
def test_margin_of_logprobs(top, margin):
    found = margin_of_logprobs(top, "A", "B")
    assert found == (None if margin is None else pytest.approx(margin))


VERDICTS = {
    "A": 'A|"A"|[[A]]|A.|A\n|Assistant A|**A**|(A)|Preferred: A|#Preferred: A|Verdict: [[A]]|A\n\nBecause it is right.|'
    "The better response is A.|Answer: A|**Final Verdict:** A|<answer>A</answer>|I think B is fine, but A is better.|"
    "I prefer assistant A.|First I thought [[B]]. No: [[A]]|Response A is clearly better than Response B.|"
    "<think>B is better. [[B]]</think>A|Both are good.\n\nA|My choice is Assistant A|\\boxed{A}|“A”|Winner: **A**|"
    'I would choose A|"A" if assistant A is better, "B" if assistant B is better: "A"|A: it is correct, B is not',
    "B": 'B|"B"|[[B]]|[[A]] is what some say; [[B]]|Preferred: B|Assistant B is better.|The winner is B|'
    "thoughts without a beginning [[A]]</think>\n\nB|Answer B is better than answer A.|`B`|B, as A is wrong.",
    None: "|A good question needs thought.|Both are equally good.|<think>A is better, so [[A]]|C|[[C]]|Neither.|AB|"
    'Assistant|"A" if assistant A is better, "B" if assistant B is better|A and B are alike.',
}


@pytest.mark.parametrize("text, label", [(text, label) for label, texts in VERDICTS.items() for text in texts.split("|")])
def test_verdict_of_a_text(text, label):
    assert margin_of_text(text, "A", "B") == {"A": CERTAIN, "B": -CERTAIN, None: None}[label]


def test_labels_are_the_templates():
    assert margin_of_text("Verdict: [[2+]]", "1.", "2+") == -CERTAIN
    assert margin_of_text("1.", "1.", "2+") == CERTAIN
    assert margin_of_text("12", "1.", "2+") is None
    assert margin_of_logprobs({"2+": -0.1, "1.": -2.1}, "1.", "2+") == pytest.approx(-2.0)


@pytest.mark.parametrize(
    "url, api, expected",
    [
        ("https://api.openai.com/v1", "auto", ("https://api.openai.com/v1/chat/completions", "openai")),
        ("https://api.openai.com/v1/chat/completions", "auto", ("https://api.openai.com/v1/chat/completions", "openai")),
        ("http://localhost:8000", "openai", ("http://localhost:8000/v1/chat/completions", "openai")),
        ("http://localhost:8000/", "auto", ("http://localhost:8000/v1/chat/completions", "openai")),
        ("https://host/openai/", "auto", ("https://host/openai/chat/completions", "openai")),
        ("https://host/v1?api-version=1", "auto", ("https://host/v1/chat/completions?api-version=1", "openai")),
        ("http://localhost:8000/classify", "auto", ("http://localhost:8000/classify", "vllm-classify")),
        ("http://localhost:8000/v1", "vllm-classify", ("http://localhost:8000/classify", "vllm-classify")),
        ("http://[::1]:30000", "sglang-score", ("http://[::1]:30000/v1/score", "sglang-score")),
        ("http://localhost:30000/v1/score", "auto", ("http://localhost:30000/v1/score", "sglang-score")),
    ],
)
def test_addresses(url, api, expected):
    assert endpoint(url, api) == expected


@pytest.mark.parametrize("url", ["http://", "https:///v1", "http://host:port", "http://host:99999/v1"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ConfigError, match="not an address. Write https://host/v1"):
        endpoint(url, "auto")


def test_an_address_with_a_password_is_refused_and_not_shown():
    with pytest.raises(ConfigError, match="--api-key-env NAME") as error:
        endpoint("https://me:secret@host/v1", "auto")
    assert "secret" not in str(error.value)


def test_flags():
    args = "--server-model gpt --server-concurrency 4 --api-key-env MY_KEY --server-api sglang-score --server-timeout 2".split()
    options = tyro.cli(ServerOptions, args=[*args, "--server-body", '{"seed": 1}'])
    assert (options.server_model, options.server_concurrency, options.api_key_env) == ("gpt", 4, "MY_KEY")
    assert options.body() == {"seed": 1}
    assert "api_key_env" not in options.depends_on() and options.depends_on()["server_model"] == "gpt"
    assert options.keeping_answers_beside("a/b.jsonl").server_answers == "a/b.jsonl.answers.jsonl"
    assert ServerOptions(server_answers="kept").keeping_answers_beside("b").server_answers == "kept"


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"server_concurrency": 0}, "--server-concurrency 0 must be greater than 0"),
        ({"server_timeout": -1.0}, "--server-timeout -1.0 must be"),
        ({"server_top_logprobs": -1}, "--server-top-logprobs -1"),
        ({"server_body": "{seed: 1}"}, "--server-body is not JSON"),
        ({"server_body": "[1]"}, "--server-body holds a list"),
    ],
)
def test_flags_that_cannot_work(flags, message):
    with pytest.raises(ConfigError, match=message):
        ServerOptions(**flags).check()


def test_answers_are_kept_past_a_kill(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    answers = Answers(path)
    answers.add("one", Answer(1.5, "A", 10, 1))
    answers.add("two", Answer(None, "half of a \ud800 pair", 7, 2))
    assert len(path.read_text().splitlines()) == 2, "written when add returns"
    answers.close()
    whole = path.read_bytes()
    damaged = [b'{"key": "three", "margin": Infinity, "text": "", "prompt_tokens": 1, "completion_tokens": 1}\n']
    damaged += [b'{"key": "four", "margin": 1.0}\n', b"[1]\n", b"\xff\n", b'{"key": "five", "margin": 2.0, "te']
    path.write_bytes(whole + b"".join(damaged))

    answers = Answers(path)
    assert len(answers) == 2 and answers.get("one").margin == 1.5 and answers.get("two").margin is None
    assert answers.get("five") is None and (answers.prompt_tokens, answers.completion_tokens) == (17, 3)
    answers.add("five", Answer(2.0))
    answers.close()
    assert json.loads(path.read_text(errors="replace").splitlines()[-1])["key"] == "five", "on a line of its own"
    assert Answers(path).get("five").margin == 2.0

    forgetful = Answers(None)
    forgetful.add("one", Answer(1.5, "A", 10, 1))
    assert forgetful.get("one") is None and forgetful.prompt_tokens == 10
    with pytest.raises(ConfigError, match="Name a file that can be written"):
        Answers(tmp_path)
