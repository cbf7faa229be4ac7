"""The files of an exported folder other than the weights: configurations, tokenizer, gram_config.json, model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

from gram_engine.checkpoint.folder import DATA_MANIFEST, SOURCE, TEMPLATE, TOKENIZER, iteration_folder
from gram_engine.config.schema import Config
from gram_engine.convert.jobs import Job
from gram_engine.convert.tokenizer_files import prepare_for_conversations, prepare_for_judge_prompts, write_tokenizer
from gram_engine.data.conversation import Conversation
from gram_engine.data.samples import label_ids
from gram_engine.data.template import JudgeTemplate
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import CheckpointError, ConfigError
from gram_engine.files import read_json, write_atomically, write_json
from gram_engine.hf.gram_config import CAUSAL_LM, GRAM_CONFIG, ORDER_RULE, PAIR_LOGIT, SCALAR, SCALAR_RULE
from gram_engine.model.shapes import hf_config


def label_ids_of(path: Path) -> tuple[int, int]:
    """The ids of the label tokens (A, B) that a checkpoint was trained with.

    Raises:
        CheckpointError: the checkpoint's tokenizer gives other ids.
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


def write_hf_metadata_files(job: Job, config: Config, head: str, evaluation: Optional[str]) -> None:
    """Write all files but the weights into the job's folder.

    Other fields of the config.json that training started from are kept.

    Args:
        head: CAUSAL_LM, PAIR_LOGIT or SCALAR.
        evaluation: JSON report to show in the model card.
    """
    path, folder = job.checkpoint, job.folder
    tokenizer = Tokenizer.load("HuggingFaceTokenizer", path / TOKENIZER)
    gram = _scalar_rules(path, tokenizer) if head == SCALAR else _judge_rules(path)
    if head == PAIR_LOGIT:
        prepare_for_judge_prompts(tokenizer, JudgeTemplate.load(path / TEMPLATE))
    tokenizer = write_tokenizer(tokenizer, folder, classifier=head != CAUSAL_LM)
    source = _read_json(path / SOURCE / "config.json")
    source.pop("auto_map", None)  # refers to code in the folder that training started from
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    described = hf_config(config.model, str(job.dtype).removeprefix("torch."), *ids.values())
    described |= {name: source[name] for name in (*ids, "initializer_range") if name in source}
    if head != CAUSAL_LM:
        described |= _classifier_fields(head, described["architectures"][0], tokenizer)
    write_json(folder / "config.json", {**source, **described})
    generation = _read_json(path / SOURCE / "generation_config.json") or {**ids, "do_sample": False}
    if head == CAUSAL_LM:
        write_json(folder / "generation_config.json", generation)
    general = {"head": head, "seq_length": config.data.seq_length, "overlong": "truncate"}
    write_json(folder / GRAM_CONFIG, {**general, **gram})
    with write_atomically(folder / "README.md") as handle:
        handle.write(_model_card(path, config, head, evaluation))


_INPUT = {
    PAIR_LOGIT: "a judge prompt with both responses (gram_config.json: template); for one response the logit means nothing",
    SCALAR: "a prompt and one response, as the chat template writes them (gram_config.json: conversation)",
}
"""What a classifier has to be given, for its config.json."""


def _classifier_fields(head: str, language_model: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json's fields for a classifier with one label."""
    label = "reward" if head == SCALAR else "A over B"
    fields = {
        "architectures": [language_model.replace("CausalLM", "SequenceClassification")],
        "num_labels": 1,
        "id2label": {"0": label},
        "label2id": {label: 0},
        "pad_token_id": tokenizer.hf.pad_token_id,
        "gram_input": _INPUT[head],
    }
    # Without it, transformers' pipeline and vLLM return the sigmoid of a single logit. That of A over B is p(A | prompt).
    return fields | ({"problem_type": "regression"} if head == SCALAR else {})


def _judge_rules(path: Path) -> dict[str, Any]:
    """gram_config.json's fields for a generative model: the judge prompt and its label tokens."""
    template = JudgeTemplate.load(path / TEMPLATE)
    return {
        "template": template.to_dict(),
        "template_sha256": template.sha256,
        "labels": [template.label_a, template.label_b],
        "label_ids": list(label_ids_of(path)),
        "order_rule": ORDER_RULE,
    }


def _scalar_rules(path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """gram_config.json's fields for a scalar head: the conversation format, which the tokenizer's chat template writes."""
    manifest = read_json(path / DATA_MANIFEST, CheckpointError, "Restore it from another checkpoint of the run.")
    conversation = Conversation.from_dict(manifest.get("conversation"), str(path / DATA_MANIFEST))
    return {"conversation": prepare_for_conversations(tokenizer, conversation).to_dict(), "rule": SCALAR_RULE}


def read_evaluation(file: str) -> dict[str, Any]:
    """The numbers in a JSON report of `gram score` or `gram evaluate`.

    Raises:
        ConfigError: the file is not such a report.
    """
    remedy = "Give --evaluation the JSON report of `gram score` or `gram evaluate`."
    report = read_json(file, ConfigError, remedy)
    figures = report.get("figures", {})
    if not isinstance(figures, dict):
        raise ConfigError(f"{file}: not a report: 'figures' is no object. {remedy}")
    return {name: value for name, value in {**figures, **report}.items() if isinstance(value, (int, float))}


_USE = {
    CAUSAL_LM: "",
    PAIR_LOGIT: (
        "`AutoModelForSequenceClassification` loads it too: for a judge prompt (template below) its one logit is Z_A - Z_B, "
        "the log odds that the response shown first is the better one. **It has to be given a judge prompt with both "
        "responses:** for a prompt with one response, which is what trainers and leaderboards give to scalar reward models, "
        "the logit means nothing, and no program notices. "
    ),
    SCALAR: (
        "`AutoModelForSequenceClassification` loads it too: its one logit is the reward of a response, read at the end of "
        "prompt and response as the chat template writes them. "
    ),
}
"""What the model card says about programs other than gram_engine, for each head."""


def _model_card(path: Path, config: Config, head: str, evaluation: Optional[str]) -> str:
    figures = read_evaluation(evaluation) if evaluation else {}
    rows = "".join(f"| {name} | {value:.4g} |\n" for name, value in figures.items())
    measured = f"## Measured\n\n`{evaluation}`:\n\n| figure | value |\n|---|---|\n{rows}\n" if figures else ""
    rules = f"Template, label tokens and the order rule are in `{GRAM_CONFIG}`: {ORDER_RULE}."
    if head == SCALAR:
        rules = f"How prompt and response are written is in `{GRAM_CONFIG}` (`conversation`): {SCALAR_RULE}."
    return (
        "---\nlibrary_name: transformers\ntags: [reward-model, gram]\n---\n\n"
        f"# {'Discriminative' if head == SCALAR else 'Generative'} reward model\n\n"
        f"{_origin(path, config)} Score with `gram score IN.jsonl OUT.jsonl --model THIS_FOLDER`. {_USE[head]}{rules}\n\n"
        f"{measured}## Configuration\n\n```yaml\n{config.to_yaml()}```\n"
    )


def _origin(path: Path, config: Config) -> str:
    """Where the weights come from; those of a checkpoint of step 0 are not trained."""
    if path.stem != iteration_folder("", 0).name:
        return f"Trained with gram_engine, objective `{config.training.objective}`, checkpoint `{path.name}`."
    source = config.model.load_hf or config.checkpoint.pretrained_checkpoint
    return f"Imported from `{source}`, not trained." if source else "Random initial weights, not trained."


def _read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file, {} if there is no such file."""
    return read_json(path, CheckpointError, "Restore it from another checkpoint of the run.") if path.is_file() else {}
