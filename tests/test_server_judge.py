"""Judges behind HTTP against real servers on loopback, which answer by a function of the prompt and misbehave on demand."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest

from gram_engine.data.template import JudgeTemplate
from gram_engine.errors import ConfigError, ServerError
from gram_engine.metrics import reward_of_first
from gram_engine.scoring.resumable import write_resumable
from gram_engine.scoring.server import client
from gram_engine.scoring.server.options import ServerOptions
from gram_engine.scoring.server.scorer import open_server_judge
from gram_engine.scoring.server.verdict import CERTAIN
from tests.support.judge_server import JudgeServer, completion, true_margin
from tests.support.pool import run_alone

ROOT = Path(__file__).parents[1]
TEMPLATE = JudgeTemplate.load("gram-code")
KEY = "sk-a-key-that-nobody-may-see"


def pairs_of(count: int) -> list[tuple[str, str, str]]:
    return [(f"prompt {number}", f"first {number}", f"second {number}") for number in range(count)]


def true_margins(pairs) -> np.ndarray:
    """[pairs, 2] in both orders."""
    return np.array([[true_margin(TEMPLATE.judge(p, a, b)), true_margin(TEMPLATE.judge(p, b, a))] for p, a, b in pairs])


def margins_of(scores) -> np.ndarray:
    return np.array([[score.margin, score.swapped_margin] for score in scores])


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(client, "LONGEST_PAUSE", 0.1)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server():
    with JudgeServer() as running:
        yield running


@contextlib.contextmanager
def judge_at(url, template=None, **flags):
    options = ServerOptions(**{"server_model": "judge", "server_timeout": 20.0, **flags})
    judge = open_server_judge(url, template=template, options=options)
    try:
        yield judge
    finally:
        judge.close()


def test_pairs_in_both_orders_and_in_the_inputs_order(server, capsys):
    pairs = pairs_of(60)
    deadline = time.monotonic() + 20

    def out_of_order(exchange):
        while exchange.number > 1 and server.most_at_once < 8 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.001 * (exchange.number * 37 % 20))

    server.misbehave = out_of_order
    with judge_at(server.url, server_concurrency=8) as judge:
        scores = list(judge.score_pairs(iter(pairs)))
        usage = judge.usage
    np.testing.assert_allclose(margins_of(scores), true_margins(pairs), atol=1e-9)
    np.testing.assert_allclose([score.reward_a for score in scores], reward_of_first(*true_margins(pairs).T))
    assert not any(score.unparsable or score.truncated for score in scores)
    assert server.most_at_once == 8 and server.received == 121, "120 verdicts and the trial"
    assert (usage["requests"], usage["prompt_tokens"], usage["completion_tokens"], usage["retries"]) == (120, 1200, 120, 0)
    assert 0 < usage["seconds"] < 60
    asked = [body["messages"] for body in server.answered[1:]]
    assert all(
        [{"role": "user", "content": TEMPLATE.judge(p, *order)}] in asked for p, a, b in pairs for order in ((a, b), (b, a))
    )
    assert {(body["model"], body["temperature"]) for body in server.answered} == {("judge", 0)}
    shown = capsys.readouterr().err
    assert "model: chat completions of judge, verdict by its log-probabilities, or else its text, template gram-code" in shown
    assert "server: 120 answers in" in shown and "1,200 prompt tokens, 120 completion tokens" in shown


def test_lists_and_best_of_n(server):
    responses = [f"response {number}" for number in range(5)]

    def reward(response, reference):
        return float(reward_of_first(*true_margins([("prompt", response, reference)])[0]))

    with judge_at(server.url) as judge:
        ranking = judge.rank("prompt", responses, reference=2)
        best = judge.best_of_n("prompt", responses, "linear")
        assert judge.score("prompt", "x", "y") == pytest.approx(reward("x", "y"))
        np.testing.assert_allclose(judge.margins(pairs_of(3)), true_margins(pairs_of(3))[:, 0], atol=1e-9)
    expected = [0.5 if number == 2 else reward(responses[number], responses[2]) for number in range(5)]
    np.testing.assert_allclose(ranking.rewards, expected, atol=1e-9)
    leader = 0
    for number in range(1, 5):
        leader = number if reward(responses[leader], responses[number]) < 0.5 else leader
    assert best.index == leader


def fails_with(status=500, content=None, headers=None, cut=None, every=3):
    """A server whose every few requests fail, but never the repetition of one."""
    failed = set()

    def misbehave(exchange):
        prompt = exchange.body["messages"][0]["content"]
        if exchange.number % every or prompt in failed:
            return False
        failed.add(prompt)
        exchange.answer(status, content if content is not None else {"error": {"message": "overloaded"}}, headers, cut)
        return True

    return misbehave


def hangs(exchange):
    if exchange.number % 10 == 5:
        time.sleep(2.5)
        exchange.close_connection = True
        return True


def drips(exchange):
    """A byte from time to time, longer than anyone waits."""
    if exchange.number % 10 == 5:
        exchange.send_response(200)
        exchange.send_header("content-length", "100")
        exchange.end_headers()
        for _ in range(25):
            exchange.wfile.write(b" ")
            time.sleep(0.1)
        exchange.close_connection = True
        return True


def closes(exchange):
    if exchange.number % 3 == 0:
        exchange.connection.shutdown(socket.SHUT_RDWR)
        exchange.close_connection = True
        return True


WHOLE = completion("A", {"A": -0.5, "B": -1.0})
FAULTS = {
    "status 500": fails_with(),
    "status 502, a page of HTML": fails_with(502, b"<html>bad gateway</html>"),
    "status 503 with Retry-After": fails_with(503, headers={"retry-after": "0.05"}),
    "status 429 without Retry-After": fails_with(429),
    "half a JSON": fails_with(200, json.dumps(WHOLE).encode()[:60]),
    "less than announced": fails_with(200, WHOLE, cut=40),
    "no choices": fails_with(200, {"choices": [], "usage": None}),
    "an error with status 200": fails_with(200, {"error": {"message": "out of memory"}}),
    "a list": fails_with(200, [1, 2]),
    "NaN as log-probability": fails_with(200, completion("A", {"A": float("nan"), "B": -1.0})),
    "random bytes": fails_with(200, bytes(range(256))),
    "an empty body": fails_with(200, b""),
    "connection closed": closes,
    "too slow": hangs,
    "too slow, byte by byte": drips,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_may_pass_is_tried_again(fault, server):
    server.misbehave = FAULTS[fault]
    pairs = pairs_of(20)
    with judge_at(server.url, server_timeout=0.5 if fault.startswith("too slow") else 20.0) as judge:
        scores = list(judge.score_pairs(pairs))
        assert judge.usage["retries"] >= 3 and judge.usage["requests"] == 40
    np.testing.assert_allclose(margins_of(scores), true_margins(pairs), atol=1e-9)


@pytest.mark.parametrize("told, times", [("seconds", 5), ("date", 2)])
def test_a_rate_limit_is_honoured_by_all_requests(told, times, server):
    """After the limit nothing is sent until the time that the server named; it costs no tries while others get through."""
    wait = 0.6 if told == "seconds" else 1.0  # a date has whole seconds: 1 to 2 from now
    arrivals, limited, victims = [], [], set()

    def misbehave(exchange):
        arrivals.append(time.monotonic())
        prompt = exchange.body["messages"][0]["content"]
        victims.update([prompt] if exchange.number == 12 else [])
        if prompt in victims and len(limited) < times:
            limited.append(time.monotonic())
            header = str(wait) if told == "seconds" else formatdate(time.time() + 2, usegmt=True)
            exchange.answer(429, {"error": {"message": "slow down"}}, {"retry-after": header})
            return True

    server.misbehave = misbehave
    pairs = pairs_of(20)
    with judge_at(server.url, server_concurrency=3, server_tries=3) as judge:
        scores = list(judge.score_pairs(pairs))
        assert judge.usage["retries"] == len(limited) == times
    np.testing.assert_allclose(margins_of(scores), true_margins(pairs), atol=1e-9)
    too_early = [arrival - limit for arrival in arrivals for limit in limited if wait / 2 < arrival - limit < wait - 0.01]
    assert not too_early, "what was under way at the limit arrives soon after it"


def test_too_long_a_wait_ends_the_command(server):
    server.misbehave = lambda exchange: exchange.answer(429, {"detail": "daily limit"}, {"retry-after": "86400"}) or True
    with pytest.raises(ServerError, match=r"asks to wait for 86400 s \(status 429: daily limit\). Rerun the command then"):
        with judge_at(server.url):
            pass
    assert server.received == 1


def test_a_server_that_is_down_is_told_at_once_and_one_that_comes_up_is_waited_for(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(ServerError, match="3 tries failed, the last one with ConnectError.*Rerun the command to resume"):
        with judge_at(f"http://127.0.0.1:{port}", server_tries=3):
            pass
    assert time.monotonic() - started < 5

    sent = client.Client._pause

    async def start_the_server(self, *args):
        if not servers:
            servers.append(JudgeServer(port).__enter__())
        await sent(self, *args)

    servers: list[JudgeServer] = []
    monkeypatch.setattr(client.Client, "_pause", start_the_server)
    try:
        with judge_at(f"http://127.0.0.1:{port}") as judge:
            assert margins_of(judge.score_pairs(pairs_of(1))) == pytest.approx(true_margins(pairs_of(1)))
    finally:
        servers[0].__exit__()


def test_a_wrong_key_is_told_once_and_never_shown(server, monkeypatch, capfd, tmp_path):
    def misbehave(exchange):
        given = exchange.headers.get("authorization", "nothing")
        if given != "Bearer right-key":
            exchange.answer(401, {"error": {"message": f"Incorrect API key provided: {given}"}})
            return True

    server.misbehave = misbehave
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ServerError) as error:
        with judge_at(server.url):
            pass
    told = str(error.value)
    assert "status 401: Incorrect API key provided: Bearer [hidden]. It was asked with key from OPENAI_API_KEY" in told
    assert server.received == 1, "no second try"
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ServerError, match=r"no key \(OPENAI_API_KEY is not set\)"):
        with judge_at(server.url):
            pass
    monkeypatch.setenv("MY_KEY", "right-key")
    server.reply = lambda body: completion("A, says right-key")
    answers = tmp_path / "answers.jsonl"
    with judge_at(server.url, api_key_env="MY_KEY", server_answers=str(answers)) as judge:
        assert list(judge.score_pairs(pairs_of(1)))[0].reward_a == 0.5
    shown = capfd.readouterr()
    for text in (told, shown.out, shown.err, answers.read_text()):
        assert KEY not in text and "right-key" not in text
    assert "key from MY_KEY" in shown.err and "A, says [hidden]" in answers.read_text()


@pytest.mark.parametrize(
    "status, content, message",
    [
        (
            404,
            {"error": {"message": "The model `judge` does not exist"}},
            "status 404: The model `judge` does not exist. Check the ad",
        ),
        (405, b"<h1>Method Not Allowed</h1>" + b"x" * 5000, r"status 405: <h1>Method Not Allowed</h1>x{400,500} \.\.\."),
        (400, {"object": "error", "message": "bad\x1b[31m thing\n"}, r"status 400: bad\\x1b\[31m thing. Check"),
        (302, b"", "redirects to https://elsewhere/. Give that address to --model"),
    ],
)
def test_refusals_of_the_trial_end_the_command(status, content, message, server):
    server.misbehave = lambda exchange: exchange.answer(status, content, {"location": "https://elsewhere/"}) or True
    with pytest.raises(ServerError, match=message):
        with judge_at(server.url):
            pass
    assert server.received == 1


def refuses(field):
    def misbehave(exchange):
        if field in exchange.body:
            exchange.answer(400, {"error": {"message": f"Unsupported parameter: '{field}'", "param": field}})
            return True

    return misbehave


@pytest.mark.parametrize("field", ["logprobs", "top_logprobs", "max_tokens", "temperature"])
def test_what_a_server_refuses_of_a_request_is_left_out(field, server, capsys):
    server.misbehave = refuses(field)
    pairs = pairs_of(10)
    with judge_at(server.url) as judge:
        margins = margins_of(judge.score_pairs(pairs))
    assert server.received == 22, "asked once with it, in the trial"
    assert "server: it " in capsys.readouterr().err
    if "logprobs" in field:
        np.testing.assert_array_equal(margins, CERTAIN * np.sign(true_margins(pairs)))
        assert not {"logprobs", "top_logprobs"} & set(server.answered[-1])
    else:
        np.testing.assert_allclose(margins, true_margins(pairs), atol=1e-9)
    assert ("max_completion_tokens" in server.answered[-1]) == (field == "max_tokens")


def test_without_a_verdict_a_row_counts_as_even(server, capsys):
    def reply(body):
        prompt = body["messages"][0]["content"]
        return completion("It depends." if "first 3" in prompt else "Preferred: [[B]]")

    def misbehave(exchange):
        if "first 5" in exchange.body["messages"][0]["content"]:
            exchange.answer(400, {"error": {"message": "maximum context length is 10 tokens"}})
            return True

    server.reply, server.misbehave = reply, misbehave
    with judge_at(server.url, server_concurrency=2) as judge:
        scores = list(judge.score_pairs(pairs_of(7)))
        assert judge.usage["unparsable"] == 4
    assert [score.unparsable for score in scores] == [0, 0, 0, 2, 0, 2, 0]
    assert [score.margin for score in scores] == [-CERTAIN, -CERTAIN, -CERTAIN, 0.0, -CERTAIN, 0.0, -CERTAIN]
    assert {score.reward_a for score in scores} == {0.5}, "B in both orders is no preference either"
    shown = capsys.readouterr().err
    assert "the first answer without a verdict, which counts as even: It depends." in shown and "4 without a verdict" in shown


def start_server(port: int, log: Path, seconds: float) -> subprocess.Popen:
    """A server in a process of its own, ready."""
    command = [sys.executable, "-m", "tests.support.judge_server", str(port), str(log), str(seconds)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    return process


def lines_of(judge, pairs):
    for number, score in enumerate(judge.score_pairs(pairs)):
        yield {"number": number, "margin": score.margin, "exchanged_margin": score.swapped_margin}


@pytest.mark.parametrize("rows", [150, pytest.param(1000, marks=pytest.mark.long)])
def test_server_killed_and_restarted_in_the_middle(rows, tmp_path):
    """Two requests a row at concurrency 32: no row is lost or written twice, and the order is the input's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers, output = tmp_path / "answers.jsonl", tmp_path / "scores.jsonl"
    pairs = pairs_of(rows)
    process = start_server(port, tmp_path / "log", 0.02)
    try:
        with judge_at(f"http://127.0.0.1:{port}", server_answers=str(answers), server_tries=40) as judge:

            def make_lines(rest, _first):
                nonlocal process
                for line in lines_of(judge, rest):
                    if line["number"] == rows // 2:
                        process.kill()
                        process.wait()
                        time.sleep(0.3)
                        process = start_server(port, tmp_path / "log", 0.02)
                    yield line

            write_resumable(output, {}, pairs, make_lines, "pairs", len)
            usage = judge.usage
    finally:
        process.kill()
        process.wait()
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(rows))
    np.testing.assert_allclose([[line["margin"], line["exchanged_margin"]] for line in lines], true_margins(pairs), atol=1e-9)
    keys = [json.loads(line)["key"] for line in answers.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 2 * rows
    assert usage["requests"] == 2 * rows and usage["retries"] > 0 and usage["prompt_tokens"] == 20 * rows


def score_until_killed(url, answers, output, rows):
    """Ends itself by SIGKILL after a third of the lines."""
    options = ServerOptions(server_model="judge", server_answers=str(answers))
    judge = open_server_judge(url, template=None, options=options)

    def make_lines(rest, _first):
        for line in lines_of(judge, rest):
            if line["number"] == rows // 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield line

    write_resumable(output, {}, pairs_of(rows), make_lines, "pairs", len)


def test_a_killed_command_asks_nothing_twice(server, tmp_path):
    rows, answers, output = 120, tmp_path / "answers.jsonl", tmp_path / "scores.jsonl"
    server.seconds = 0.005
    code, _ = run_alone(score_until_killed, server.url, str(answers), str(output), rows)
    assert code == -signal.SIGKILL
    kept = {json.loads(line)["key"] for line in answers.read_text().splitlines()}
    assert 2 * rows // 3 <= len(kept) < 2 * rows
    time.sleep(0.1)
    before = server.received
    with judge_at(server.url, server_answers=str(answers)) as judge:
        lines = write_resumable(output, {}, pairs_of(rows), lambda own, _: lines_of(judge, own), "pairs", len)
    assert server.received - before == 1 + 2 * rows - len(kept), "the trial, and what had no answer yet"
    np.testing.assert_allclose(
        [[line["margin"], line["exchanged_margin"]] for line in lines], true_margins(pairs_of(rows)), atol=1e-9
    )
    assert len(output.read_text().splitlines()) == rows
    with judge_at(server.url, server_answers=str(answers)) as judge:  # all kept: a repetition costs the trial alone
        list(judge.score_pairs(pairs_of(rows)))
        assert judge.usage["requests"] == 0 and judge.usage["kept"] == 2 * rows
    with judge_at(server.url, server_answers=str(answers), server_max_tokens=17) as judge:  # other settings, other answers
        list(judge.score_pairs(pairs_of(1)))
        assert judge.usage["requests"] == 2


def test_an_error_in_the_middle_resumes(server, tmp_path):
    answers = str(tmp_path / "answers.jsonl")
    server.misbehave = lambda exchange: exchange.number > 30 and (exchange.answer(500, {"detail": "out of memory"}) or True)
    with judge_at(server.url, server_answers=answers, server_tries=2, server_concurrency=4) as judge:
        with pytest.raises(ServerError, match="2 tries failed, the last one with status 500: out of memory"):
            list(judge.score_pairs(pairs_of(20)))
    server.misbehave, before = None, server.received
    with judge_at(server.url, server_answers=answers) as judge:
        np.testing.assert_allclose(margins_of(judge.score_pairs(pairs_of(20))), true_margins(pairs_of(20)), atol=1e-9)
    assert server.received - before == 1 + 40 - 29


def test_flags_that_do_not_fit_together(server):
    for flags, message in [
        ({"server_model": None}, "needs the model's name at the server: --server-model NAME"),
        ({"server_api": "vllm-classify"}, "vllm-classify is sent token ids.*--server-tokenizer FOLDER"),
        ({"server_api": "sglang-score", "server_tokenizer": "/nowhere"}, "/nowhere: no such file or folder"),
        ({"template": "nonsense"}, "--template nonsense: neither a template of the engine"),
    ]:
        with pytest.raises(ConfigError, match=message):
            with judge_at(server.url, **flags):
                pass
    assert server.received == 0
