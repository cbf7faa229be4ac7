"""Softmax and smoothing over the whole vocabulary ("vanilla") against torch's cross entropy on whole logits."""

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


def gradients(pool, data, layout, flags, change):
    processes, parallel = LAYOUTS[layout]
    return pool.run(
        float64_gradients, processes, data["stage2"], data["tokenizer"], f"{SMALL} {parallel} {flags}", change
    )


@pytest.mark.parametrize("flags", ["--prune-last-layer", "--no-prune-last-layer", "--label-smoothing 0"])
def test_equals_the_definition(flags, pool, tiny_data):
    (wanted,) = gradients(pool, tiny_data, "one", f"{flags} --no-prune-last-layer", by_definition)
    (found,) = gradients(pool, tiny_data, "one", flags, make_ties)
    assert_same_gradients(found, wanted)


PRUNED, WHOLE = "--prune-last-layer", "--no-prune-last-layer"
NAMES = ("tp2", "tp2-sp", "pp2", "tp2-sp-pp2", "dp2-overlap-grad-reduce")
RUNS = [(layout, flags) for layout in NAMES for flags in (PRUNED, WHOLE)]


@pytest.fixture(scope="module")
def one_process(pool, tiny_data):
    return {flags: gradients(pool, tiny_data, "one", flags, make_ties)[0] for flags in (PRUNED, WHOLE)}


@pytest.mark.parametrize("layout, flags", short_first([RUNS[2], RUNS[5], RUNS[8]], RUNS))
def test_any_layout_gives_one_process_loss(layout, flags, pool, tiny_data, one_process):
    wanted = one_process[flags]
    for found in gradients(pool, tiny_data, layout, flags, make_ties):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        for name in ("0.decoder.final_layernorm.weight", "1.decoder.final_layernorm.weight"):
            if name in found["gradients"]:
                wanted_gradient = wanted["gradients"]["0.decoder.final_layernorm.weight"]
                assert found["gradients"][name] == pytest.approx(wanted_gradient, rel=1e-10)
