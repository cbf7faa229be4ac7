"""Flags, YAML, and the refusal of combinations that cannot work."""

import pytest

from gram_engine.config.parallel_dims import layers_by_stage
from gram_engine.config.parse import load_yaml, parse
from gram_engine.config.validate import check
from gram_engine.errors import ConfigError
from gram_engine.model.shapes import resolve_shape


@pytest.fixture
def flags(tmp_path):
    """A small configuration that passes every check."""
    (tmp_path / "data.jsonl").write_text("{}\n")
    (tmp_path / "spm.model").write_text("")
    shape = "--num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 8 --num-query-groups 4"
    files = ["--data", str(tmp_path / "data.jsonl"), "--tokenizer-model", str(tmp_path / "spm.model")]
    return [*shape.split(), *files, "--train-iters", "10"]


def resolved(flags, world_size=1):
    config = parse(flags)
    resolve_shape(config)
    check(config, world_size)
    return config


def test_good_configuration_passes_and_fills_defaults(flags):
    config = resolved(flags)
    assert (config.model.kv_channels, config.model.norm_epsilon) == (8, 1e-5)
    assert config.model.untie_embeddings_and_output_weights is True


@pytest.mark.parametrize(
    "extra, world_size, message",
    [
        ("--tensor-model-parallel-size 3", 3, "does not divide the 8 attention heads"),
        ("--tensor-model-parallel-size 8", 8, r"does not divide the 4 key/value heads"),
        ("--pipeline-model-parallel-size 3", 3, "does not divide --num-layers 4"),
        ("--tensor-model-parallel-size 2", 3, "3 processes cannot form TP 2 x PP 1.*--nproc-per-node 2"),
        ("--num-layers-per-virtual-pipeline-stage 1", 1, "needs --pipeline-model-parallel-size of at least 2"),
        ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2", 2, "at least two virtual stages"),
        ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 0", 2, "at least two virtual stages"),
        ("--tensor-model-parallel-size 0", 1, "TP 0, PP 1 and CP 1 must be at least 1"),
        ("--sequence-parallel", 1, "needs --tensor-model-parallel-size above 1"),
        ("--overlap-param-gather", 1, "add --use-distributed-optimizer"),
        ("--use-distributed-optimizer --overlap-param-gather", 1, "together with --overlap-grad-reduce"),
        ("--train-epochs 1", 1, "length of the run once"),
        ("--label-smoothing 0.5", 1, r"must be in \[0, 0.5\)"),
        ("--save-interval 5", 1, "--save-interval needs --save"),
        ("--eval-interval 5", 1, "--eval-interval needs --valid-data"),
        ("--data-path x", 1, "training data once"),
        ("--num-query-groups 3", 1, "not a multiple of --num-query-groups 3"),
        ("--decoder-last-pipeline-num-layers 1", 1, "need --pipeline-model-parallel-size of at least 2"),
        ("--pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 4", 2, "cannot be spread over 2 .* stages"),
        ("--pipeline-model-parallel-size 3 --decoder-last-pipeline-num-layers 1", 3, "cannot be spread over 3 .* stages"),
        (
            "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1 --num-layers-per-virtual-pipeline-stage 1",
            2,
            "needs equal pipeline stages",
        ),
        ("--label-softmax full-vocabulary --no-fused-losses", 1, "leave --no-fused-losses out"),
        ("--context-parallel-size 2", 1, "cannot form TP 1 x PP 1 x CP 2: their number must be a multiple of 2"),
        ("--context-parallel-size 2 --seq-length 30", 2, "must be a multiple of 4"),
        ("--fp8-format hybrid", 1, "add --bf16"),
        ("--bf16 --fp8-format hybrid --transformer-impl local", 1, "leave --transformer-impl local out"),
        ("--bf16 --fp8-format hybrid --ffn-hidden-size 40", 1, r"multiples of 16; .* are \(64, 40, 64\)"),
        ("--fp8-param-gather", 1, "needs --fp8-format and --use-distributed-optimizer"),
        ("--first-last-layers-bf16", 1, "needs --fp8-format"),
        ("--bf16 --fp8-format hybrid --fp8-recipe delayed --first-last-layers-bf16", 1, "Use --fp8-recipe tensorwise"),
        ("--tp-comm-overlap", 1, "add --sequence-parallel"),
        (
            "--tensor-model-parallel-size 2 --sequence-parallel --tp-comm-overlap --bf16 --fp8-format hybrid --seq-length 100",
            2,
            "must be a multiple of 32",
        ),
        ("--logits-chunk-size 0", 1, "must be at least 1. Leave it out"),
        ("--lora-rank 0", 1, "--lora-rank 0 must be at least 1. Leave it out to train all weights"),
        ("--lora-rank 4 --lora-alpha -1", 1, "--lora-alpha -1 must be positive. Leave it out for twice the rank"),
        ("--lora-rank 4 --lora-modules", 1, "--lora-modules names no layer. Leave it out"),
        ("--lora-alpha 8", 1, "--lora-alpha and --lora-modules need --lora-rank"),
        ("--lora-modules linear_qkv", 1, "--lora-alpha and --lora-modules need --lora-rank"),
        ("--lora-rank 4 --bf16 --fp8-format hybrid", 1, "leave --fp8-format out to train adapters in BF16"),
        (
            "--lora-rank 4 --tensor-model-parallel-size 2 --sequence-parallel --tp-comm-overlap",
            2,
            "leave --tp-comm-overlap out",
        ),
    ],
)
def test_wrong_combinations_are_refused_with_a_remedy(flags, extra, world_size, message):
    with pytest.raises(ConfigError, match=message):
        resolved([*flags, *extra.split()], world_size)


@pytest.mark.parametrize(
    "layers, stages, first, last, spread",
    [
        (8, 1, None, None, [8]),
        (8, 4, None, None, [2, 2, 2, 2]),
        (9, 4, None, None, None),
        (9, 3, None, 1, [4, 4, 1]),
        (10, 4, 3, 3, [3, 2, 2, 3]),
        (10, 2, 4, 6, [4, 6]),
        (10, 2, 4, 5, None),
        (8, 3, 3, 4, [3, 1, 4]),
        (8, 3, 4, 4, None),
        (8, 2, 0, None, None),
        (4, 3, None, 10, None),
    ],
)
def test_layers_are_spread_over_pipeline_stages(layers, stages, first, last, spread):
    assert layers_by_stage(layers, stages, first, last) == spread


def test_lora_modules_are_known_ones_and_alpha_is_twice_the_rank(flags, capsys):
    config = resolved([*flags, "--lora-rank", "4", "--lora-modules", "linear_fc1", "linear_qkv"])
    assert (config.model.lora_alpha, config.model.lora_modules) == (8, ("linear_qkv", "linear_fc1"))
    with pytest.raises(SystemExit):
        parse([*flags, "--lora-rank", "4", "--lora-modules", "q_proj"])
    message = "".join(capsys.readouterr())
    assert "q_proj" in message and "linear_proj" in message


def test_missing_data_file_is_named(flags):
    with pytest.raises(ConfigError, match="nowhere.jsonl: no such file"):
        resolved([*flags, "--valid-data", "nowhere.jsonl"])


def test_unknown_preset_lists_the_known(flags):
    with pytest.raises(ConfigError, match="unknown preset. Choose one of: .*llama-3.1-8b"):
        resolved([*flags, "--model", "llama-9"])


def test_yaml_is_overridden_by_flags_and_survives_a_round_trip(flags, tmp_path):
    (tmp_path / "a.yaml").write_text("parallel:\n  sequence_parallel: true\nlr: 3.0e-4\nbf16: true\ntrain-iters: 7\n")
    config = parse(["--config", str(tmp_path / "a.yaml"), *flags, "--lr", "1e-3"])
    assert config.parallel.sequence_parallel and config.training.bf16
    assert (config.training.lr, config.training.train_iters) == (1e-3, 10)
    resolve_shape(config)
    config.save(tmp_path / "saved.yaml")
    assert load_yaml(tmp_path / "saved.yaml") == config


def test_yaml_typo_is_refused_with_a_suggestion(tmp_path):
    (tmp_path / "a.yaml").write_text("tensor_model_paralel_size: 2\n")
    with pytest.raises(ConfigError, match="unknown key 'tensor_model_paralel_size'. Did you mean 'tensor_model_parallel"):
        load_yaml(tmp_path / "a.yaml")


def test_badly_typed_flag_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(["--num-layers", "many"])
    assert "num-layers" in "".join(capsys.readouterr())
