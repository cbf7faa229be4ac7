"""Preprocessing: from preference files to tokens on disk (dataset.py lists the files), with any number of processes.

All rows are read and checked before the first one is tokenised, so that a bad row stops a long run at its start. The result
does not depend on the number of processes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import multiprocessing
import os
import sys
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Iterable, Iterator, Optional, Sequence

import numpy as np
from tqdm import tqdm

from gram_engine.config.parse import fail, parse
from gram_engine.config.schema import Config, DataConfig
from gram_engine.config.task import TASKS, ObjectiveName, Task
from gram_engine.data.conversation import Conversation
from gram_engine.data.dataset import SAMPLE_DTYPE, PairDataset
from gram_engine.data.manifest import FORMAT_VERSION, Manifest, described
from gram_engine.data.readers import OnReject, read_rows
from gram_engine.data.samples import (
    OverlongSample,
    Sample,
    check_seq_length,
    conversations_sample,
    generate_sample,
    judge_sample,
    label_ids,
    layout_of,
    pair_of,
    preference_of,
)
from gram_engine.data.schema import Pair, PreformattedRow
from gram_engine.data.sources import source_fingerprint
from gram_engine.data.template import DEFAULT_TEMPLATE, JudgeTemplate
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.data.writer import Chunk, DatasetWriter, RejectsFile
from gram_engine.errors import ConfigError, DataError, GramError, one_line
from gram_engine.files import locked, missing_source_message, source_is_there

logger = logging.getLogger(__name__)

ROWS_PER_TASK = 64

Row = Pair | PreformattedRow


def preprocess(
    paths: Sequence[str | Path],
    prefix: str | Path,
    *,
    objective: str,
    cfg: DataConfig,
    both_orders: bool,
    workers: int = 1,
    seed: int = 1234,
    tokenizer: Optional[Tokenizer] = None,
    fingerprints: Optional[Sequence[str]] = None,
) -> Manifest:
    """Write PREFIX.bin/.idx/.samples.npy/.json (and .rejects.jsonl with cfg.skip_bad_rows); returns the manifest.

    Args:
        tokenizer: the tokenizer that `cfg` names, if it is loaded already.
        fingerprints: SHA-256 of each of `paths`, if known already.

    Raises:
        ConfigError: tokenizer, template or seq_length cannot work, or both orders are asked for and do not differ.
        DataError: a bad row ("file:line: what; remedy"), or nothing left to train on.
    """
    task = TASKS[objective]
    if both_orders and not task.order_matters:
        raise ConfigError("--pair-order both: the Bradley-Terry loss is the same in both orders. Leave it out.")
    tokenizer = tokenizer or Tokenizer.load(cfg.tokenizer_type, _tokenizer_path(cfg))
    template = JudgeTemplate.load(cfg.template or DEFAULT_TEMPLATE)
    labels = label_ids(tokenizer, template) if task.has_label_tokens else None
    conversation = Conversation.of(tokenizer) if task.text == "conversations" else None
    check_seq_length(tokenizer, template, conversation, task.text, cfg.seq_length)
    rejects = RejectsFile(prefix, enabled=cfg.skip_bad_rows)
    progress = {"disable": not sys.stderr.isatty(), "unit": " rows"}
    checked = checked_rows(paths, cfg, task, template, rejects)
    num_rows = sum(1 for _ in tqdm(checked, desc="checking", **progress))
    rejects.close()

    settings = (cfg.seq_length, cfg.overlong, cfg.ties, both_orders, seed)
    tokeniser = _RowTokeniser(tokenizer, template, conversation, task, *settings)
    rows = enumerate(checked_rows(paths, cfg, task, template, rejects.ignore))
    with DatasetWriter(prefix, tokenizer.vocab_size) as writer:
        bar = tqdm(total=num_rows, desc="tokenising", **progress)
        for chunk in _tokenised(tokeniser, rows, workers):
            writer.add(chunk)
            bar.update(chunk.num_rows)
        bar.close()
        if not writer.lengths:
            raise DataError(
                f"{', '.join(map(str, paths))}: no sample is left of {num_rows} rows ({rejects.count} rejected, "
                f"{writer.counts['dropped']} dropped). Look at the rejects, or change --overlong and --ties."
            )
        fingerprints = fingerprints or [source_fingerprint(path) for path in paths]
        manifest = Manifest(
            template=described(template),
            label_ids=list(labels) if labels else None,
            objective=objective,
            seq_length=cfg.seq_length,
            overlong=cfg.overlong,
            ties=cfg.ties,
            pair_order="both" if both_orders else "random",
            seed=seed,
            counts={"rows": num_rows, **writer.counts, "rejected": rejects.count},
            tokens=sum(writer.lengths),
            longest=max(writer.lengths),
            tokenizer={
                "type": tokenizer.tokenizer_type,
                "path": tokenizer.path,
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "eos_id": tokenizer.eos_id,
            },
            conversation=conversation.to_dict() if conversation else None,
            sources=[{"path": str(path), "sha256": digest} for path, digest in zip(paths, fingerprints)],
        )
        writer.finish(manifest)
    return manifest


def ensure_preprocessed(files: Sequence[str | Path], config: Config, both_orders: bool, tokenizer: Tokenizer) -> PairDataset:
    """The preprocessed files in --data-cache-path, written now unless they exist already.

    Their name holds a hash of the files' content and of every setting that changes the result. One process of a run calls this;
    of several runs at the same time one preprocesses, and the others wait.
    """
    cfg, seed, objective = config.data, config.training.seed, config.training.objective
    for path in files:
        if not source_is_there(path):
            raise DataError(missing_source_message(path))
    fingerprints = [source_fingerprint(path) for path in files]
    settings = ("overlong", "ties", "skip_bad_rows", "seq_length", "prompt_key", "chosen_key", "rejected_key")
    identity = {
        "format_version": FORMAT_VERSION,
        "files": fingerprints,
        "objective": objective,
        "both_orders": both_orders,
        "seed": seed,
        "tokenizer": tokenizer.fingerprint,
        "template": JudgeTemplate.load(cfg.template or DEFAULT_TEMPLATE).sha256,
        **{name: getattr(cfg, name) for name in settings},
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    prefix = str(Path(cfg.data_cache_path) / f"{Path(str(files[0]).replace(':', '-')).name.split('.')[0]}-{objective}-{key}")
    with locked(f"{prefix}.lock"):
        try:
            return PairDataset(prefix, whole=True)
        except DataError as error:
            if Path(f"{prefix}.json").is_file():
                logger.warning("%s Doing that now.", error)
            manifest = preprocess(
                files,
                prefix,
                objective=objective,
                cfg=cfg,
                both_orders=both_orders,
                workers=cfg.preprocess_workers,
                seed=seed,
                tokenizer=tokenizer,
                fingerprints=fingerprints,
            )
            logger.info("%s: %s", prefix, summary(manifest))
        return PairDataset(prefix)


def summary(manifest: Manifest) -> str:
    """Counts of rows, samples and tokens, in one line."""
    counts = manifest.counts
    mean = manifest.tokens / counts["samples"]
    return (
        f"{counts['rows']:,} rows -> {counts['samples']:,} samples, {manifest.tokens:,} tokens (mean {mean:,.0f}, longest "
        f"{manifest.longest:,}); {counts['truncated']:,} truncated, {counts['dropped']:,} dropped, "
        f"{counts['rejected']:,} rejected"
    )


def checked_rows(
    paths: Sequence[str | Path],
    cfg: DataConfig,
    task: Task,
    template: JudgeTemplate,
    on_reject: Optional[OnReject],
) -> Iterator[Row]:
    """`read_rows`, with a check that each row can be used for the task."""
    on_reject = on_reject if cfg.skip_bad_rows else None
    for row in read_rows(paths, cfg, on_reject):
        problem = _unfit(row, task, template)
        if problem is None:
            yield row
        elif on_reject is None:
            raise DataError(f"{row.source_location}: {one_line(problem)}")
        else:
            fields = dataclasses.asdict(row)
            fields["place"] = fields.pop("source_location")  # its name in rejects files
            on_reject(DataError(f"{row.source_location}: {one_line(problem)}"), fields)


def _unfit(row: Row, task: Task, template: JudgeTemplate) -> Optional[str]:
    """Why a row cannot be used for the task, and the remedy; None if it can."""
    labelled = not math.isnan(preference_of(row, template))
    if task.needs_labels and isinstance(row, Pair) and not labelled:
        return f"no label, which {task.name} needs. Add label (A, B or tie), or train with --objective response-lm."
    if task.needs_labels and not labelled:
        return (
            f"output is '{row.output[:40]}', not {template.label_a} or {template.label_b}. "
            "Preformatted rows of stage 1 are for --objective response-lm."
        )
    if task.text == "conversations" and pair_of(row, template) is None:
        return (
            f"a preformatted row without the markers of the template {template.name}, between which {task.name} finds prompt "
            "and responses. Give them in fields of their own, or name the row's template with --template."
        )
    if not task.needs_labels and isinstance(row, PreformattedRow) and labelled:
        return (
            f"output is the label {row.output.strip()}, not two responses. "
            "Preformatted rows of stage 2 are for --objective pair-preference."
        )
    return None


def swapped_first(seed: int, number: int) -> bool:
    """Whether pair `number` is shown with its responses swapped.

    Of two neighbouring pairs one is swapped, which one is random: so exactly half of the pairs are swapped with any seed, and
    the data favours neither position.
    """
    coin = hashlib.blake2b(f"{seed}:{number // 2}".encode(), digest_size=1).digest()[0] & 1
    return bool(coin ^ (number & 1))


@dataclasses.dataclass
class _RowTokeniser:
    """What a worker needs to tokenise rows."""

    tokenizer: Tokenizer
    template: JudgeTemplate
    conversation: Optional[Conversation]
    task: Task
    seq_length: int
    overlong: str
    ties: str
    both_orders: bool
    seed: int

    def run(self, rows: list[tuple[int, Row]]) -> Chunk:
        """Tokenise (number of the pair, row)."""
        tokens: list[int] = []
        lengths, records, truncated, dropped = [], [], 0, 0
        for number, row in rows:
            preference = preference_of(row, self.template)
            if preference == 0.5 and self.ties == "drop" and self.task.needs_labels:
                dropped += 1
                continue
            try:
                samples = [(order, self._sample(row, bool(order))) for order in self._orders(number, row)]
            except OverlongSample as error:
                if self.overlong == "error":
                    raise DataError(f"{row.source_location}: {error}") from None
                dropped += 1
                continue
            for order, sample in samples:
                shown = 1.0 - preference if order else preference
                margin = row.margin if isinstance(row, Pair) else math.nan
                ranges = (sample.target_start, *sample.response_a, sample.middle, *sample.response_b)
                records.append((number, order, shown, row.weight, margin, *ranges))
                tokens += sample.tokens
                lengths.append(len(sample.tokens))
                truncated += sample.truncated
        return Chunk(np.array(tokens, np.int32), lengths, np.array(records, SAMPLE_DTYPE), len(rows), truncated, dropped)

    def _orders(self, number: int, row: Row) -> tuple[int, ...]:
        if not self.task.order_matters:
            return (0,)
        if isinstance(row, PreformattedRow):  # in its own order; swapped only if both orders are asked for and possible
            if self.both_orders and layout_of(row, self.template, self.task.text, swapped=False).has_responses:
                return (0, 1)
            return (0,)
        return (0, 1) if self.both_orders else (int(swapped_first(self.seed, number)),)

    def _sample(self, row: Row, swapped: bool) -> Sample:
        if self.task.text == "conversations":
            pair = pair_of(row, self.template)
            return conversations_sample(self.tokenizer, self.conversation, pair, self.seq_length, self.overlong)
        layout = layout_of(row, self.template, self.task.text, swapped)
        build = judge_sample if self.task.text == "judge" else generate_sample
        try:
            return build(self.tokenizer, layout, self.seq_length, self.overlong)
        except ConfigError:  # check_seq_length found room beside the template, so it is this row that leaves none
            raise OverlongSample(
                f"the text around its prompt and responses leaves no room in --seq-length {self.seq_length}. "
                "Raise it, or use --overlong drop."
            ) from None


_worker: Optional[_RowTokeniser] = None


def _start_worker(tokeniser: _RowTokeniser) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = tokeniser


def _run_in_worker(rows: list[tuple[int, Row]]) -> Chunk:
    return _worker.run(rows)


def _tokenised(tokeniser: _RowTokeniser, rows: Iterable[tuple[int, Row]], workers: int) -> Iterator[Chunk]:
    """Chunks in the order of the rows; each worker has at most a few batches pending, which bounds the memory."""
    batches = _batched(rows, ROWS_PER_TASK)
    if workers <= 1:
        yield from map(tokeniser.run, batches)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(tokeniser,)) as pool:
        pending: deque = deque()
        try:
            for batch in batches:
                pending.append(pool.submit(_run_in_worker, batch))
                if len(pending) > 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _batched(items: Iterable, size: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


@dataclasses.dataclass
class OutputConfig:
    """What to write."""

    output_prefix: Optional[str] = None
    """Prefix of the files: PREFIX.bin, .idx, .samples.npy, .json (required)."""
    objective: ObjectiveName = "pair-preference"
    """Objective that the data is for: response-lm (stage 1), pair-preference (stage 2) or bradley-terry."""
    seed: int = 1234
    """Seed of the order in which the two responses are shown."""


@dataclasses.dataclass
class PreprocessConfig:
    """Turn preference files into token sequences for training."""

    output: OutputConfig = dataclasses.field(default_factory=OutputConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)


def main(argv: Optional[list[str]] = None) -> None:
    """Command line of tools/preprocess_data.py and `gram preprocess`."""
    try:
        config = parse(sys.argv[1:] if argv is None else argv, "gram preprocess", schema=PreprocessConfig)
        output, data = config.output, config.data
        if output.output_prefix is None or not data.data:
            raise ConfigError("gram preprocess needs --data FILE ... and --output-prefix PREFIX.")
        manifest = preprocess(
            data.data,
            output.output_prefix,
            objective=output.objective,
            cfg=data,
            both_orders=data.pair_order == "both",
            workers=data.preprocess_workers,
            seed=output.seed,
        )
        print(f"{output.output_prefix}: {summary(manifest)}")
    except GramError as error:
        fail(error)


def _tokenizer_path(cfg: DataConfig) -> str:
    if cfg.tokenizer_model is None:
        raise DataError("--tokenizer-model is missing: a SentencePiece .model file or a Hugging Face folder.")
    return cfg.tokenizer_model
