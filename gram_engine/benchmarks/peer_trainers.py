"""What a user would run instead of the engine: a transformers model, padded batches, logits of every position, AdamW."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
import time
from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gram_engine.data.dataset import PairDataset
from gram_engine.data.loader import PackedLoader

EPSILON = 0.1


@dataclass
class PaddedBatch:
    """Samples of a micro-batch, padded at the end to the longest one.

    tokens, targets: int64 [samples, longest], where position p predicts targets[i, p], or nothing if that is -100;
    lengths: int64 [samples]; preference: fp32 [samples]; labels: the two label tokens, None in stage 1.
    """

    tokens: Tensor
    targets: Tensor
    lengths: Tensor
    preference: Tensor
    labels: tuple[int, int] | None


def padded_batches(prefix: str, stage: str, options, device: torch.device) -> list[list[PaddedBatch]]:
    """The micro-batches of every step: the same samples as in the engine's steps, in random order.

    Args:
        options: peers.Peers.
    """
    dataset = PairDataset(prefix)
    size = options.global_batch_size
    loader = PackedLoader(
        dataset, global_batch_size=size, pack_tokens=size * options.seq_length, pad_multiple=1,
        dp_rank=0, dp_size=1, seed=1234,
    )  # fmt: skip
    steps = []
    for number in range(options.warmup + options.steps):
        (pack,) = loader.batch(number * size).microbatches
        targets = torch.full_like(pack.tokens, -100)
        if stage == "1":
            targets[pack.rows] = pack.targets
        bounds, order = pack.cu_seqlens.tolist(), np.random.default_rng(number).permutation(size)
        samples = [(slice(bounds[i], bounds[i + 1]), float(pack.preference[i])) for i in order]
        groups = [samples[first : first + options.peer_batch_size] for first in range(0, size, options.peer_batch_size)]
        steps.append([_padded(pack.tokens, targets, group, dataset.manifest.label_ids, device) for group in groups])
    return steps


def _padded(tokens: Tensor, targets: Tensor, samples: list, labels: list[int] | None, device: torch.device) -> PaddedBatch:
    def rows(values: Tensor, fill: int) -> Tensor:
        parts = [values[where] for where, _ in samples]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill).to(device)

    lengths = torch.tensor([where.stop - where.start for where, _ in samples], device=device)
    preference = torch.tensor([preferred for _, preferred in samples], device=device)
    return PaddedBatch(rows(tokens, 0), rows(targets, -100), lengths, preference, tuple(labels) if labels else None)


def transformers_step(folder: str, stage: str, dtype: str, device: torch.device) -> Callable[[list[PaddedBatch]], float]:
    """A function that makes one optimizer step on a list of micro-batches and returns the mean loss."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    flash = device.type == "cuda" and dtype == "bfloat16" and importlib.util.find_spec("flash_attn") is not None
    attention = "flash_attention_2" if flash else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).to(device)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    loss_of = _response_loss if stage == "1" else _label_loss

    def step(micro_batches: list[PaddedBatch]) -> float:
        count = sum(int((batch.targets >= 0).sum()) if stage == "1" else len(batch.tokens) for batch in micro_batches)
        total = 0.0
        for batch in micro_batches:
            with _precision(dtype, device):
                logits = model(input_ids=batch.tokens, attention_mask=_mask(batch), use_cache=False).logits
                loss = loss_of(logits, batch) / count
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return step


def _precision(dtype: str, device: torch.device):
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()


def _mask(batch: PaddedBatch) -> Tensor:
    return (torch.arange(batch.tokens.shape[1], device=batch.tokens.device) < batch.lengths[:, None]).long()


def _response_loss(logits: Tensor, batch: PaddedBatch) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=-100, reduction="sum")


def _label_loss(logits: Tensor, batch: PaddedBatch) -> Tensor:
    """Eq. 6-8 of the paper from the logits of all positions, as in the authors' code."""
    last = logits.float()[torch.arange(len(logits), device=logits.device), batch.lengths - 1][:, list(batch.labels)]
    wanted = torch.stack([batch.preference, 1 - batch.preference], dim=1)
    wanted = EPSILON + (1 - 2 * EPSILON) * wanted
    return -(wanted * F.log_softmax(last, dim=1)).sum()


def trl_steps(folder: str, stage: str, options, steps: list[list[PaddedBatch]]) -> tuple[list[float], float]:
    """(seconds of each step, loss of the first step) of TRL's SFTTrainer on the same samples, with its own padding."""
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.started)

        def on_log(self, _args, _state, _control, logs=None, **__: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    seconds: list[float] = []
    losses: list[float] = []
    rows = [_supervised(batch, number) for step in steps for batch in step for number in range(len(batch.tokens))]
    with tempfile.TemporaryDirectory() as output:
        arguments = trl.SFTConfig(
            output_dir=output, max_steps=len(steps), per_device_train_batch_size=options.peer_batch_size,
            gradient_accumulation_steps=options.global_batch_size // options.peer_batch_size, learning_rate=1e-5,
            bf16=options.dtype == "bfloat16", gradient_checkpointing=False, logging_steps=1, report_to="none",
            save_strategy="no", max_length=None, use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), args=arguments,
            train_dataset=datasets.Dataset.from_list(rows), processing_class=_tokenizer(), callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return seconds, losses[0]


def _supervised(batch: PaddedBatch, number: int) -> dict[str, list[int]]:
    """input_ids and labels of one sample, which transformers shifts; in stage 2 the label token is appended to the text."""
    length = int(batch.lengths[number])
    tokens, targets = batch.tokens[number, :length].tolist(), batch.targets[number, :length].tolist()
    if batch.labels is None:
        return {"input_ids": tokens, "labels": [-100, *targets[:-1]]}
    label = batch.labels[int(batch.preference[number] < 0.5)]
    return {"input_ids": [*tokens, label], "labels": [-100] * length + [label]}


def _tokenizer():
    """A tokenizer for SFTTrainer, which requires one even though the data are tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<eos>": 0}, "<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
