"""Real servers with a real model, SmolLM2-135M-Instruct: verdicts over HTTP are those of transformers in this process."""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gram_engine.data.template import JudgeTemplate
from gram_engine.metrics import reward_of_first
from gram_engine.scoring.server.options import ServerOptions
from gram_engine.scoring.server.scorer import open_server_judge
from gram_engine.scoring.server.verdict import CERTAIN, margin_of_text

ROOT = Path(__file__).parents[1]
FOLDER = Path(os.environ.get("GRAM_SMOLLM2", ROOT / "runs" / "SmolLM2-135M-Instruct"))
PAIRS = Path(os.environ.get("GRAM_SMOLLM2_PAIRS", ROOT.parent / "shared" / "data" / "train" / "preferences.jsonl"))
LONGEST_PAIR = 400
"""Characters of prompt and responses."""
TOLERANCE = 2e-4
"""Of margins in float32, computed by another program."""

ASKS_FOR_A_SENTENCE = """Question: {prompt}

Answer A: {response_a}

Answer B: {response_b}

Which answer is better? Write "Preferred: A" or "Preferred: B"."""
"""With gram-code this small model writes no verdict, but only gives the labels probabilities."""

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no model in {FOLDER}: python tools/get_smollm2.py"),
    pytest.mark.skipif(not PAIRS.is_file(), reason=f"no pairs in {PAIRS}: GRAM_SMOLLM2_PAIRS names a JSONL file"),
]


def needs(extra: str, *packages: str):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)}: pip install {extra}")


def short_pairs(count: int) -> list[tuple[str, str, str]]:
    keys = ("prompt", "chosen", "rejected")
    with open(PAIRS, encoding="utf-8") as lines:
        rows = (tuple(row[key] for key in keys) for row in map(json.loads, lines))
        return list(itertools.islice((row for row in rows if sum(map(len, row)) < LONGEST_PAIR), count))


def orders(pairs) -> list[tuple[str, str, str]]:
    return [order for prompt, a, b in pairs for order in ((prompt, a, b), (prompt, b, a))]


class Local:
    """transformers on the folder, in float32, one text at a time."""

    def __init__(self, template: str | Path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.template = JudgeTemplate.load(template)
        self.model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(FOLDER)

    def ids(self, comparison) -> torch.Tensor:
        messages = [{"role": "user", "content": self.template.judge(*comparison)}]
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", tokenize=True, return_dict=False
        )

    def margin(self, comparison) -> float:
        a, b = (self.tokenizer.convert_tokens_to_ids(label) for label in "AB")
        with torch.no_grad():
            logits = self.model(self.ids(comparison)).logits[0, -1]
        return (logits[a] - logits[b]).item()

    def text(self, comparison, tokens: int) -> str:
        ids = self.ids(comparison)
        with torch.no_grad():
            made = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        return self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


@contextlib.contextmanager
def running(command: list[str], ready: str):
    """A server; gives the address in the line that it prints with `ready`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if ready in line:
                break
        else:
            raise AssertionError("the server ended:\n" + "".join(lines))
        yield re.search(r"http://[0-9.]+:[0-9]+", line)[0]  # other threads write into the same line
    finally:
        process.kill()
        process.wait()


@needs("xllamacpp gguf", "xllamacpp", "gguf")
@pytest.mark.parametrize("template", ["gram-code", "gram-paper"])
def test_log_probabilities_of_llama_cpp(template, tmp_path):
    pairs = short_pairs(50 if template == "gram-code" else 6)
    local = Local(template)
    expected = np.array([local.margin(order) for order in orders(pairs)])
    command = [sys.executable, "-m", "tests.support.llama_cpp_server", str(FOLDER), str(tmp_path / "smollm2.gguf")]
    # 20 log-probabilities, OpenAI's most, may lack a label; then the margin is a bound. With 2,000 both are there.
    flags = {"server_model": "smollm2", "server_max_tokens": 1, "server_concurrency": 2}
    with running(command, "address: ") as address:
        judge = open_server_judge(address, template=template, options=ServerOptions(**flags, server_top_logprobs=2000))
        found = judge.margins(orders(pairs))
        usage = judge.usage
        judge.close()
        judge = open_server_judge(address, template=template, options=ServerOptions(**flags))
        bounded = judge.margins(orders(pairs[:6]))
        judge.close()
    print(f"{template}: largest difference {np.abs(found - expected).max():.2e}, usage {usage}, 20: {bounded}")
    assert usage["prompt_tokens"] == sum(local.ids(order).shape[1] for order in orders(pairs)) and not usage["unparsable"]
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert (np.sign(found) == np.sign(expected))[np.abs(expected) > TOLERANCE].all()
    towards_first = [reward_of_first(*margins.reshape(-1, 2).T) - 0.5 for margins in (found, expected)]
    assert (np.sign(towards_first[0]) == np.sign(towards_first[1]))[np.abs(towards_first[1]) > TOLERANCE].all()
    assert (np.abs(bounded) < CERTAIN).all() and (np.sign(bounded) == np.sign(expected[: len(bounded)])).all()
    assert (np.abs(bounded) <= np.abs(expected[: len(bounded)]) + TOLERANCE).all(), "a bound is never more than the margin"


@needs("'transformers[serving]'", "fastapi", "uvicorn", "openai", "rich", "accelerate", "typer")
def test_texts_of_transformers_serve(tmp_path):
    """It gives no log-probabilities: the verdict is read from the text, which is what transformers writes here."""
    pairs = short_pairs(12)
    template = dataclasses.replace(JudgeTemplate.load("gram-code"), judge_format=ASKS_FOR_A_SENTENCE)
    (tmp_path / "template.yaml").write_text(template.to_yaml())
    local = Local(tmp_path / "template.yaml")
    expected = [margin_of_text(local.text(order, 8), "A", "B") for order in orders(pairs)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = "from transformers.cli.transformers import main; main()"
    serve = [
        sys.executable,
        "-c",
        script,
        "serve",
        str(FOLDER),
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--dtype",
        "float32",
        "--device",
        "cpu",
    ]
    options = ServerOptions(server_model=str(FOLDER), server_max_tokens=8, server_concurrency=2)
    with running(serve, "Uvicorn running on ") as address:
        judge = open_server_judge(address, template=str(tmp_path / "template.yaml"), options=options)
        scores = list(judge.score_pairs(pairs))
        usage = judge.usage
        judge.close()
    found = [margin for score in scores for margin in (score.margin, score.swapped_margin)]
    print(f"texts: {expected}, usage {usage}")
    assert found == [margin or 0.0 for margin in expected]
    assert usage["unparsable"] == expected.count(None) and {None, CERTAIN, -CERTAIN} == set(expected)
    assert usage["prompt_tokens"] == sum(local.ids(order).shape[1] for order in orders(pairs))
