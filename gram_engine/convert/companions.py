"""What an exported folder holds beside the weights: configurations, tokenizer, the order rule, a model card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from gram_engine.config import Config
from gram_engine.convert.jobs import Job
from gram_engine.data.samples import label_ids
from gram_engine.data.template import JudgeTemplate
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import CheckpointError, ConfigError
from gram_engine.fileio import read_json, write_atomically
from gram_engine.model.presets import hf_config
from gram_engine.training.checkpoint_folder import DATA_MANIFEST, SOURCE, TEMPLATE, TOKENIZER

GRAM_CONFIG = "gram_config.json"
PAIR_LOGIT, CAUSAL_LM = "pair-logit", "causal-lm"
ORDER_RULE = "reward of y1 against y2 = mean of p(A | y1, y2) and p(B | y2, y1), softmax over the two labels"


@dataclass(frozen=True)
class GramConfig:
    """What scoring needs of an exported folder's gram_config.json."""

    template: JudgeTemplate
    label_ids: tuple[int, int]
    seq_length: int


def read_gram_config(folder: str | Path) -> GramConfig:
    """The folder's gram_config.json.

    Raises:
        ConfigError: it is missing, or not as it was written.
    """
    path = Path(folder) / GRAM_CONFIG
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. --model needs a folder written by `gram convert`.")
    again = "Convert the checkpoint again."
    gram = read_json(path, ConfigError, again)
    labels, seq_length = gram.get("label_ids"), gram.get("seq_length")
    whole = isinstance(labels, list) and len(labels) == 2 and all(type(number) is int for number in (*labels, seq_length))
    if not whole or min(labels) < 0 or labels[0] == labels[1] or seq_length < 1:
        raise ConfigError(f"{path}: not what `gram convert` writes: label_ids or seq_length are missing or wrong. {again}")
    template = JudgeTemplate.from_dict(gram.get("template"), str(path))
    if gram.get("template_sha256", template.sha256) != template.sha256:
        raise ConfigError(f"{path}: the template was changed after it was written. {again}")
    return GramConfig(template, (labels[0], labels[1]), seq_length)


def label_ids_of(path: Path) -> tuple[int, int]:
    """The label tokens that a checkpoint was trained with.

    Raises:
        CheckpointError: its tokenizer gives others.
    """
    manifest = read_json(path / DATA_MANIFEST, CheckpointError, "Restore it from another checkpoint of the run.")
    tokenizer = Tokenizer.load("HuggingFaceTokenizer", path / TOKENIZER)
    labels = label_ids(tokenizer, JudgeTemplate.load(path / TEMPLATE))
    if manifest.get("label_ids") not in (None, list(labels)):
        raise CheckpointError(
            f"{path}: trained with the label ids {manifest['label_ids']}, but its tokenizer gives {list(labels)}. "
            "The tokenizer folder of the checkpoint was changed: restore it."
        )
    return labels


def write_companions(job: Job, config: Config, head: str, evaluation: Optional[str]) -> None:
    """Write everything but the weights into the job's folder; fields of the folder that training began from are kept.

    Args:
        head: CAUSAL_LM or PAIR_LOGIT.
        evaluation: JSON file whose figures the model card shows.
    """
    path, folder = job.checkpoint, job.folder
    tokenizer, template = Tokenizer.load("HuggingFaceTokenizer", path / TOKENIZER), JudgeTemplate.load(path / TEMPLATE)
    tokenizer.save_pretrained(folder)
    source = _read_json(path / SOURCE / "config.json")
    source.pop("auto_map", None)  # code of the folder that training began from
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    described = hf_config(config.model, str(job.dtype).removeprefix("torch."), *ids.values())
    described |= {name: source[name] for name in (*ids, "initializer_range") if name in source}
    if head == PAIR_LOGIT:
        described["architectures"] = [described["architectures"][0].replace("CausalLM", "SequenceClassification")]
        described |= {"num_labels": 1, "id2label": {"0": "A over B"}, "label2id": {"A over B": 0}}
        described["pad_token_id"] = tokenizer.hf.pad_token_id if tokenizer.hf.pad_token_id is not None else tokenizer.eos_id
    _write_json(folder / "config.json", {**source, **described})
    generation = _read_json(path / SOURCE / "generation_config.json") or {**ids, "do_sample": False}
    if head == CAUSAL_LM:
        _write_json(folder / "generation_config.json", generation)
    gram = {
        "head": head,
        "template": template.to_dict(),
        "template_sha256": template.sha256,
        "labels": [template.label_a, template.label_b],
        "label_ids": list(label_ids_of(path)),
        "seq_length": config.data.seq_length,
        "overlong": "truncate",
        "order_rule": ORDER_RULE,
    }
    _write_json(folder / GRAM_CONFIG, gram)
    with write_atomically(folder / "README.md") as handle:
        handle.write(_model_card(path, config, head, evaluation))


def read_evaluation(file: str) -> dict[str, Any]:
    """The figures of a JSON report of `gram score` or `gram evaluate`.

    Raises:
        ConfigError: it is not one.
    """
    remedy = "Give --evaluation the JSON report of `gram score` or `gram evaluate`."
    report = read_json(file, ConfigError, remedy)
    figures = report.get("figures", {})
    if not isinstance(figures, dict):
        raise ConfigError(f"{file}: not a report: 'figures' is no object. {remedy}")
    return {name: value for name, value in {**figures, **report}.items() if isinstance(value, (int, float))}


def _model_card(path: Path, config: Config, head: str, evaluation: Optional[str]) -> str:
    figures = read_evaluation(evaluation) if evaluation else {}
    rows = "".join(f"| {name} | {value:.4g} |\n" for name, value in figures.items())
    measured = f"## Measured\n\n`{evaluation}`:\n\n| figure | value |\n|---|---|\n{rows}\n" if figures else ""
    use = "Score with `gram score IN.jsonl OUT.jsonl --model THIS_FOLDER`. "
    if head == PAIR_LOGIT:
        use += (
            "`AutoModelForSequenceClassification` loads it too: for a judge prompt (template below) its one logit is "
            "Z_A - Z_B, the log odds that the response shown first is the better one. "
        )
    return (
        "---\nlibrary_name: transformers\ntags: [reward-model, gram]\n---\n\n"
        "# Generative reward model\n\n"
        f"Trained with gram_engine, objective `{config.training.objective}`, checkpoint `{path.name}`. {use}"
        f"Template, label tokens and the order rule are in `{GRAM_CONFIG}`: {ORDER_RULE}.\n\n"
        f"{measured}## Training configuration\n\n```yaml\n{config.to_yaml()}```\n"
    )


def _read_json(path: Path) -> dict[str, Any]:
    """{} for a file that is not there."""
    return read_json(path, CheckpointError, "Restore it from another checkpoint of the run.") if path.is_file() else {}


def _write_json(path: Path, content: dict) -> None:
    with write_atomically(path) as handle:
        json.dump(content, handle, indent=1)
        handle.write("\n")
