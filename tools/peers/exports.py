"""Makes the exports that other programs are to load: of a small random model and, if its folder is there, of SmolLM2.

usage: python tools/peers/exports.py FOLDER [SMOLLM2]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

HEADS = {"pair-preference": ("causal-lm", "pair-logit"), "bradley-terry": ("scalar",)}


def gram(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "gram_engine.cli", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    folder, smollm2 = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    data, tokenizer = folder / "data", folder / "tokenizer.model"
    gram("demo-data", "--output-dir", data, "--train-pairs", 400, "--test-pairs", 8)
    rows = data / "train.jsonl"
    gram("train-tokenizer", "--data", rows, "--output", tokenizer, "--vocab-size", 1024)
    model = ["--model", "tiny", "--tokenizer-model", tokenizer, "--init-method-std", 0.2]
    make(folder, "random", rows, model)
    if smollm2.is_dir():
        make(folder, "SmolLM2", rows, ["--load-hf", smollm2])


def make(folder: Path, name: str, rows: Path, model: list) -> None:
    """Export after one step of each objective."""
    for objective, heads in HEADS.items():
        run = folder / "runs" / f"{name}-{objective}"
        shutil.rmtree(run, ignore_errors=True)
        steps = ["--train-iters", 1, "--global-batch-size", 2, "--seq-length", 512, "--data-cache-path", folder / "cache"]
        gram("finetune", "--objective", objective, "--data", rows, *model, *steps, "--save", run)
        for head in heads:
            export = folder / "exports" / f"{name}-{head}"
            shutil.rmtree(export, ignore_errors=True)
            gram("convert", "--load", run, "--save", export, "--head", head)
        shutil.rmtree(run)


if __name__ == "__main__":
    main()
