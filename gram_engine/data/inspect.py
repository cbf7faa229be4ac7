"""gram data inspect: a packed micro-batch as text, with the range of each sample, the tokens that carry loss, the label row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Iterator

import torch
import tyro

from gram_engine.config.parse import fail
from gram_engine.data.dataset import PairDataset
from gram_engine.data.loader import PackedBatch, PackedLoader
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import ConfigError, GramError


@dataclass
class InspectArguments:
    """Show the pack that holds a sample of preprocessed data."""

    prefix: tyro.conf.Positional[str]
    """Prefix of preprocessed data."""
    sample: int = 0
    """Number of the sample whose pack is shown."""
    pack_tokens: int = 4096
    """Most tokens in the pack."""
    only_sample: bool = False
    """Show the sample alone, not its neighbours in the pack."""


def main(argv: list[str] | None = None) -> None:
    """Command line of `gram data inspect`."""
    arguments = tyro.cli(InspectArguments, args=argv, prog="gram data inspect")
    try:
        for line in describe(arguments):
            print(line)
    except GramError as error:
        fail(error)


def describe(arguments: InspectArguments) -> Iterator[str]:
    """The lines that the command prints.

    Raises:
        ConfigError: there is no such sample.
    """
    dataset = PairDataset(arguments.prefix)
    if not 0 <= arguments.sample < len(dataset):
        raise ConfigError(f"--sample {arguments.sample}: {arguments.prefix} holds samples 0 to {len(dataset) - 1}.")
    manifest = dataset.manifest
    tokenizer = Tokenizer.load(manifest.tokenizer["type"], manifest.tokenizer["path"])
    pack = _pack_of(dataset, arguments.sample, max(arguments.pack_tokens, int(dataset.lengths.max())))
    yield (
        f"{arguments.prefix}: {manifest.objective}, template {manifest.template['name']}, "
        f"{len(dataset)} samples; this pack: {len(pack.sample_ids)} samples, {len(pack.tokens)} tokens, "
        f"{len(pack.rows)} rows that predict"
    )
    bounds = pack.cu_seqlens.tolist()[:: dataset.parts.shape[1]]
    for number, sample in enumerate(pack.sample_ids.tolist()):
        if not arguments.only_sample or sample == arguments.sample:
            yield from _describe_sample(dataset, tokenizer, pack, sample, bounds[number], bounds[number + 1])
    if bounds[len(pack.sample_ids)] < len(pack.tokens):
        yield f"\npadding: {len(pack.tokens) - bounds[len(pack.sample_ids)]} tokens"


def _pack_of(dataset: PairDataset, sample: int, pack_tokens: int) -> PackedBatch:
    """The pack that contains the sample when each 8 neighbouring samples form a global batch."""
    loader = PackedLoader(
        dataset,
        global_batch_size=8,
        pack_tokens=pack_tokens,
        pad_multiple=1,
        dp_rank=0,
        dp_size=1,
        seed=0,
    )
    packs = (pack for batch in loader.evaluation_batches() for pack in batch.microbatches)
    return next(pack for pack in packs if sample in pack.sample_ids)


def _describe_sample(
    dataset: PairDataset, tokenizer: Tokenizer, pack: PackedBatch, sample: int, start: int, end: int
) -> Iterator[str]:
    facts, manifest = dataset.samples[sample], dataset.manifest
    order = "swapped" if facts["order"] else "as given"
    yield (
        f"\nsample {sample} | pair {facts['pair']} | order {order} | {_preference(float(facts['preference']))} | "
        f"weight {facts['weight']:g} | tokens {start} to {end - 1} of the pack"
    )
    rows = pack.rows[(pack.rows >= start) & (pack.rows < end)]
    if manifest.task.text == "judge":
        yield f"  context       | {_text(tokenizer, pack.tokens[start:end])}"
        label_a, label_b = manifest.label_ids
        yield (
            f"  label row {rows.item()} | after {tokenizer.token(pack.tokens[rows.item()])!r}: "
            f"loss on {tokenizer.token(label_a)!r} ({label_a}) against {tokenizer.token(label_b)!r} ({label_b})"
        )
        return
    if manifest.task.text == "conversations":
        for response, row in zip("AB", rows.tolist()):
            yield f"  response {response}    | {_text(tokenizer, pack.tokens[start : row + 1])}"
            yield f"  reward row {row} | after {tokenizer.token(pack.tokens[row])!r}"
            start = row + 1
        return
    carries_loss = torch.zeros(end - start, dtype=torch.bool)
    carries_loss[rows + 1 - start] = True
    edges = [0, *(torch.nonzero(carries_loss[1:] != carries_loss[:-1])[:, 0] + 1).tolist(), end - start]
    for first, last in zip(edges, edges[1:]):
        kind = "loss   " if carries_loss[first] else "context"
        yield f"  {kind} {first + start:5d} | {_text(tokenizer, pack.tokens[start + first : start + last])}"


def _text(tokenizer: Tokenizer, tokens: torch.Tensor) -> str:
    return tokenizer.decode(tokens.tolist()).replace("\n", "\n                | ")


def _preference(preference: float) -> str:
    if math.isnan(preference):
        return "unlabelled"
    return {1.0: "A is better", 0.0: "B is better", 0.5: "tie"}.get(preference, f"p(A) = {preference:g}")
