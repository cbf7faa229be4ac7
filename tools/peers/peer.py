"""What the checks of all programs share. Runs in their environments, without gram_engine: standard library only."""

from __future__ import annotations

import json
import sys
import traceback
from importlib.metadata import version
from pathlib import Path

EXPORTS = ("random", "SmolLM2")
PAIRS = (
    ("What is the capital of France?", "The capital of France is Paris.", "I do not know."),
    (
        "Write one line about the sea.",
        "Gr\u00fcn und weit, so liegt das Meer. \U0001f30a",
        "The sea is wet.\n\nIt is also salty.",
    ),
    ("  Add 17 and 25. ", "17 + 25 = 42", " The sum is 32. "),
    ("Name three colours.", "red, green, blue", 'Colours? I like { braces }, <brackets> and "quotes" more.'),
    ("Is water wet?", "Yes.", "That depends on what is meant by wet: " + "water makes other things wet, " * 8 + "and so on."),
    ("Say nothing.", ".", "I will say nothing, as you asked."),
)
"""Prompts with two responses; their lengths differ, so that batches are padded."""


class Check:
    """Collects what a program computed for the exports in a folder."""

    def __init__(self, distribution: str):
        self.folder = Path(sys.argv[1]).resolve()
        self.tool, self.rows = {"tool": distribution, "version": version(distribution)}, []

    def exports(self, head: str) -> list[Path]:
        """Folders of the exports with this head."""
        return [folder for name in EXPORTS if (folder := self.folder / "exports" / f"{name}-{head}").is_dir()]

    def run(self, head: str, what: str, compute) -> None:
        """Add a row for each export with `head`: compute(folder) returns texts and what the program found for them.

        Texts are (prompt, response), whose reward was found, or (prompt, response shown as A, response shown as B), whose
        margin was.
        """
        for folder in self.exports(head):
            row = {**self.tool, "export": folder.name, "what": what}
            try:
                texts, found = compute(folder)
                row |= {"texts": texts, "found": [float(value) for value in found]}
            except Exception as error:
                traceback.print_exc()
                row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            self.rows.append(row)

    def save(self, name: str) -> None:
        """Write the rows for compare.py."""
        results = self.folder / "results"
        results.mkdir(exist_ok=True)
        (results / f"{name}.json").write_text(json.dumps(self.rows))


def texts_of_pairs() -> list[tuple[str, str]]:
    """(prompt, response) of both responses of each pair."""
    return [(prompt, response) for prompt, *responses in PAIRS for response in responses]


def messages(prompt: str, response: str) -> list[dict[str, str]]:
    """The conversation of a prompt and a response."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def judge_prompts(folder: Path, tokenizer) -> list[str]:
    """The judge prompt of each pair, as gram_config.json gives it, in the tokenizer's chat template if it has one."""
    form = json.loads((folder / "gram_config.json").read_text(encoding="utf-8"))["template"]["judge"]
    prompts = []
    for prompt, response_a, response_b in PAIRS:
        text = form.replace("{prompt}", prompt).replace("{response_a}", response_a).replace("{response_b}", response_b)
        if tokenizer.chat_template is not None:
            user = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
        prompts.append(text)
    return prompts
