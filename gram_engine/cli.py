"""The `gram` command: finds the function of each subcommand and calls it."""

from __future__ import annotations

import importlib
import os
import select
import sys
from typing import Any, Callable

COMMANDS = {
    "pretrain": ("gram_engine.training.main:pretrain", "stage 1: learn to generate both responses (no labels)"),
    "finetune": ("gram_engine.training.main:finetune", "stage 2: learn to predict the preferred response"),
    "preprocess": ("gram_engine.data.preprocess:main", "tokenize preference files into .bin/.idx"),
    "data inspect": ("gram_engine.data.inspect:main", "show the tokens of a packed sample that carry loss"),
    "convert": ("gram_engine.convert.command:main", "convert a checkpoint to a Hugging Face folder, or back"),
    "score": ("gram_engine.scoring.command:main", "score preference pairs with a Hugging Face folder"),
    "rank": ("gram_engine.scoring.command:rank_main", "rank lists of responses, or pick the best of n"),
    "evaluate": ("gram_engine.evaluation.evaluate:main", "RewardBench, RM-Bench, JudgeBench, HHH or own pairs: a report"),
    "compare": ("gram_engine.evaluation.compare:main", "several models on several benchmarks: a leaderboard with differences"),
    "best-of-n": ("gram_engine.evaluation.best_of_n:main", "best-of-n sampling with a reward model: score against KL"),
    "reproduce": ("gram_engine.reproduce.command:main", "the paper's comparison from a recipe, with a report"),
    "plan": ("gram_engine.planning.command:main", "parallel layouts of a model: memory, speed, the flags of the best"),
    "train-tokenizer": ("gram_engine.data.train_tokenizer:main", "train a SentencePiece tokenizer on preference files"),
    "benchmark": ("gram_engine.benchmarks.command:main", "time and memory of training, losses, scoring or conversion"),
    "demo-data": ("gram_engine.data.demo:main", "make the demonstration preference data"),
}


READER_IS_GONE = 141
"""Exit status of a command whose output nobody reads any more: what a shell shows for a program that SIGPIPE ended."""


def main(argv: list[str] | None = None) -> None:
    """Run the command that `argv` (default: the command line) names."""
    run(_main, argv)


def run(command: Callable[..., Any], *arguments: Any) -> None:
    """Call a command's function; end silently with READER_IS_GONE if the program that read its output has ended (`| head`).

    Any other broken pipe stays an error.
    """
    try:
        try:
            command(*arguments)
        except SystemExit:
            print(end="", flush=True)
            raise
        print(end="", flush=True)  # else Python writes the rest while it exits, where an error can no longer be caught
    except BrokenPipeError:
        if not _nobody_reads_stdout():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(READER_IS_GONE) from None


def _nobody_reads_stdout() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are reported without being asked for
    return bool(poll.poll(0))


def _main(argv: list[str] | None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            module, function = COMMANDS[name][0].split(":")
            getattr(importlib.import_module(module), function)(argv[words:])
            return
    known = "\n".join(f"  gram {name:14s} {text}" for name, (_, text) in COMMANDS.items())
    asked_for_help = bool(argv) and argv[0] in ("-h", "--help")
    print(f"usage: gram COMMAND [flags]\n\n{known}\n\ngram COMMAND --help explains a command's flags.")
    raise SystemExit(0 if asked_for_help else 2)


if __name__ == "__main__":
    main()
