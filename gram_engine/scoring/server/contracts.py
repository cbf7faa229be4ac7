"""The contracts of three kinds of servers: what a comparison becomes as a request, and what its answer means.

Chat completions (OpenAI, vLLM, SGLang, llama.cpp, `transformers serve` and most providers) are sent the judge prompt as a
user's message; the server applies the model's chat template. vLLM's /classify and SGLang's /v1/score are sent token ids, the
same ones that a local judge computes on, so that no special token is added or lost on the way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Optional, Protocol

from pydantic import BaseModel, Field, FiniteFloat

from gram_engine.data.samples import Sample
from gram_engine.data.template import JudgeTemplate
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.hf.gram_config import GramConfig
from gram_engine.scoring.scorer import sample_of
from gram_engine.scoring.server.answers import Answer
from gram_engine.scoring.server.options import ServerOptions
from gram_engine.scoring.server.verdict import margin_of_logprobs, margin_of_text


@dataclass(frozen=True)
class Request:
    """The JSON object to post, and whether a text was shortened for it."""

    body: dict[str, Any]
    truncated: bool = False


class Contract(Protocol):
    """How to ask one kind of server."""

    description: str
    """For the log."""

    def request(self, text: tuple[str, ...]) -> Request:
        """Of (prompt, response shown as A, response shown as B), or of (prompt, response) for a scalar model."""

    def read(self, reply: str) -> Answer:
        """The answer in the server's reply. Raises ValueError: it does not keep the contract."""

    def adapt(self, refusal: str) -> Optional[str]:
        """Leave out of all further requests what a server refused; says what, or None if there is nothing to leave out."""


class _Usage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: Optional[int] = 0


class _Token(BaseModel):
    token: str
    logprob: FiniteFloat


class _Position(_Token):
    top_logprobs: list[_Token] = []


class _Logprobs(BaseModel):
    content: Optional[list[_Position]] = None


class _Message(BaseModel):
    content: Optional[str] = None


class _Choice(BaseModel):
    message: _Message
    logprobs: Optional[_Logprobs] = None


class _Completion(BaseModel):
    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: Optional[_Usage] = None


class ChatCompletions:
    """POST /v1/chat/completions: the margin by the log-probabilities of the first token, or else by the verdict as text."""

    def __init__(self, template: JudgeTemplate, options: ServerOptions):
        self.template = template
        self._fields = {"model": options.server_model, "temperature": 0, "max_tokens": options.server_max_tokens}
        if options.server_top_logprobs:
            self._fields |= {"logprobs": True, "top_logprobs": options.server_top_logprobs}
        self._fields |= options.body()

    @property
    def description(self) -> str:
        verdict = "log-probabilities, or else its text" if "top_logprobs" in self._fields else "text"
        return f"chat completions of {self._fields['model']}, verdict by its {verdict}, template {self.template.name}"

    def request(self, text: tuple[str, ...]) -> Request:
        messages = [{"role": "user", "content": self.template.judge(*text)}]
        return Request({"messages": messages, **self._fields})

    def read(self, reply: str) -> Answer:
        completion = _Completion.model_validate_json(reply)
        choice, usage = completion.choices[0], completion.usage or _Usage()
        text, margin = choice.message.content or "", None
        labels = (self.template.label_a, self.template.label_b)
        if choice.logprobs and choice.logprobs.content:
            listed = sorted(choice.logprobs.content[0].top_logprobs, key=lambda token: token.logprob)
            margin = margin_of_logprobs(
                {token.token: token.logprob for token in listed}, *labels
            )  # of equal texts the likelier
        if margin is None:
            margin = margin_of_text(text, *labels)
        return Answer(margin, text, usage.prompt_tokens, usage.completion_tokens or 0)

    def adapt(self, refusal: str) -> Optional[str]:
        if "logprobs" in refusal and self._fields.pop("logprobs", None):
            self._fields.pop("top_logprobs", None)
            return "it gives no log-probabilities: verdicts are read from the text"
        if "max_tokens" in refusal and "max_tokens" in self._fields:
            self._fields["max_completion_tokens"] = self._fields.pop("max_tokens")
            return "it takes max_completion_tokens instead of max_tokens"
        if "temperature" in refusal and self._fields.pop("temperature", None) is not None:
            return "it takes no temperature: its own applies, and answers may differ from run to run"
        return None


class _TokenIds:
    """What the contracts that are sent token ids share: the text, tokenised as the local judge does."""

    def __init__(self, tokenizer: Tokenizer, gram: GramConfig, options: ServerOptions):
        self.tokenizer, self.gram = tokenizer, gram
        self._fields = options.body()
        if options.server_model:
            self._fields["model"] = options.server_model

    def _sample(self, text: tuple[str, ...]) -> Sample:
        return sample_of(self.tokenizer, self.gram, text, self.gram.seq_length)

    def adapt(self, refusal: str) -> Optional[str]:
        return None


class _Class(BaseModel):
    probs: Annotated[list[FiniteFloat], Field(min_length=1, max_length=1)]


class _Classes(BaseModel):
    data: Annotated[list[_Class], Field(min_length=1, max_length=1)]
    usage: Optional[_Usage] = None


class VllmClassify(_TokenIds):
    """POST /classify of vLLM, on a model with one label: its logit is Z_A - Z_B, or the reward of a scalar model."""

    @property
    def description(self) -> str:
        return "vLLM classify, " + ("scalar rewards" if self.gram.conversation else f"template {self.gram.template.name}")

    def request(self, text: tuple[str, ...]) -> Request:
        sample = self._sample(text)
        return Request({"input": sample.tokens, "use_activation": False, **self._fields}, sample.truncated)

    def read(self, reply: str) -> Answer:
        classes = _Classes.model_validate_json(reply)
        usage = classes.usage or _Usage()
        return Answer(classes.data[0].probs[0], "", usage.prompt_tokens, usage.completion_tokens or 0)


class _Scores(BaseModel):
    scores: Annotated[list[Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)]], Field(min_length=1, max_length=1)]
    usage: Optional[_Usage] = None


class SglangScore(_TokenIds):
    """POST /v1/score of SGLang: the probabilities of the two label tokens after the judge prompt."""

    @property
    def description(self) -> str:
        return f"SGLang score, labels A={self.gram.label_ids[0]} B={self.gram.label_ids[1]}, template {self.gram.template.name}"

    def request(self, text: tuple[str, ...]) -> Request:
        sample = self._sample(text)
        # The server joins query and item; neither may be empty.
        split = {"query": sample.tokens[:-1], "items": [sample.tokens[-1:]], "item_first": False}
        return Request(
            {**split, "label_token_ids": list(self.gram.label_ids), "apply_softmax": False, **self._fields}, sample.truncated
        )

    def read(self, reply: str) -> Answer:
        scores = _Scores.model_validate_json(reply)
        a, b = (max(score, SMALLEST_PROBABILITY) for score in scores.scores[0])
        usage = scores.usage or _Usage()
        return Answer(math.log(a) - math.log(b), "", usage.prompt_tokens, usage.completion_tokens or 0)


SMALLEST_PROBABILITY = 1e-38
"""Stands for a probability that was rounded to 0; about the smallest normal number of float32."""
