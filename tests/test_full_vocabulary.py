"""Softmax and smoothing over the whole vocabulary ("vanilla") against torch's cross entropy on whole logits."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.support.cases import short_first
from tests.support.gradients import assert_same_gradients
from tests.support.layouts import LAYOUTS
from tests.support.tiny import float64_gradients

SMALL = (
    "--num-layers 2 --global-batch-size 6 --objective pair-preference --label-smoothing 0.2 "
    "--label-softmax full-vocabulary --untie-embeddings-and-output-weights True"
)


class WholeLogits:
    """The definition, for one process: logits of all tokens, torch's label smoothing; a tie is half of either label."""

    def __init__(self, objective):
        self.objective = objective

    def __getattr__(self, name):
        return getattr(self.objective, name)

    def __call__(self, hidden_states, output_weight, context):
        size, smoothing = self.objective.vocab_size, self.objective.label_smoothing
        logits = hidden_states.squeeze(1)[context.rows] @ output_weight[:size].t()
        loss = 0
        for label, share in zip(self.objective.label_ids, (context.preference, 1 - context.preference)):
            target = torch.full_like(context.rows, label)
            losses = F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none")
            loss = loss + (losses * share * context.weight).sum()
        label_a, label_b = self.objective.label_ids
        return self.objective.output(loss, logits[:, label_a] - logits[:, label_b], context)


def by_definition(trainer, batch):
    """Let the plain definition compute the loss, and some samples be ties."""
    trainer.objective = WholeLogits(trainer.objective)
    make_ties(trainer, batch)


def make_ties(_trainer, batch):
    for microbatch in batch.microbatches:
        microbatch.preference[::3] = 0.5


@pytest.fixture(scope="module")
def gradients(pool, tiny_data):
    """gradients(layout, flags, change): what each process of a run found; each run is made once."""
    made = {}

    def run(layout, flags, change=make_ties):
        if (layout, flags, change) not in made:
            processes, parallel = LAYOUTS[layout]
            arguments = (tiny_data["stage2"], tiny_data["tokenizer"], f"{SMALL} {parallel} {flags}", change)
            made[layout, flags, change] = pool.run(float64_gradients, processes, *arguments)
        return made[layout, flags, change]

    return run


PRUNED, WHOLE = "--prune-last-layer", "--no-prune-last-layer"


@pytest.mark.parametrize("flags", [PRUNED, WHOLE, f"{PRUNED} --label-smoothing 0"])
def test_equals_the_definition(flags, gradients):
    (wanted,) = gradients("one", flags.replace(PRUNED, WHOLE), by_definition)
    (found,) = gradients("one", flags)
    assert_same_gradients(found, wanted)


@pytest.mark.parametrize(
    "layout, flags",
    short_first(
        [("tp2", PRUNED), ("tp2-sp", WHOLE), ("pp2", WHOLE), ("tp2-sp-pp2", PRUNED), ("dp2-overlap-grad-reduce", PRUNED)],
        itertools.product(("tp2", "tp2-sp", "pp2", "tp2-sp-pp2", "dp2-overlap-grad-reduce"), (PRUNED, WHOLE)),
    ),
)
def test_any_layout_gives_one_process_loss(layout, flags, gradients):
    (wanted,) = gradients("one", flags)
    for found in gradients(layout, flags):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        for name in ("0.decoder.final_layernorm.weight", "1.decoder.final_layernorm.weight"):
            if name in found["gradients"]:
                wanted_gradient = wanted["gradients"]["0.decoder.final_layernorm.weight"]
                assert found["gradients"][name] == pytest.approx(wanted_gradient, rel=1e-10)
