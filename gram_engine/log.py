"""Log lines of rank 0, and the masking of access tokens in everything that is printed (logs, errors, the configuration)."""

from __future__ import annotations

import os
import re
import sys
from typing import IO, Optional

from tqdm import tqdm

SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Environment variables whose values are masked."""
SHORTEST = 8
"""Shorter values are not masked, because they may occur in ordinary text."""
MASK = "[hidden]"

# Any token of the Hugging Face hub, also one that is not in the environment: hf_ and 34 letters or digits.
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")


def redact(text: str) -> str:
    """The text with access tokens of Weights & Biases and of the Hugging Face hub replaced by MASK."""
    for name in SECRETS:
        value = os.environ.get(name, "").strip()
        if len(value) >= SHORTEST:
            text = text.replace(value, MASK)
    return _HUB_TOKEN.sub(MASK, text)


def is_main_process() -> bool:
    """Whether this is rank 0, which prints and logs (by the environment, before process groups exist)."""
    return int(os.environ.get("RANK", "0")) == 0


def log(message: str, stream: Optional[IO[str]] = None) -> None:
    """Print a line on rank 0, above the progress bar if there is one, with access tokens masked; None: to stdout."""
    if is_main_process():
        stream = stream or sys.stdout
        tqdm.write(redact(message), file=stream)
        stream.flush()
