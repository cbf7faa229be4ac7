"""HTTP to a judge's server: many requests at once, repeated with growing pauses, rate limits honoured, the key kept secret."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import sys
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Callable, Optional

import httpx2

from gram_engine.errors import ServerError, one_line
from gram_engine.log import MASK, log
from gram_engine.scoring.server.answers import Answer
from gram_engine.scoring.server.options import ServerOptions

CONNECT_SECONDS = 10.0
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the second try; each pause is twice the one before it, up to the longest."""
LONGEST_WAIT = 600.0
"""Seconds that a server may tell to wait (Retry-After); told to wait longer, the command ends."""
TRY_AGAIN = (408, 409, 425, 429)
"""Refusals that pass; 500 and above do too."""
SECONDS_BETWEEN_NOTICES = 10.0


class Refusal(Exception):
    """The server understood a request and will not answer it (a 4xx status)."""

    def __init__(self, status: int, message: str):
        super().__init__(f"status {status}: {message}")
        self.status, self.message = status, message


class _Trouble(Exception):
    """A try that failed in a way that may pass; `wait`: seconds that the server asks for."""

    def __init__(self, problem: str, wait: Optional[float] = None):
        super().__init__(problem)
        self.wait = wait


class Client:
    """Asks one address. All methods but the constructor run in one event loop.

    The key is read from the environment here, sent in the header `Authorization` alone, and masked in everything that the
    server sends back.
    """

    def __init__(self, url: str, options: ServerOptions):
        self.url, self._options = url, options
        self._key = os.environ.get(options.api_key_env, "").strip()
        self.retries = self._answered = 0
        self._slots = asyncio.Semaphore(options.server_concurrency)
        self._not_before = self._last_notice = -math.inf
        headers = {"content-type": "application/json", **({"authorization": f"Bearer {self._key}"} if self._key else {})}
        self._http = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=options.server_concurrency),
        )

    @property
    def key_note(self) -> str:
        """Where the key comes from, for log lines and errors."""
        return f"key from {self._options.api_key_env}" if self._key else f"no key ({self._options.api_key_env} is not set)"

    async def ask(self, body: str, read: Callable[[str], Answer]) -> Answer:
        """The answer to a request, which is tried again where a failure may pass.

        Args:
            body: the JSON to post.
            read: makes an answer of the reply; raises ValueError where the reply is not what was asked for.

        Raises:
            Refusal: the server refuses this request.
            ServerError: every try failed, the server asks for too long a wait, or it sends requests elsewhere.
        """
        failures, answered = 0, self._answered
        async with self._slots:
            while True:
                try:
                    answer = await self._try(body, read)
                except _Trouble as trouble:
                    # A rate limit is no failure as long as other requests get through.
                    failures = 0 if trouble.wait is not None and self._answered > answered else failures
                    failures, answered = failures + 1, self._answered
                    await self._pause(trouble, failures)
                else:
                    self._answered += 1
                    return answer

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _try(self, body: str, read: Callable[[str], Answer]) -> Answer:
        while (wait := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(wait + random.uniform(0, 0.1))
        try:
            async with asyncio.timeout(self._options.server_timeout):  # of the whole, which httpx's own are not
                response = await self._http.post(self.url, content=body)
        except TimeoutError:
            raise _Trouble(f"no answer in {self._options.server_timeout:g} s (--server-timeout)") from None
        except httpx2.RequestError as error:
            raise _Trouble(f"{type(error).__name__}: {error}".rstrip(".: ")) from None
        reply = response.text.replace(self._key, MASK) if self._key else response.text
        status = response.status_code
        if status in TRY_AGAIN or status >= 500:
            raise _Trouble(f"status {status}: {_message(reply)}", _retry_after(response.headers))
        if status >= 400:
            raise Refusal(status, _message(reply))
        if status >= 300:
            raise ServerError(f"{self.url}: redirects to {response.headers.get('location')}. Give that address to --model.")
        try:
            return read(reply)
        except ValueError:
            raise _Trouble(f"an answer that is not what was asked for: {_message(reply)}") from None

    async def _pause(self, trouble: _Trouble, failures: int) -> None:
        """Wait before the next try, or give up."""
        if failures >= self._options.server_tries:
            raise ServerError(
                f"{self.url}: {failures} tries failed, the last one with {trouble}. Rerun the command to resume when it is "
                "well again; --server-tries and --server-timeout give it more time."
            )
        if trouble.wait is not None and trouble.wait > LONGEST_WAIT:
            raise ServerError(
                f"{self.url}: asks to wait for {trouble.wait:.0f} s ({trouble}). Rerun the command then to resume."
            )
        self.retries += 1
        now = time.monotonic()
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (failures - 1)) * random.uniform(0.5, 1.0)
        if trouble.wait is not None:  # for all requests
            self._not_before, pause = max(self._not_before, now + trouble.wait), 0.0
        if now - self._last_notice > SECONDS_BETWEEN_NOTICES:
            self._last_notice = now
            say(f"server: {trouble}; trying again ({failures} of {self._options.server_tries} tries failed)")
        await asyncio.sleep(pause)


def say(line: str) -> None:
    """Log on stderr: stdout is for results."""
    log(line, sys.stderr)


def _message(reply: str) -> str:
    """What a reply says about an error, on one line and shortened, without a full stop."""
    try:
        content: Any = json.loads(reply)
    except (ValueError, RecursionError):
        content = reply
    for name in ("error", "message", "detail"):
        if isinstance(content, dict) and content.get(name):
            content = content[name]
    text = content if isinstance(content, str) else json.dumps(content)
    return one_line(text.strip().rstrip(".")) or "an empty body"


def _retry_after(headers: httpx2.Headers) -> Optional[float]:
    """Seconds of the header Retry-After, which holds a number or a date; None without one."""
    value = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(value)) if math.isfinite(float(value)) else None
    except ValueError:
        pass
    try:
        then = parsedate_to_datetime(value)
    except ValueError:
        return None
    now = datetime.now(then.tzinfo or UTC)
    return max(0.0, (then.replace(tzinfo=then.tzinfo or UTC) - now).total_seconds())
