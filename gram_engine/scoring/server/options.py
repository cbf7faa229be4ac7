"""Flags of a judge that a server runs, and the address they make."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Optional
from urllib.parse import urlsplit, urlunsplit

from gram_engine.errors import ConfigError

ServerApi = Literal["auto", "openai", "vllm-classify", "sglang-score"]
PATHS = {"openai": "/chat/completions", "vllm-classify": "/classify", "sglang-score": "/v1/score"}
"""What the path of an address ends in."""


@dataclass(kw_only=True)
class ServerOptions:
    """Flags of a judge whose `--model` is an address (`http://...`, `https://...`)."""

    server_model: Optional[str] = None
    """Name of the model at the server; with `--model http...`."""
    server_api: ServerApi = "auto"
    """openai: chat completions; vllm-classify: a pair-logit or scalar export, or a CausalLM served as a classifier;
    sglang-score: probabilities of the label tokens. auto: by the end of the address (/classify, /v1/score), else openai."""
    server_tokenizer: Optional[str] = None
    """Local folder with the served model's tokenizer (and gram_config.json, if it is an export); vllm-classify and
    sglang-score need it, as they are sent token ids."""
    server_concurrency: int = 32
    """Requests that are under way at once."""
    server_tries: int = 8
    """Tries of a request, with growing pauses, before the command ends with an error; rerun it to resume."""
    server_timeout: float = 300.0
    """Seconds to wait for an answer before the request is tried again."""
    server_max_tokens: int = 16
    """Tokens that a chat model may write. Give reasoning models thousands."""
    server_top_logprobs: int = 20
    """Log-probabilities to ask a chat model for; 0: read the verdict from the text alone."""
    server_body: Optional[str] = None
    """JSON object of further fields of each request, such as '{"chat_template_kwargs": {"enable_thinking": false}}'."""
    server_answers: Optional[str] = None
    """File to keep every answer in, also after the command; a rerun asks for none of them again."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the server's key; sent if it is set."""

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ConfigError: with the flag, its value and the remedy.
        """
        for name in ("server_concurrency", "server_tries", "server_max_tokens", "server_timeout"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{_flag(name)} {getattr(self, name)} must be greater than 0.")
        if self.server_top_logprobs < 0:
            raise ConfigError(f"--server-top-logprobs {self.server_top_logprobs} must be at least 0.")
        self.body()

    def body(self) -> dict[str, Any]:
        """The fields of `server_body`. Raises ConfigError: it is not a JSON object."""
        try:
            fields = json.loads(self.server_body or "{}")
        except ValueError as problem:
            raise ConfigError(f"--server-body is not JSON ({problem}). Put the object in single quotes.") from None
        if not isinstance(fields, dict):
            raise ConfigError(f"--server-body holds a {type(fields).__name__}. Write a JSON object: '{{\"seed\": 1}}'.")
        return fields

    def depends_on(self) -> dict[str, Any]:
        """The options that verdicts depend on, for `fingerprint`."""
        silent = ("server_concurrency", "server_tries", "server_timeout", "server_answers", "api_key_env")
        return {name: value for name, value in asdict(self).items() if name not in silent}

    def keeping_answers_beside(self, output: str | Path) -> ServerOptions:
        """These options, with the answers kept in `answers_file(output)` unless `server_answers` names a file."""
        return self if self.server_answers else replace(self, server_answers=str(answers_file(output)))


def answers_file(output: str | Path) -> Path:
    """Where the answers for `output` are kept until it is complete."""
    return Path(f"{output}.answers.jsonl")


def is_address(model: str) -> bool:
    """Whether `--model` names a server, not a folder."""
    return model.startswith(("http://", "https://"))


def endpoint(url: str, api: ServerApi) -> tuple[str, ServerApi]:
    """(address that requests go to, contract) of an address as users write it, with or without the contract's path.

    Raises:
        ConfigError: it has no host, a port that is no number, or holds a password.
    """
    parts = urlsplit(url)
    try:
        usable = bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if "@" in parts.netloc:
        raise ConfigError(
            "--model: an address with a password would be logged. Give the key in a variable: --api-key-env NAME."
        )
    if not usable:
        raise ConfigError(f"--model {url}: not an address. Write https://host/v1, or http://host:8000.")
    path = parts.path.rstrip("/")
    if api == "auto":
        api = next((name for name in ("vllm-classify", "sglang-score") if path.endswith(PATHS[name])), "openai")
    if not path.endswith(PATHS[api]):
        path = (path or "/v1") if api == "openai" else path.removesuffix("/v1")
        path += PATHS[api]
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, "")), api


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
