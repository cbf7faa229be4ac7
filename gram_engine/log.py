"""Keeps access tokens out of what is printed: log lines, error messages, the resolved configuration."""

from __future__ import annotations

import os
import re

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
