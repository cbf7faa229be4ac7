"""LoRA: equal at every layout, equal to transformers with hand-written adapters, exact in checkpoints and after merging."""

import json
import re

import numpy as np
import pytest
import torch

from gram_engine.errors import CheckpointError
from tests.support.cases import short_first
from tests.support.gradients import relative_difference
from tests.support.hf_models import write_hf_model
from tests.support.layouts import LAYOUTS, TP2_SP
from tests.support.packed_logits import packed_logits
from tests.support.resume import resumed, uninterrupted
from tests.support.tiny import float64_gradients, packed, tiny_config, tiny_trainer, train_steps

STEPS = 3
LORA = "--lora-rank 4 --lora-alpha 6 --lr 1e-3"
STAGES = {
    "stage1": f"--objective response-lm {LORA} --untie-embeddings-and-output-weights True",
    "stage2": f"--objective pair-preference {LORA} --untie-embeddings-and-output-weights False",
}
LAYERS = "--num-layers 4"
"""Two virtual stages on each of two pipeline stages."""
NAMES = ("tp2", "tp2-sp", "pp2-vpp3", "dp2-overlap", "tp2-sp-pp2", "cp2", "recompute", "recompute-mlp")
RUNS = [("stage2", layout) for layout in NAMES] + [("stage1", layout) for layout in ("tp2-sp", "pp2-vpp3", "dp2-overlap")]


def parameters(trainer, adapters: bool) -> dict:
    """This rank's adapters, or its other parameters."""
    return {
        f"{index}.{name}": value
        for index, chunk in enumerate(trainer.model)
        for name, value in chunk.module.named_parameters()
        if (".adapter." in name) == adapters
    }


def curve(prefix, tokenizer_model, flags):
    """Losses and gradient norms of some steps; only the adapters may change, and have gradients and optimizer state."""
    trainer = tiny_trainer(tiny_config(prefix, tokenizer_model, flags))
    before = {name: value.clone() for name, value in parameters(trainer, adapters=False).items()}
    steps = train_steps(trainer, STEPS)
    after, adapters = parameters(trainer, adapters=False), parameters(trainer, adapters=True)
    assert all(torch.equal(value, after[name]) for name, value in before.items()), "the base changed"
    assert not any(hasattr(value, "main_grad") or value.requires_grad for value in after.values())
    assert all(value.any() for value in adapters.values()), "an adapter was not trained"
    buffered = [value for chunk in trainer.model for buffer in chunk.buffers for value in buffer.params]
    assert {*map(id, buffered)} == {*map(id, adapters.values())}
    trained = sum(value.numel() for value in adapters.values())
    held = sum(value.numel() for group in trainer.optimizer.param_groups for value in group["params"])
    assert 0 < held < trained if "distributed" in flags else held == trained
    return steps


@pytest.fixture(scope="module")
def references(pool, tiny_data):
    """The curve of one process, made once per stage."""
    made = {}

    def reference(stage):
        if stage not in made:
            made[stage] = pool.run(curve, 1, tiny_data[stage], tiny_data["tokenizer"], f"{STAGES[stage]} {LAYERS}")[0]
        return made[stage]

    return reference


SHORT = [
    *(("stage2", layout) for layout in ("tp2", "tp2-sp-pp2", "dp2-overlap", "cp2", "recompute", "recompute-mlp")),
    ("stage1", "pp2-vpp3"),
]


@pytest.mark.parametrize("stage, layout", short_first(SHORT, RUNS))
def test_layout_equals_one_process_and_the_base_stays(stage, layout, pool, tiny_data, references):
    processes, flags = LAYOUTS[layout]
    expected = references(stage)
    for found in pool.run(curve, processes, tiny_data[stage], tiny_data["tokenizer"], f"{STAGES[stage]} {LAYERS} {flags}"):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def untrained_b(trainer, _batch):
    """Set B to the same value at every layout; with the initial zeros A would have no gradient."""
    for name, value in parameters(trainer, adapters=True).items():
        if name.endswith("linear_out.weight"):
            value.data.fill_(0.02)


@pytest.mark.parametrize("layout", ["one", "tp2-sp"])
def test_pruned_last_layer_gives_the_plain_models_gradients(layout, pool, tiny_data):
    processes, parallel = LAYOUTS[layout]
    data = (tiny_data["stage2"], tiny_data["tokenizer"])
    runs = [
        pool.run(float64_gradients, processes, *data, f"{STAGES['stage2']} --num-layers 2 {parallel} {losses}", untrained_b)
        for losses in ("--fused-losses", "--no-fused-losses")
    ]
    for found, wanted in zip(*runs, strict=True):
        assert found["gradients"].keys() == wanted["gradients"].keys() and len(wanted["gradients"]) == 2 * 4 * 2
        for name, gradient in wanted["gradients"].items():
            assert gradient.any() and relative_difference(found["gradients"][name], gradient) < 1e-11, name



def hf_run(prefix, tokenizer, flags):
    """The tiny run on a Hugging Face folder (its shape comes with --load-hf)."""
    from gram_engine.config.parse import parse
    from gram_engine.model.shapes import resolve_shape

    run = f"--seq-length 192 --global-batch-size 8 --train-iters 20 --lr-decay-style constant --lr-warmup-fraction 0 {flags}"
    config = parse([*run.split(), "--data-path", prefix, "--tokenizer-model", tokenizer])
    resolve_shape(config)
    return config


def trained_from_hf(prefix, tokenizer, flags):
    """Train for STEPS and save: the curve, the initial values of A, the batches and the label ids."""
    trainer = tiny_trainer(hf_run(prefix, tokenizer, flags))
    weights = parameters(trainer, adapters=True)
    first_a = {
        (int(name.split(".layers.")[1].split(".")[0]), name.split(".")[-4]): value.detach().clone()
        for name, value in weights.items()
        if name.endswith("linear_in.weight")
    }
    assert not any(value.any() for name, value in weights.items() if name.endswith("linear_out.weight"))
    batch_size = trainer.config.training.global_batch_size
    batches = [trainer.loader.batch(step * batch_size).microbatches for step in range(STEPS)]
    steps = train_steps(trainer, STEPS)
    trainer.save()
    return {"curve": steps, "first_a": first_a, "batches": batches, "label_ids": trainer.dataset.manifest.label_ids}


@pytest.mark.parametrize("stage", STAGES)
def test_training_equals_transformers_with_hand_written_adapters(stage, pool, tiny_data, tmp_path):
    """Losses, gradient norms, and every weight after merging."""
    from safetensors.torch import load_file

    from gram_engine.convert.export_hf import export_hf
    from tests.support.lora_reference import LoraLinear, add_adapters, pair_loss, response_loss, train

    vocab_size = json.load(open(f"{tiny_data[stage]}.json"))["tokenizer"]["vocab_size"] + 3
    model = write_hf_model(tmp_path / "hf", vocab_size, stage == "stage2", "plain").train()
    objective = STAGES[stage].split(" --untie")[0]
    flags = f"{objective} --load-hf {tmp_path / 'hf'} --save {tmp_path / 'run'}"
    (run,) = pool.run(trained_from_hf, 1, tiny_data[stage], tiny_data["tokenizer"], flags)

    for (_, module), a in run["first_a"].items():
        width = 48 if module in ("linear_qkv", "linear_fc1") else 64 if module == "linear_proj" else 80
        assert a.shape == (4, width) and 0.9 < a.abs().max() * width**0.5 < 1
    add_adapters(model, run["first_a"], scale=6 / 4)
    loss = response_loss if stage == "stage1" else pair_loss(run["label_ids"], 0.1)
    expected = train(model, run["batches"], loss, lr=1e-3)
    np.testing.assert_allclose(run["curve"], expected, rtol=1e-5)

    export_hf(tmp_path / "run", tmp_path / "merged", verify=True)
    before, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "merged"))
    wanted = {f"{name}.weight": part.merged() for name, part in model.named_modules() if isinstance(part, LoraLinear)}
    assert len(wanted) == 6 * 7
    for name, tensor in merged.items():
        if name in wanted:
            assert not torch.equal(tensor, before[name]), name
            torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-5)
        else:
            assert torch.equal(tensor, before[name]), f"{name} has no adapter"



def unmerged_logits(prefix, tokenizer, flags, tokens):
    """Logits of one sequence by the frozen model with trained adapters beside it."""
    trainer = tiny_trainer(tiny_config(prefix, tokenizer, f"{flags} --no-fused-losses"))
    positions, sequences = packed([len(tokens)])
    with torch.no_grad():
        logits = trainer.model[0].module(tokens[None], positions, None, packed_seq_params=sequences)
    return logits[0, :, : trainer.config.model.vocab_size]


def saved_before_and_after(prefix, tokenizer, flags):
    trainer = tiny_trainer(tiny_config(prefix, tokenizer, flags))
    trainer.save()
    train_steps(trainer, STEPS)
    trainer.save()


def test_merged_weights_give_the_unmerged_logits_and_untrained_ones_the_base(pool, tiny_data, tmp_path):
    from safetensors.torch import load_file

    from gram_engine.convert.export_hf import export_hf

    data, shape = (tiny_data["stage2"], tiny_data["tokenizer"]), "--init-method-std 0.06 --lr 3e-3"
    for name, lora in (("lora", LORA), ("full", "")):
        pool.run(saved_before_and_after, 1, *data, f"{lora} {shape} --save {tmp_path / name}")
        export_hf(tmp_path / name / "iter_0000000", tmp_path / f"{name}-untrained")
    base, untrained = (load_file(tmp_path / f"{name}-untrained" / "model.safetensors") for name in ("full", "lora"))
    assert base.keys() == untrained.keys() and all(torch.equal(value, untrained[name]) for name, value in base.items())

    export_hf(tmp_path / "lora", tmp_path / "merged")
    tokens = torch.randint(0, 500, (150,), generator=torch.Generator().manual_seed(1))
    (wanted,) = pool.run(unmerged_logits, 1, *data, f"{LORA} {shape} --load {tmp_path / 'lora'}", tokens)
    before, found = (
        pool.run(packed_logits, 1, *data, str(tmp_path / name), [150], tokens)[0] for name in ("lora-untrained", "merged")
    )
    assert (wanted - before).abs().mean() > 0.01, "the adapters must matter"
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def starts(prefix, tokenizer, runs):
    """For each run's flags: sums of squares of its adapters and other weights at the start, or the error of the start."""
    from megatron.core import parallel_state

    found = []
    for flags in runs:
        parallel_state.destroy_model_parallel()
        try:
            trainer = tiny_trainer(tiny_config(prefix, tokenizer, f"{flags} --untie-embeddings-and-output-weights False"))
        except CheckpointError as error:
            found.append(str(error))
            continue
        found.append([
            {name: float(value.detach().double().square().sum()) for name, value in parameters(trainer, adapters).items()}
            for adapters in (True, False)
        ])
    return found


def test_checkpoints(pool, tiny_data, tmp_path):
    """Resuming is exact bit for bit, within 1e-5 at other layouts; a new run keeps the adapters or starts with new ones."""
    run, full = tmp_path / "run", tmp_path / "full"
    data, flags = (tiny_data["stage2"], tiny_data["tokenizer"]), f"{STAGES['stage2']} --use-distributed-optimizer"
    layout = f"{flags} {TP2_SP} --pipeline-model-parallel-size 2"
    expected = pool.run(uninterrupted, 4, *data, layout, str(run))[0]
    assert pool.run(resumed, 4, *data, layout, str(run))[0] == expected, "same layout: bit for bit"
    np.testing.assert_allclose(pool.run(resumed, 1, *data, flags, str(run))[0], expected, rtol=1e-5)

    pool.run(uninterrupted, 1, *data, "--untie-embeddings-and-output-weights False --lr 1e-3", str(full))
    begun = (f"{LORA} --pretrained-checkpoint {run}", LORA, f"{LORA} --pretrained-checkpoint {full}", f"--load {full}")
    refused = {
        f"--lora-rank 3 --load {run}": "saved with --lora-rank 4, this run has 3. {merge} as a new run",
        f"--lora-rank 4 --load {run}": "saved with --lora-alpha 6.0, this run has 8.0. {merge} as a new run",
        f"--pretrained-checkpoint {run}": "saved with --lora-rank 4, this run has None. {merge}",
        f"{LORA} --load {full}": "saved with --lora-rank None, this run has 4. Use the same, or start a new run with --pre",
    }
    (found,) = pool.run(starts, 1, *data, [*begun, *refused])
    (with_adapters, base), (fresh, same_base), (fresh_again, other_base), (none, trained_base) = found[:4]
    assert base == same_base and all(with_adapters.values()), "adapters start as they were trained"
    assert fresh == fresh_again and other_base == trained_base != base and not none
    merge = r"Use the same, or merge the adapters \(gram convert --load .*\) and start with --load-hf FOLDER"
    for error, message in zip(found[4:], refused.values(), strict=True):
        assert re.search(message.format(merge=merge), error), error


def fused_norm_difference():
    """A linear layer with a fused norm, as Transformer Engine has, against a separate norm before megatron-core's layer."""
    import torch.nn.functional as F
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from gram_engine.config.parse import parse
    from gram_engine.model.build import transformer_config
    from gram_engine.model.lora import adapted
    from gram_engine.model.shapes import resolve_shape
    from gram_engine.platform import device as platform
    from gram_engine.training.initialise import start_model_parallel

    class NormLinear(ColumnParallelLinear):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.layer_norm_weight, self.eps = torch.nn.Parameter(torch.rand(8)), 1e-3

        def forward(self, hidden):
            return super().forward(F.rms_norm(hidden, (8,), self.layer_norm_weight, self.eps))

    config = parse("--model tiny --vocab-size 32".split())
    resolve_shape(config)
    start_model_parallel(config)
    core, made = transformer_config(config, platform.initialise("cpu")), []
    for kind in (NormLinear, ColumnParallelLinear):
        torch.manual_seed(0)
        options = dict(config=core, init_method=torch.nn.init.normal_, bias=False, skip_bias_add=True)
        made.append(adapted(kind, "linear_qkv", 2, 3.0)(8, 12, **options))
    fused, plain = made
    plain.load_state_dict(fused.state_dict(), strict=False)
    hidden = torch.randn(5, 1, 8)
    normed = F.rms_norm(hidden, (8,), fused.layer_norm_weight, fused.eps)
    difference = fused(hidden)[0] - plain(normed)[0]
    return float(difference.abs().max()), float(plain.adapter(normed).abs().mean())


def test_a_layer_that_norms_its_own_input_gives_the_adapter_the_normed_one(pool):
    ((difference, added),) = pool.run(fused_norm_difference, 1)
    assert difference < 1e-6 < 1e-2 < added
