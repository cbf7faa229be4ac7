"""A judge that a server runs, with the methods of a local one: `open_server_judge`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Coroutine, Iterable, Iterator, Optional, Sequence

import numpy as np

from gram_engine.data.samples import label_ids
from gram_engine.data.template import DEFAULT_TEMPLATE, JudgeTemplate
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import ConfigError, ServerError, one_line
from gram_engine.files import read_json
from gram_engine.hf.gram_config import GRAM_CONFIG, GramConfig, read_gram_config
from gram_engine.metrics import reward_of_first
from gram_engine.scoring.judges import conversation_of
from gram_engine.scoring.scorer import Comparison, Judge, JudgedGroup, ScalarJudge, ServerPairScore
from gram_engine.scoring.server.answers import Answer, Answers
from gram_engine.scoring.server.client import Client, Refusal, say
from gram_engine.scoring.server.contracts import ChatCompletions, Contract, SglangScore, VllmClassify
from gram_engine.scoring.server.options import ServerOptions, endpoint

AHEAD = 4
"""Requests handed over at once, for each that is under way: a slow answer does not hold up those behind it."""
REFUSED_ALONE = (400, 413, 422)
"""Statuses by which a server that answers others refuses one text (too long, filtered)."""
TRIAL = ("What is 2 + 2?", "4", "5")
"""Judged first, so that a wrong address, key or model name shows before any work."""


class _ServerJudge:
    """Asks a server for the margins (a scalar model: rewards) that a local model would compute."""

    scalar = False

    def __init__(self, contract: Contract, client: Client, options: ServerOptions):
        self._contract, self._client, self._options = contract, client, options
        self._answers = Answers(options.server_answers)
        self._requests = self._kept = self._unparsable = 0
        self._first = self._last = 0.0
        # The event loop has a thread of its own, so that the methods also work where one is running (a notebook).
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="judge server", daemon=True)
        self._thread.start()
        try:
            self._try_out()
        except BaseException:
            self._end_loop()
            raise
        say(f"model: {contract.description}, at {client.url}, {client.key_note}")

    @property
    def usage(self) -> dict[str, float]:
        """What the verdicts cost, apart from the trial.

        `requests` answered, `retries`, answers `kept` from an earlier run, answers `unparsable` (and refusals), `seconds`
        from the first request to the last answer: of this run. `prompt_tokens` and `completion_tokens`, as the server counts
        them: of this run and of all answers in the answers file.
        """
        return {
            "requests": self._requests,
            "kept": self._kept,
            "retries": self._client.retries,
            "unparsable": self._unparsable,
            "prompt_tokens": self._answers.prompt_tokens,
            "completion_tokens": self._answers.completion_tokens,
            "seconds": max(0.0, self._last - self._first),
        }

    def close(self) -> None:
        """Log what it cost, and close the connections and the answers file; the judge cannot be used afterwards."""
        if self._loop.is_closed():
            return
        say(
            "server: {requests:,} answers in {seconds:.1f} s, {kept:,} kept from before, {retries:,} tries repeated, "
            "{unparsable:,} without a verdict; {prompt_tokens:,} prompt tokens, {completion_tokens:,} completion tokens".format(
                **self.usage
            )
        )
        self._end_loop()

    def _judge(self, groups: Iterable[Sequence[tuple[str, ...]]]) -> Iterator[JudgedGroup]:
        """As of the local judge: the verdict on each group of texts, in the order given."""
        for answers, truncated in self._answers_to(groups):
            yield JudgedGroup(np.array([answer.margin or 0.0 for answer in answers]), any(truncated), _count_tokens(answers))

    def _answers_to(self, groups: Iterable[Sequence[tuple[str, ...]]]) -> Iterator[tuple[list[Answer], list[bool]]]:
        """(answers, truncated) of each group of texts, in the order given, however the answers arrive."""
        waiting: deque[list[tuple[Future[Answer], bool]]] = deque()
        most, out = AHEAD * self._options.server_concurrency, 0
        try:
            for group in groups:
                waiting.append([self._submit(text) for text in group])
                out += len(group)
                while waiting and (out >= most or all(future.done() for future, _ in waiting[0])):
                    yield self._results(waiting[0])
                    out -= len(waiting.popleft())
            while waiting:
                yield self._results(waiting[0])
                waiting.popleft()
        finally:
            for submitted in waiting:
                for future, _ in submitted:
                    future.cancel()

    def _results(self, submitted: list[tuple[Future[Answer], bool]]) -> tuple[list[Answer], list[bool]]:
        answers = [future.result() for future, _ in submitted]
        for answer in answers:
            if answer.margin is None and not self._unparsable:
                say(f"server: the first answer without a verdict, which counts as even: {one_line(answer.text) or 'no text'}")
            self._unparsable += answer.margin is None
        return answers, [truncated for _, truncated in submitted]

    def _submit(self, text: tuple[str, ...]) -> tuple[Future[Answer], bool]:
        request = self._contract.request(text)
        body = json.dumps(request.body)
        key = hashlib.sha256(f"{self._client.url}\n{body}".encode()).hexdigest()[:32]
        known = self._answers.get(key)
        if known is None:
            self._first = self._first or time.monotonic()
            return self._run(self._ask(key, body)), request.truncated
        self._kept += 1
        future: Future[Answer] = Future()
        future.set_result(known)
        return future, request.truncated

    async def _ask(self, key: str, body: str) -> Answer:
        try:
            answer = await self._client.ask(body, self._contract.read)
        except Refusal as refusal:
            if refusal.status not in REFUSED_ALONE or self.scalar:
                raise self._error(refusal) from None
            return Answer(None, f"refused, {refusal}")  # not kept: a rerun asks again
        self._answers.add(key, answer)
        self._requests += 1
        self._last = time.monotonic()
        return answer

    def _try_out(self) -> None:
        """Judge TRIAL; what the server refuses of a request and can do without is left out of all."""
        while True:
            body = json.dumps(self._contract.request(TRIAL[:2] if self.scalar else TRIAL).body)
            try:
                self._run(self._client.ask(body, self._contract.read)).result()
                return
            except Refusal as refusal:
                change = self._contract.adapt(refusal.message)
                if change is None:
                    raise self._error(refusal) from None
                say(f"server: {change} ({refusal})")

    def _error(self, refusal: Refusal) -> ServerError:
        where, remedy = self._client.url, "Check the address, --server-model and --server-body."
        if refusal.status in (401, 403):
            remedy = f"It was asked with {self._client.key_note}; --api-key-env names the variable that holds the key."
        return ServerError(f"{where}: the server refuses requests, {refusal}. {remedy}")

    def _run(self, coroutine: Coroutine) -> Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _end_loop(self) -> None:
        self._run(self._cancel_all()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._answers.close()

    async def _cancel_all(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()


class ServerScorer(_ServerJudge, Judge):
    """A generative judge behind HTTP."""

    def score_pairs(self, pairs: Iterable[Comparison]) -> Iterator[ServerPairScore]:
        """Both orders of each (prompt, response_a, response_b), in the order given, many requests at once.

        Raises:
            ServerError: the server cannot be used (any more); a rerun with the same answers file resumes.
        """
        orders = ([(prompt, a, b), (prompt, b, a)] for prompt, a, b in pairs)
        for answers, truncated in self._answers_to(orders):
            margins = [answer.margin or 0.0 for answer in answers]
            unparsable = sum(answer.margin is None for answer in answers)
            reward, tokens = float(reward_of_first(*margins)), _count_tokens(answers)
            yield ServerPairScore(reward, *margins, any(truncated), unparsable, tokens=tokens)


def _count_tokens(answers: Sequence[Answer]) -> Optional[int]:
    """Tokens that the server counts of these answers, read and written; None where it does not count them."""
    return sum(answer.prompt_tokens + answer.completion_tokens for answer in answers) or None


class ScalarServerScorer(_ServerJudge, ScalarJudge):
    """A scalar reward model behind HTTP."""

    scalar = True


def open_server_judge(
    url: str, *, template: Optional[str], options: ServerOptions, seq_length: Optional[int] = None
) -> ServerScorer | ScalarServerScorer:
    """The judge at an address, after one trial question.

    Args:
        url: with or without the path of the contract: `https://api.openai.com/v1`, `http://localhost:8000/classify`.
        template: of the judge prompt, a name or a file; None: gram-code. Exports have their own, and do not use it.
        seq_length: tokens of a text, to which longer ones are shortened where token ids are sent; None: the export's own, or
            else any length.

    Raises:
        ConfigError: the flags do not fit together, or the tokenizer's folder cannot be used.
        ServerError: the server cannot be reached, refuses the trial, or does not keep the contract.
    """
    options.check()
    address, api = endpoint(url, options.server_api)
    if api == "openai":
        if not options.server_model:
            raise ConfigError(f"--model {url} needs the model's name at the server: --server-model NAME.")
        contract = ChatCompletions(JudgeTemplate.load(template or DEFAULT_TEMPLATE), options)
        return ServerScorer(contract, Client(address, options), options)
    if not options.server_tokenizer:
        raise ConfigError(f"{api} is sent token ids. Give the served model's tokenizer: --server-tokenizer FOLDER.")
    tokenizer, gram = _texts_of(Path(options.server_tokenizer), template, seq_length)
    if gram.conversation is not None and api == "sglang-score":
        raise ConfigError(f"{options.server_tokenizer}: a scalar model has no label tokens. Serve it with vLLM, by /classify.")
    contract = (VllmClassify if api == "vllm-classify" else SglangScore)(tokenizer, gram, options)
    judge = ServerScorer if gram.conversation is None else ScalarServerScorer
    return judge(contract, Client(address, options), options)


def _texts_of(folder: Path, template: Optional[str], seq_length: Optional[int]) -> tuple[Tokenizer, GramConfig]:
    """How texts are written and tokenised for the model whose tokenizer is in `folder`; the weights need not be there."""
    if not (folder / GRAM_CONFIG).is_file() and _is_classifier(folder / "config.json"):
        tokenizer = Tokenizer.load("HuggingFaceTokenizer", folder, any_chat_template=True)
        return tokenizer, GramConfig(seq_length or sys.maxsize, conversation=conversation_of(tokenizer))
    tokenizer = Tokenizer.load("HuggingFaceTokenizer", folder)
    if (folder / GRAM_CONFIG).is_file():
        gram = read_gram_config(folder)
        return tokenizer, replace(gram, seq_length=min(seq_length or gram.seq_length, gram.seq_length))
    zero_shot = JudgeTemplate.load(template or DEFAULT_TEMPLATE)
    return tokenizer, GramConfig(seq_length or sys.maxsize, zero_shot, label_ids(tokenizer, zero_shot))


def _is_classifier(config: Path) -> bool:
    """Whether a config.json, if there is one, is that of a reward model with a scalar head."""
    content = read_json(config, ConfigError, "Download it again.") if config.is_file() else {}
    return str(content.get("architectures")).endswith("ForSequenceClassification']")
