"""A judge's server on loopback that keeps the OpenAI contract, answers by a function of the prompt, and misbehaves on demand.

Run as a program (`python -m tests.support.judge_server PORT LOG`) it can be killed; it appends a line for each answer to LOG.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, Optional

Misbehaviour = Callable[["Exchange"], bool]
"""Given a request; returns whether it answered in the server's place."""


def true_margin(prompt: str) -> float:
    """log p(A) - log p(B) that the server gives for a judge prompt: a number of four decimals in [-3, 3] by its hash."""
    return round(int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16) / 0xFFFFFFFF * 6 - 3, 4)


def completion(text: str, top: Optional[dict[str, float]] = None) -> dict[str, Any]:
    """A chat completion; `top`: log-probabilities of the first token."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    if top is not None:
        listed = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in top.items()]
        choice["logprobs"] = {"content": [{**listed[0], "top_logprobs": listed}]}
    return {"object": "chat.completion", "choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 1}}


def with_logprobs(body: dict[str, Any]) -> dict[str, Any]:
    """The answer of a well-behaved server."""
    margin = true_margin(body["messages"][0]["content"])
    top = {"A": -math.log1p(math.exp(-margin)), "B": -math.log1p(math.exp(margin))}
    top = dict(sorted(top.items(), key=lambda item: -item[1]))
    return completion(next(iter(top)), top if body.get("logprobs") else None)


class Exchange(BaseHTTPRequestHandler):
    """One request and its answer."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server = self.server
        self.body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            server.received += 1
            server.under_way += 1
            server.most_at_once = max(server.most_at_once, server.under_way)
            self.number = server.received
            server.headers_seen.append(dict(self.headers))
        try:
            if not (server.misbehave and server.misbehave(self)):
                if server.seconds:
                    time.sleep(server.seconds)
                self.answer(200, server.reply(self.body))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with server.lock:
                server.under_way -= 1

    def answer(self, status: int, content: Any, headers: Optional[dict[str, str]] = None, cut: Optional[int] = None) -> None:
        """Send JSON, or bytes as they are; `cut`: only so many bytes of it, then the connection is closed."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[:cut])
        self.wfile.flush()
        if cut is not None:
            self.close_connection = True
        if status == 200 and cut is None:
            self.server.note(self.body)

    def log_message(self, *_: Any) -> None:
        pass


class JudgeServer(ThreadingHTTPServer):
    """Listens from its making; `with` serves, in a thread."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, port: int = 0, reply: Callable[[dict], Any] = with_logprobs, misbehave: Optional[Misbehaviour] = None):
        super().__init__(("127.0.0.1", port), Exchange)
        self.reply, self.misbehave, self.seconds, self.log_path = reply, misbehave, 0.0, None
        self.lock = threading.Lock()
        self.received = self.under_way = self.most_at_once = 0
        self.answered: list[dict[str, Any]] = []
        self.headers_seen: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def note(self, body: dict[str, Any]) -> None:
        with self.lock:
            self.answered.append(body)
            if self.log_path:
                with open(self.log_path, "a", encoding="utf-8") as handle:
                    handle.write(json.dumps(body) + "\n")

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: Any) -> None:
        pass


if __name__ == "__main__":
    judge_server = JudgeServer(int(sys.argv[1]))
    judge_server.log_path, judge_server.seconds = sys.argv[2], float(sys.argv[3])
    print("ready", flush=True)
    judge_server.serve_forever()
