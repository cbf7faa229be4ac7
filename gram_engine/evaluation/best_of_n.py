"""`gram best-of-n`: how good the response is that a reward model chooses among n (section 4.4), as a curve over n.

From m candidates of a prompt the expected score of the best of n is computed exactly, without sampling: the i-th worst of m
by the proxy is the best of a random subset of n with probability C(i - 1, n - 1) / C(m, n). So each point of the curve uses
every candidate. Choosing among n moves the policy by at most KL = log n - (n - 1) / n.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

import numpy as np
import tyro

from gram_engine.config.parse import fail
from gram_engine.config.schema import DataConfig
from gram_engine.data.fields import BadRow, row_to_list, row_to_samples
from gram_engine.data.readers import read_items
from gram_engine.data.schema import Pair
from gram_engine.errors import ConfigError, DataError, GramError
from gram_engine.evaluation.document import BLUE, Block, Plot, Table, new_figure, png_of, write_document
from gram_engine.files import write_atomically, write_json
from gram_engine.log import is_main_process, log
from gram_engine.metrics import resampling_weights
from gram_engine.scoring.command import ModelArguments, RankArguments, rank_file
from gram_engine.scoring.processes import Processes
from gram_engine.scoring.server.options import is_address


@dataclass(kw_only=True)
class BestOfNArguments(ModelArguments):
    """Choose the best of n responses with a reward model (the proxy), for n = 1, 2, ...; score the choice with an oracle."""

    file: tyro.conf.Positional[str]
    """Rows of {prompt, responses, oracle: [score of each response]}, or preference pairs, several for each prompt."""
    output_dir: str
    """Folder for best_of_n.json, .md and .html, plots and scores. If the command is interrupted, rerun it to resume."""
    oracle: str = "field"
    """field: the rows' `oracle` (for pairs: the share of its comparisons that a response wins); or another model, as for
    --model."""
    n: Optional[int] = None
    """Largest n; prompts with fewer responses are left out. Default: the median number of responses."""
    seed: int = 0
    """Seed of drawing, for each prompt, the response that the others are compared with (its reward is 1/2), as in the paper."""


@dataclass(frozen=True)
class Candidates:
    """Responses to one prompt, with the oracle's scores if the file has them."""

    prompt: str
    responses: tuple[str, ...]
    oracle: Optional[tuple[float, ...]]
    source_location: str


def main(argv: list[str] | None = None) -> None:
    """Command line of `gram best-of-n`."""
    arguments = tyro.cli(BestOfNArguments, args=argv, prog="gram best-of-n")
    try:
        report = best_of_n(arguments)
    except GramError as error:
        fail(error)
    for row in _rows(report):
        log("  ".join(f"{cell:>16}" for cell in row))
    log(f"{report['prompts']} prompts; report: {Path(arguments.output_dir) / 'best_of_n.html'}")


def best_of_n(arguments: BestOfNArguments) -> dict[str, Any]:
    """Score the candidates, compute the curve and write the report; returns the content of best_of_n.json.

    Raises:
        DataError: a row cannot be used, or has no score of the oracle.
        ConfigError, CheckpointError: no prompt has n responses, or a model folder cannot be used.
    """
    lists = read_candidates(arguments.file)
    n = arguments.n or int(np.quantile([len(one.responses) for one in lists], 0.5, method="lower"))
    kept = [one for one in lists if len(one.responses) >= n]
    if not kept or n < 1:
        most = max(len(one.responses) for one in lists)
        raise ConfigError(f"--n {n}: the prompts have at most {most} responses. Give a number from 1 to {most}.")
    proxy, oracle = _scores(arguments, kept)
    curve = best_of_n_curve(proxy, oracle, n)
    report = {
        "file": arguments.file,
        "model": arguments.model,
        "oracle": arguments.oracle,
        "prompts": len(kept),
        "prompts_left_out": len(lists) - len(kept),
        "candidates": sum(map(len, proxy)),
        "curve": curve,
    }
    if is_main_process():
        folder = Path(arguments.output_dir)
        write_json(folder / "best_of_n.json", report)
        write_document(folder, "best_of_n", f"Best of n: {arguments.model}", _blocks(report))
    return report


def read_candidates(file: str) -> list[Candidates]:
    """The lists of a file, or the responses of its pairs grouped by prompt.

    Raises:
        DataError: a row cannot be used ("file:line: what").
    """
    lists: list[Candidates] = []
    pairs: list[Pair] = []
    for item in read_items([file], _row):
        (pairs if isinstance(item, Pair) else lists).append(item)
    return lists + list(_grouped(pairs))


def chance_of_best(candidates: int, most: int) -> np.ndarray:
    """[most, candidates] probability that the i-th worst of m candidates is the best of n = 1 ... most of them, drawn at
    random without replacement."""
    return np.array(
        [[math.comb(i, n - 1) / math.comb(candidates, n) for i in range(candidates)] for n in range(1, most + 1)]
    )


def expected_of_best(proxy: np.ndarray, values: np.ndarray, most: int) -> np.ndarray:
    """[most]: expected value of the response with the highest proxy score, over all subsets of n = 1 ... most responses.

    Responses of equal proxy score are equally likely to be chosen.

    Args:
        proxy, values: [candidates], at least `most` of them.
    """
    _, group, size = np.unique(proxy, return_inverse=True, return_counts=True)
    shared = (np.bincount(group, values) / size)[group]
    return _chances(len(proxy), most) @ shared[np.argsort(proxy, kind="stable")]


_chances = cache(chance_of_best)


def kl_of(n: int) -> float:
    """log n - (n - 1) / n nats: upper bound of the KL divergence between best of n and the policy."""
    return math.log(n) - (n - 1) / n


def best_of_n_curve(proxy: Sequence[np.ndarray], oracle: Sequence[np.ndarray], most: int) -> list[dict[str, float]]:
    """For n = 1 ... most: n, kl, proxy and oracle score of the chosen response, each with its 95 % interval.

    Scores are means over prompts; intervals are bootstrap intervals over prompts.

    Args:
        proxy, oracle: for each prompt [candidates], at least `most` of them.
    """
    weights = resampling_weights(len(proxy), np.random.default_rng(0))
    columns: dict[str, np.ndarray] = {}
    for name, values in (("proxy", proxy), ("oracle", oracle)):
        by_prompt = np.array([expected_of_best(own, value, most) for own, value in zip(proxy, values, strict=True)])
        columns[name] = by_prompt.mean(axis=0)
        columns[f"{name}_low"], columns[f"{name}_high"] = np.quantile(weights @ by_prompt, [0.025, 0.975], axis=0)
    return [
        {"n": n, "kl": kl_of(n), **{name: float(values[n - 1]) for name, values in columns.items()}}
        for n in range(1, most + 1)
    ]


def _row(row: Any, source_location: str) -> list[Candidates | Pair]:
    if not isinstance(row, dict) or not ("responses" in row or "completions" in row):
        return row_to_samples(row, source_location, DataConfig())
    (found,) = row_to_list(row, source_location, DataConfig())
    scores = row.get("oracle")
    if scores is None:
        return [Candidates(found.prompt, found.responses, None, source_location)]
    is_list = isinstance(scores, list) and len(scores) == len(found.responses)
    if not is_list or any(type(score) not in (int, float) or not math.isfinite(score) for score in scores):
        raise BadRow(f"'oracle' must hold a finite number for each of the {len(found.responses)} responses.")
    return [Candidates(found.prompt, found.responses, tuple(map(float, scores)), source_location)]


def _grouped(pairs: Sequence[Pair]) -> Iterator[Candidates]:
    """The responses to each prompt, with the share of its comparisons that each response wins (a tie is half a win)."""
    wins: dict[str, dict[str, list[float]]] = {}
    first_at: dict[str, str] = {}
    for pair in pairs:
        if not isinstance(pair, Pair) or math.isnan(pair.preference):
            raise DataError(f"{pair.source_location}: no preference, and no `responses`. Give lists, or pairs with a label.")
        own = wins.setdefault(pair.prompt, {})
        first_at.setdefault(pair.prompt, pair.source_location)
        own.setdefault(pair.response_a, []).append(pair.preference)
        own.setdefault(pair.response_b, []).append(1.0 - pair.preference)
    for prompt, own in wins.items():
        yield Candidates(prompt, tuple(own), tuple(float(np.mean(shares)) for shares in own.values()), first_at[prompt])


def _scores(arguments: BestOfNArguments, lists: Sequence[Candidates]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Scores of all candidates by proxy and oracle, for each prompt [candidates]."""
    folder = Path(arguments.output_dir)
    is_model = Path(arguments.oracle).is_dir() or is_address(arguments.oracle)
    oracle = None if is_model else [_known_oracle(arguments.oracle, one) for one in lists]
    processes = Processes(str(folder))
    processes.from_first("candidates", lambda: _write_candidates(folder / "candidates.jsonl", lists))
    proxy = _ranked(arguments, arguments.model, folder / "proxy.jsonl")
    return proxy, oracle or _ranked(arguments, arguments.oracle, folder / "oracle.jsonl")


def _write_candidates(path: Path, lists: Sequence[Candidates]) -> None:
    with write_atomically(path) as handle:
        for one in lists:
            handle.write(json.dumps({"prompt": one.prompt, "responses": one.responses}, ensure_ascii=False) + "\n")


def _known_oracle(oracle: str, one: Candidates) -> np.ndarray:
    if oracle != "field":
        raise ConfigError(f"--oracle {oracle}: neither 'field' nor a model's folder or address.")
    if one.oracle is None:
        raise DataError(f"{one.source_location}: no field 'oracle'. Add a score of each response, or give --oracle FOLDER.")
    return np.array(one.oracle)


def _ranked(arguments: BestOfNArguments, model: str, output: Path) -> list[np.ndarray]:
    """Rewards of each list against the response that --seed draws: the same for proxy and oracle."""
    candidates = str(output.parent / "candidates.jsonl")
    settings = {"seed": arguments.seed, **arguments.model_flags()}
    rank_file(RankArguments(input=candidates, output=str(output), model=model, **settings))
    return [np.array(json.loads(line)["rewards"]) for line in output.read_text(encoding="utf-8").splitlines()]


def _rows(report: dict[str, Any]) -> list[list[str]]:
    head = ["n", "KL", "proxy", "95 %", "oracle", "95 %"]
    return [head] + [
        [
            str(row["n"]), f"{row['kl']:.3f}",
            f"{row['proxy']:.3f}", f"{row['proxy_low']:.3f} to {row['proxy_high']:.3f}",
            f"{row['oracle']:.3f}", f"{row['oracle_low']:.3f} to {row['oracle_high']:.3f}",
        ]
        for row in report["curve"]
    ]  # fmt: skip


def _blocks(report: dict[str, Any]) -> list[Block]:
    head, *rows = _rows(report)
    told = (
        f"{report['candidates']:,} candidates for {report['prompts']:,} prompts of {report['file']} "
        f"({report['prompts_left_out']:,} prompts with fewer left out). Proxy: Eq. 3 against one response of the prompt; "
        f"oracle: {report['oracle']}. Means over all subsets of n; intervals resample prompts."
    )
    plots = [Plot(name, f"{name} score of the chosen against KL", _plot(report["curve"], name)) for name in ("proxy", "oracle")]
    return [told, Table(head, rows), *plots]


def _plot(curve: Sequence[dict[str, float]], name: str) -> bytes:
    figure, axes = new_figure()
    kl = [row["kl"] for row in curve]
    axes.fill_between(kl, [row[f"{name}_low"] for row in curve], [row[f"{name}_high"] for row in curve], color=BLUE, alpha=0.2)
    axes.plot(kl, [row[name] for row in curve], "o-", color=BLUE, markersize=3)
    axes.set(xlabel="KL = log n - (n - 1) / n", ylabel=f"{name} score of the best of n")
    return png_of(figure)
