"""Log lines of the main process, and access tokens kept out of all that is printed (errors, the configuration)."""

from __future__ import annotations

import os
import re
import sys

from tqdm import tqdm

SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Environment variables whose values are masked wherever they occur."""
SHORTEST = 8
"""Shorter values are left alone: masking them would garble ordinary text."""
MASK = "[hidden]"

# A token of the Hugging Face hub, whether or not the environment holds it: hf_ and 34 letters or digits.
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")


def redact(text: str) -> str:
    """The text with tokens of Weights & Biases and of the Hugging Face hub replaced by MASK."""
    for name in SECRETS:
        value = os.environ.get(name, "").strip()
        if len(value) >= SHORTEST:
            text = text.replace(value, MASK)
    return _HUB_TOKEN.sub(MASK, text)


def is_main_process() -> bool:
    """True in the process that prints."""
    return int(os.environ.get("RANK", "0")) == 0


def log(message: str) -> None:
    """Print one line on the main process, above the progress bar where there is one, without access tokens."""
    if is_main_process():
        tqdm.write(redact(message), file=sys.stdout)
        sys.stdout.flush()
