"""Bradley-Terry on the engine: against transformers' ...ForSequenceClassification, at every layout, with its regularisation."""

import functools
import json

import pytest
import torch
import torch.nn.functional as F

from gram_engine.config.schema import DataConfig
from gram_engine.data.preprocess import preprocess
from tests.conftest import TEMPLATE, write_pairs
from tests.support.cases import short_first
from tests.support.layouts import LAYOUTS, TIED, UNTIED
from tests.support.tiny import float64_gradients, tiny_config, tiny_trainer, train_steps

SMALL = "--num-layers 2 --objective bradley-terry --lr 1e-3"


@pytest.fixture(scope="module")
def pairs(tiny_data, tmp_path_factory):
    """Rows of pairs, every sixth a tie and every fourth with another weight, and where they are preprocessed."""
    folder = tmp_path_factory.mktemp("bradley-terry")
    write_pairs(folder / "plain.jsonl", rows=60, seed=3)
    rows = [json.loads(line) for line in (folder / "plain.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["response_a"], row["response_b"] = row.pop("chosen"), row.pop("rejected")
        row["label"] = "tie" if number % 6 == 0 else "B" if number % 2 else "A"
        row["weight"] = 2.0 if number % 4 == 0 else 1.0
    jsonl = folder / "pairs.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = DataConfig(tokenizer_model=tiny_data["tokenizer"], seq_length=192, template=TEMPLATE)
    preprocess([jsonl], str(folder / "pairs"), objective="bradley-terry", cfg=cfg, both_orders=False)
    return rows, (str(folder / "pairs"), tiny_data["tokenizer"])


FIFTY = f"{SMALL} {TIED} --init-method-std 0.1 --lr-warmup-fraction 0.1 --train-iters 50 --global-batch-size 6"


def fifty_steps(prefix, tokenizer_model, folder, flags):
    """(loss of each step, rows of each step); checkpoints of before and after are in `folder`."""
    trainer = tiny_trainer(tiny_config(prefix, tokenizer_model, f"{FIFTY} {flags} --save {folder}"))
    trainer.save()
    batches = [trainer.loader.batch(6 * step).microbatches for step in range(50)]
    losses = [loss for loss, _ in train_steps(trainer, 50)]
    trainer.save()
    numbers = trainer.dataset.samples["pair"]
    return losses, [[int(numbers[i]) for pack in packs for i in pack.sample_ids] for packs in batches]


def as_texts(rows, numbers, tokenizer):
    """The pairs' first texts, then their second ones."""
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    return [f"{bos}{rows[i]['prompt']}\n\n{rows[i][name]}{eos}" for name in ("response_a", "response_b") for i in numbers]


def test_fifty_steps_equal_those_of_transformers(pool, pairs, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_cosine_schedule_with_warmup

    from gram_engine.convert.export_hf import export_hf
    from gram_engine.scoring.scorer import RewardModelScorer

    rows, data = pairs
    ((losses, batches),) = pool.run(fifty_steps, 1, *data, str(tmp_path / "run"), "")
    start, end = (export_hf(tmp_path / f"run/iter_{n:07d}", tmp_path / f"hf{n}", verify=True) for n in (0, 50))
    tokenizer = AutoTokenizer.from_pretrained(start)

    def rewards(model, numbers):
        padded = tokenizer(as_texts(rows, numbers, tokenizer), padding=True, return_tensors="pt")
        return model(padded.input_ids, attention_mask=padded.attention_mask).logits[:, 0].unflatten(0, (2, -1))

    model = AutoModelForSequenceClassification.from_pretrained(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-8, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 5, 50)
    wanted = []
    for found, numbers in zip(losses, batches, strict=True):
        a, b = rewards(model, numbers)
        share = torch.tensor([{"A": 1.0, "B": 0.0, "tie": 0.5}[rows[i]["label"]] for i in numbers])
        weight = torch.tensor([rows[i]["weight"] for i in numbers])
        each = -share * F.logsigmoid(a - b) - (1 - share) * F.logsigmoid(b - a)
        loss = (each * weight).sum() / weight.sum()
        wanted.append(float(loss.detach()))
        assert found == pytest.approx(wanted[-1], abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])

    numbers = list(range(len(rows)))
    with torch.no_grad():
        exported = rewards(AutoModelForSequenceClassification.from_pretrained(end), numbers)
        torch.testing.assert_close(exported, rewards(model, numbers), atol=2e-4, rtol=0)
    scorer = RewardModelScorer.from_pretrained(end)
    scores = list(scorer.score_pairs([(row["prompt"], row["response_a"], row["response_b"]) for row in rows]))
    ours = torch.tensor([score.rewards for score in scores]).T
    torch.testing.assert_close(ours, exported, atol=1e-5, rtol=0)
    apart = max(abs(one - other) for one, other in zip(losses, wanted, strict=True))
    print(f"largest difference of a loss {apart:.1e}, of an exported model's reward {(ours - exported).abs().max():.1e}")


VARIANTS = {
    "plain": SMALL,
    "whole-last-layer": f"{SMALL} --no-prune-last-layer",
    "sft-tied": f"{SMALL} --sft-loss-weight 0.01 {TIED}",
    "sft-untied": f"{SMALL} --sft-loss-weight 0.01 {UNTIED}",
    "sft-one-pair": f"{SMALL} --sft-loss-weight 0.01 {UNTIED} --global-batch-size 1",
    "freeze-backbone": f"{SMALL} --freeze backbone",
    "freeze-embeddings": f"{SMALL} --freeze embeddings",
}


def curve(prefix, tokenizer_model, flags):
    return train_steps(tiny_trainer(tiny_config(prefix, tokenizer_model, flags)), 4)


RUNS = [(variant, layout) for variant in VARIANTS for layout in ("tp2", "tp2-sp", "pp2", "dp2", "dp2-overlap")]
PAIRWISE = [run for number, run in enumerate(RUNS) if number % 3 == 1]
"""Every variant at one layout or more, every layout with two variants or more."""


@pytest.fixture(scope="module")
def references(pool, pairs):
    return functools.cache(lambda variant: pool.run(curve, 1, *pairs[1], VARIANTS[variant])[0])


@pytest.mark.parametrize("variant, layout", short_first(PAIRWISE, RUNS))
def test_layouts_equal_one_process(variant, layout, pool, pairs, references):
    """With one pair a step the second data-parallel process has an empty pack."""
    processes, flags = LAYOUTS[layout]
    for found in pool.run(curve, processes, *pairs[1], f"{VARIANTS[variant]} {flags}"):
        assert found == [pytest.approx(step, rel=1e-5) for step in references(variant)]


class ByDefinition:
    """Eq. 1 and the chosen response's log-likelihood from whole logits, by torch, for one process."""

    def __init__(self, objective):
        self.objective = objective

    def __getattr__(self, name):
        return getattr(self.objective, name)

    def __call__(self, hidden_states, output_weight, context):
        hidden, weight = hidden_states.squeeze(1), self.objective.sft_loss_weight
        rewards = (hidden @ self.objective.last.score.weight[0])[context.rows]
        margins = rewards[0::2] - rewards[1::2]
        share = context.preference
        losses = -share * F.logsigmoid(margins) - (1 - share) * F.logsigmoid(-margins)
        logits = hidden[context.sft_rows] @ output_weight[: self.objective.language.vocab_size].t()
        language = F.cross_entropy(logits, context.tokens[context.sft_rows + 1], reduction="none")
        loss = (losses * context.weight).sum() + weight * (language * context.sft_weight).sum()
        output = self.objective.output(loss, margins, context)
        output.stats = torch.cat([output.stats, output.stats[:1]])
        return output


def by_definition(trainer, _batch):
    trainer.objective = ByDefinition(trainer.objective)


def test_gradients_of_the_regularised_loss_equal_its_definition(pool, pairs):
    """In one process all of them, over two those that each holds whole: of the norms and of the scalar head."""
    _, data = pairs
    flags = f"{SMALL} --sft-loss-weight 0.02 {UNTIED}"
    (wanted,) = pool.run(float64_gradients, 1, *data, flags, by_definition)
    assert wanted["gradients"].keys() >= {"0.score.weight", "0.output_layer.weight"}
    for layout, least in (("recompute", len(wanted["gradients"])), ("tp2-sp", 6), ("dp2", len(wanted["gradients"]))):
        processes, parallel = LAYOUTS[layout]
        for found in pool.run(float64_gradients, processes, *data, f"{flags} {parallel}"):
            assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
            whole = {name for name, gradient in found["gradients"].items() if gradient.shape == wanted["gradients"][name].shape}
            assert len(whole) >= least and "0.score.weight" in whole
            for name in whole:
                difference = abs(found["gradients"][name] - wanted["gradients"][name]).max()
                # Weights of rows, among them 0.02, are float32.
                assert difference < 1e-7 * abs(wanted["gradients"][name]).max(), (layout, name)


def stage_one(prefix, tokenizer_model, folder):
    trainer = tiny_trainer(tiny_config(prefix, tokenizer_model, f"--num-layers 2 --objective response-lm --save {folder}"))
    train_steps(trainer, 2)
    trainer.save()


def started_from(prefix, tokenizer_model, folder):
    trainer = tiny_trainer(tiny_config(prefix, tokenizer_model, f"{SMALL} --pretrained-checkpoint {folder}"))
    weights = {name: parameter.detach().clone() for name, parameter in trainer.model[0].module.named_parameters()}
    train_steps(trainer, 1)
    return weights


def test_stage_one_is_scored_as_it_is_and_starts_a_scalar_head(pool, pairs, tiny_data, tmp_path):
    """GRAM-v2: stage 1 alone, scored with the judge prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gram_engine.convert.export_hf import export_hf
    from gram_engine.scoring.scorer import RewardModelScorer

    _, data = pairs
    pool.run(stage_one, 1, tiny_data["stage1"], tiny_data["tokenizer"], str(tmp_path / "run"))
    folder = export_hf(tmp_path / "run", tmp_path / "hf")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    scorer = RewardModelScorer.from_pretrained(folder)
    text = scorer.template.judge("which", "red blue", "green")
    assert text.rstrip().endswith("#Preferred:")
    logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
    label_a, label_b = (tokenizer.convert_tokens_to_ids(label) for label in "AB")
    assert json.load(open(folder / "gram_config.json"))["label_ids"] == [label_a, label_b]
    (margin,) = scorer.margins([("which", "red blue", "green")])
    assert margin == pytest.approx(float(logits[label_a] - logits[label_b]), abs=1e-5)

    (weights,) = pool.run(started_from, 1, *data, str(tmp_path / "run"))
    assert weights["score.weight"].abs().max() > 0 and "output_layer.weight" not in weights
    embedding = model.state_dict()["model.embed_tokens.weight"]
    assert torch.equal(weights["embedding.word_embeddings.weight"][: len(embedding)], embedding)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--objective bradley-terry --context-parallel-size 2", "compares the ends of two sequences"),
        ("--objective bradley-terry --pair-order both", "its loss is the same in both orders"),
        ("--objective bradley-terry --label-softmax full-vocabulary", "has no label tokens"),
        ("--objective bradley-terry --label-smoothing 0.05", "does not smooth"),
        ("--objective bradley-terry --sft-loss-weight -1", "must be at least 0"),
        ("--sft-loss-weight 0.01", "use it with --objective bradley-terry"),
        ("--freeze backbone", "leaves --objective pair-preference nothing to train"),
        ("--objective bradley-terry --freeze backbone --sft-loss-weight 0.01", "give one of the two"),
    ],
)
def test_refusals(flags, message):
    from gram_engine.config.parse import parse
    from gram_engine.config.validate import check
    from gram_engine.errors import ConfigError
    from gram_engine.model.shapes import resolve_shape

    config = parse(["--model", "tiny", "--vocab-size", "512", "--train-iters", "2", *flags.split()])
    resolve_shape(config)
    with pytest.raises(ConfigError, match=message):
        check(config, 2, data=False)
