"""--freeze: frozen weights stay bit for bit, have no gradient and no optimizer state, and a frozen run resumes exactly."""

import pytest
import torch

from tests.support.cases import short_first
from tests.support.layouts import LAYOUTS, TIED, UNTIED
from tests.support.resume import resumed, uninterrupted
from tests.support.tiny import tiny_config, tiny_trainer, train_steps

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
VANILLA = "--label-softmax full-vocabulary --label-smoothing 0"
RUNS = {
    "backbone-pp2": ("scalar", "pp2", "--freeze backbone --objective bradley-terry"),
    "backbone-dp2-overlap": ("scalar", "dp2-overlap", "--freeze backbone --objective bradley-terry"),
    "scalar-sft-tied-pp2": ("scalar", "pp2", f"--freeze embeddings --objective bradley-terry --sft-loss-weight 0.01 {TIED}"),
    "stage2-tied": ("stage2", "recompute", f"--freeze embeddings {TIED}"),
    "stage2-tied-pp2": ("stage2", "pp2", f"--freeze embeddings {TIED}"),
    "stage2-untied-dp2-overlap-bf16": ("stage2", "dp2-overlap", f"--freeze embeddings {UNTIED} --bf16"),
    "stage2-vanilla-tied-tp2": ("stage2", "tp2", f"--freeze embeddings {TIED} {VANILLA}"),
    "stage1-tied-pp2": ("stage1", "pp2", f"--freeze embeddings --objective response-lm {TIED}"),
}


@pytest.fixture(scope="module")
def data(tiny_data, tmp_path_factory):
    from gram_engine.config.schema import DataConfig
    from gram_engine.data.preprocess import preprocess

    prefix = str(tmp_path_factory.mktemp("freeze") / "scalar")
    cfg = DataConfig(tokenizer_model=tiny_data["tokenizer"], seq_length=192)
    preprocess([tiny_data["jsonl"]], prefix, objective="bradley-terry", cfg=cfg, both_orders=False)
    return {**tiny_data, "scalar": prefix}


def trained(prefix, tokenizer_model, flags):
    """{parameter of this process: (requires a gradient, has a gradient buffer, is unchanged)}, and numbers of elements."""
    trainer = tiny_trainer(tiny_config(prefix, tokenizer_model, f"--num-layers 2 {flags}"))
    parameters = {name: parameter for chunk in trainer.model for name, parameter in chunk.module.named_parameters()}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    train_steps(trainer, 3)
    state = {
        name.removeprefix("module."): (p.requires_grad, hasattr(p, "main_grad"), torch.equal(p, before[name]))
        for name, p in parameters.items()
    }
    in_buffers = sum(p.numel() for chunk in trainer.model for buffer in chunk.buffers for p in buffer.params)
    in_groups = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    return state, in_buffers, in_groups, sum(p.numel() for p in parameters.values() if p.requires_grad)


SHORT = [run for run in RUNS if run not in ("backbone-pp2", "stage2-tied", "stage2-vanilla-tied-tp2")]


@pytest.mark.parametrize("run", short_first(SHORT, RUNS))
def test_frozen_weights_stay_and_cost_nothing(run, pool, data):
    stage, layout, flags = RUNS[run]
    processes, parallel = LAYOUTS[layout]
    found = pool.run(trained, processes, data[stage], data["tokenizer"], f"{flags} {parallel}")
    every = {name: facts for state, *_ in found for name, facts in state.items()}
    frozen = {name for name, facts in every.items() if facts == (False, False, True)}
    trainable = {name for name, facts in every.items() if facts == (True, True, False)}
    assert frozen | trainable == every.keys(), every
    if "backbone" in flags:
        assert trainable == {"score.weight"}
    else:
        assert frozen - {OUTPUT} == {EMBEDDING}
        assert OUTPUT not in every or (OUTPUT in frozen) == (TIED in flags)
    for _, in_buffers, in_groups, trained_elements in found:
        assert in_buffers == trained_elements
        assert in_groups == trained_elements or "distributed" in parallel
    if "distributed" in parallel:
        assert sum(in_groups for _, _, in_groups, _ in found) == found[0][3], "each element's state on one process"


def stored(folder) -> set[str]:
    """Names of the weights whose optimizer state is in a checkpoint."""
    from gram_engine.checkpoint.folder import latest_checkpoint
    from gram_engine.checkpoint.torch_dist import TorchDistCheckpoint

    keys = TorchDistCheckpoint(latest_checkpoint(folder))._metadata.state_dict_metadata
    return {key.partition("exp_avg.")[2] for key in keys if "exp_avg." in key}


RESUMED = ["stage2-tied-pp2", "backbone-dp2-overlap", "backbone-pp2", "stage2-untied-dp2-overlap-bf16"]


@pytest.mark.parametrize("run", short_first(RESUMED[:2], RESUMED))
def test_a_frozen_run_resumes(run, pool, data, tmp_path):
    from gram_engine.errors import CheckpointError
    from tests.support.pool import WorkerError

    stage, layout, flags = RUNS[run]
    processes, parallel = LAYOUTS[layout]
    files, flags = (data[stage], data["tokenizer"]), f"--num-layers 2 {flags}"
    expected = pool.run(uninterrupted, processes, *files, f"{flags} {parallel}", str(tmp_path))[0]
    kept = stored(tmp_path)
    assert kept == {"score.weight"} if "backbone" in flags else kept and EMBEDDING not in kept
    assert pool.run(resumed, processes, *files, f"{flags} {parallel}", str(tmp_path))[0] == expected, "bit for bit"
    if layout == "pp2":
        one = pool.run(resumed, 1, *files, flags, str(tmp_path))[0]
        assert one == [pytest.approx(step, rel=1e-5) for step in expected]
    if run == "stage2-tied-pp2":
        with pytest.raises(WorkerError, match=f"{CheckpointError.__name__}.*saved with --freeze embeddings, this run has None"):
            pool.run(resumed, 1, *files, flags.replace("--freeze embeddings", ""), str(tmp_path))


def curve(prefix, tokenizer_model, flags):
    return train_steps(tiny_trainer(tiny_config(prefix, tokenizer_model, f"--num-layers 2 {flags}")), 3)


def test_recomputation_above_a_frozen_embedding_loses_no_gradient(pool, data):
    files, flags = (data["stage2"], data["tokenizer"]), "--freeze embeddings"
    (wanted,), (found,) = (pool.run(curve, 1, *files, f"{flags} {more}") for more in ("", "--recompute-granularity full"))
    assert found == [pytest.approx(step, rel=1e-6) for step in wanted]
