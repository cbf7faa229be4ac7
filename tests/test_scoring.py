"""Scorer against a naive computation with transformers, its files, and folders that cannot score."""

import itertools
import json
import os
import signal

import numpy as np
import pytest
import torch

from gram_engine.data.template import JudgeTemplate
from gram_engine.errors import CheckpointError, ConfigError
from gram_engine.scoring.command import main, rank_main
from gram_engine.scoring.scorer import RewardModelScorer
from tests.support.pool import run_alone
from tests.support.reward_folder import PAIRS

SEQ_LENGTH = 192

def naive_rewards(folder) -> list[float]:
    """Eq. 3 as the authors' evaluation computes it: full logits, one text at a time, softmax over the two labels."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    gram = json.loads((folder / "gram_config.json").read_text())
    template = JudgeTemplate.from_dict(gram["template"], "gram_config.json")

    def label_probabilities(*comparison):
        inputs = tokenizer(template.judge(*comparison), return_tensors="pt")
        assert inputs.input_ids.shape[1] <= SEQ_LENGTH
        with torch.no_grad():
            return model(**inputs).logits[0, -1, gram["label_ids"]].softmax(dim=0).tolist()

    return [0.5 * (label_probabilities(prompt, a, b)[0] + label_probabilities(prompt, b, a)[1]) for prompt, a, b in PAIRS]


def rewards_of(scorer, pairs) -> list[float]:
    return [score.reward_a for score in scorer.score_pairs(pairs)]


def test_rewards_equal_a_naive_computation(folder, scorer):
    found = list(scorer.score_pairs(PAIRS))
    rewards = [score.reward_a for score in found]
    assert np.ptp(rewards) > 0.01, "rewards must differ for the comparison to mean anything"
    np.testing.assert_allclose(rewards, naive_rewards(folder), atol=1e-5)
    assert not any(score.truncated for score in found)
    assert scorer.score(*PAIRS[2]) == pytest.approx(rewards[2], abs=1e-6)
    assert scorer.compare(*PAIRS[2]).winner == ("a" if rewards[2] > 0.5 else "b")


@pytest.mark.parametrize("batch_tokens", [1, 400, 100_000])
def test_margins_do_not_depend_on_batch_mates(batch_tokens, folder, scorer):
    together = scorer.margins(PAIRS)
    other = RewardModelScorer.from_pretrained(folder, batch_tokens=batch_tokens)
    np.testing.assert_allclose(other.margins(PAIRS), together, atol=1e-5)
    np.testing.assert_allclose(other.margins(PAIRS[::-1])[::-1], together, atol=1e-5)


def test_swapped_responses_give_the_other_reward(scorer):
    swapped = rewards_of(scorer, [(prompt, b, a) for prompt, a, b in PAIRS])
    np.testing.assert_allclose(np.add(rewards_of(scorer, PAIRS), swapped), 1.0, atol=1e-6)


def test_long_responses_are_shortened_and_counted(scorer):
    found = list(scorer.score_pairs([PAIRS[0], ("one", "red " * 500, "green")]))
    assert [score.truncated for score in found] == [False, True] and all(np.isfinite(score.reward_a) for score in found)


RESPONSES = ["red " * 3, "quiet river", "green cloud stone", "red red blue", "cloud " * 9, "stone", "a river of stone"]


@pytest.mark.parametrize("batch_tokens", [50, 4096])
def test_a_list_is_ranked_as_pairs_against_the_reference(batch_tokens, folder, scorer):
    ranking = RewardModelScorer.from_pretrained(folder, batch_tokens=batch_tokens).rank("which one", RESPONSES, reference=2)
    pairs = [("which one", response, RESPONSES[2]) for response in RESPONSES]
    wanted = rewards_of(scorer, pairs)
    wanted[2] = 0.5
    np.testing.assert_allclose(ranking.rewards, wanted, atol=1e-5)
    assert ranking.reference == 2 and ranking.order == sorted(range(7), key=lambda number: -ranking.rewards[number])
    drawn = {scorer.rank("which one", RESPONSES, seed=seed).reference for seed in range(40)}
    assert drawn == set(range(7)) and scorer.rank("which one", RESPONSES, seed=3) == scorer.rank("which one", RESPONSES, seed=3)


def test_best_of_n_by_each_method(scorer):
    def beats(one, other):
        return scorer.compare("which one", RESPONSES[one], RESPONSES[other]).reward_a >= 0.5

    champion = 0
    for challenger in range(1, 7):
        champion = champion if beats(champion, challenger) else challenger
    linear = scorer.best_of_n("which one", RESPONSES, "linear")
    assert (linear.index, linear.comparisons) == (champion, 6)

    def winner(one, other):
        return one if beats(one, other) else other

    first = [winner(0, 1), winner(2, 3), winner(4, 5), 6]
    tournament = scorer.best_of_n("which one", RESPONSES, "tournament")
    final = winner(winner(first[0], first[1]), winner(first[2], first[3]))
    assert (tournament.index, tournament.comparisons) == (final, 6)
    reference = scorer.best_of_n("which one", RESPONSES, "reference", seed=5)
    assert (reference.index, reference.comparisons) == (scorer.rank("which one", RESPONSES, seed=5).order[0], 6)


def test_short_lists(scorer):
    assert scorer.rank("x", ["alone"]).rewards == (0.5,)
    assert [scorer.best_of_n("x", ["alone"], method).comparisons for method in ("reference", "linear", "tournament")] == [0] * 3
    for call in (scorer.rank, scorer.best_of_n):
        with pytest.raises(ConfigError, match="list of responses is empty"):
            call("x", [])
    with pytest.raises(ConfigError, match="reference 2 is not one of the 2 responses"):
        scorer.rank("x", ["a", "b"], reference=2)


def test_lists_from_a_file(folder, scorer, tmp_path, capsys):
    rows = [{"prompt": "which one", "responses": RESPONSES, "reference": 2}, {"prompt": "other", "responses": RESPONSES[:3]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [str(tmp_path / name) for name in ("in.jsonl", "out.jsonl")]
    rank_main([*files, "--model", str(folder)])
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    ranking = scorer.rank("which one", RESPONSES, reference=2)
    np.testing.assert_allclose(lines[0]["rewards"], ranking.rewards, atol=1e-5)
    assert lines[0]["best"] == ranking.order[0] and [line["comparisons"] for line in lines] == [6, 2]
    rank_main([*files, "--model", str(folder), "--method", "tournament"])
    assert "2 lists ranked" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines[0]["best"] == scorer.best_of_n("which one", RESPONSES, "tournament").index and "rewards" not in lines[0]

    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "x", "responses": []}))
    with pytest.raises(SystemExit):
        rank_main([*files, "--model", str(folder)])
    assert "in.jsonl:1: a row must be {prompt, responses: [...]} with at least one response" in capsys.readouterr().err


def main_killed_in_the_third_batch(arguments):
    run, batches = RewardModelScorer._run, itertools.count(1)

    def run_or_die(self, tree):
        if next(batches) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(self, tree)

    RewardModelScorer._run = run_or_die
    main(arguments)


def test_an_interrupted_command_resumes(folder, scorer, tmp_path, capsys):
    rows = [{"prompt": prompt, "chosen": a, "rejected": b} for prompt, a, b in PAIRS]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--model", str(folder), "--batch-tokens", "100"]
    status, output = run_alone(main_killed_in_the_third_batch, arguments)
    assert status == -signal.SIGKILL, output
    partial = tmp_path / "out.jsonl.partial"
    whole = partial.read_text()
    assert not (tmp_path / "out.jsonl").exists() and 0 < whole.count("\n") < 7
    partial.write_text(whole + whole[:20])  # a line that was being written
    main(arguments)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["place"].rpartition(":")[2] for line in lines] == list("1234567")
    assert json.loads(capsys.readouterr().out)["pairs"] == 7
    np.testing.assert_allclose([line["reward_a"] for line in lines], rewards_of(scorer, PAIRS), atol=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}

    # Lines that were made of other input are discarded.
    run_alone(main_killed_in_the_third_batch, arguments)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    main(arguments)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([line["reward_a"] for line in lines], rewards_of(scorer, PAIRS[::-1]), atol=1e-5)


def test_files_in_and_out(folder, scorer, tmp_path, capsys):
    prompts = [{"prompt": prompt, "chosen": a, "rejected": b} for prompt, a, b in PAIRS]
    prompts[0] = {"prompt": PAIRS[0][0], "response_a": PAIRS[0][1], "response_b": PAIRS[0][2]}
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    files = [str(tmp_path / name) for name in ("in.jsonl", "out.jsonl")]
    main([*files, "--model", str(folder), "--report", str(tmp_path / "report.json")])

    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    rewards = np.array(rewards_of(scorer, PAIRS))
    np.testing.assert_allclose([line["reward_a"] for line in lines], rewards, atol=1e-5)
    np.testing.assert_allclose([line["reward_b"] for line in lines], 1.0 - rewards, atol=1e-5)
    assert [line["preference"] for line in lines] == [None] + [1.0] * 6
    assert [line["place"] for line in lines] == [f"{files[0]}:{number}" for number in range(1, 8)]

    report = json.loads((tmp_path / "report.json").read_text())
    assert report == json.loads(capsys.readouterr().out)
    assert report["pairs"] == 6 and report["truncated"] == 0
    assert report["accuracy"] == pytest.approx((rewards[1:] > 0.5).mean())


def test_folders_that_cannot_score_are_named(folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    with pytest.raises(ConfigError, match="gram_config.json: no such file. --model needs a folder written by `gram convert`"):
        RewardModelScorer.from_pretrained(tmp_path)
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = broken / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="final_layernorm.weight holds NaN or infinity"):
        RewardModelScorer.from_pretrained(broken)
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="model.safetensors: not a whole safetensors file"):
        RewardModelScorer.from_pretrained(broken)
    shutil.copy(folder / "model.safetensors", weights)
    gram = json.loads((broken / "gram_config.json").read_text())
    (broken / "gram_config.json").write_text(json.dumps({**gram, "label_ids": [5, 99999]}))
    with pytest.raises(ConfigError, match=r"label_ids \[5, 99999\] lie outside the vocabulary of \d+"):
        RewardModelScorer.from_pretrained(broken)
    (broken / "gram_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="gram_config.json: not what `gram convert` writes"):
        RewardModelScorer.from_pretrained(broken)
    (broken / "gram_config.json").write_text(json.dumps({**gram, "seq_length": 20}))
    with pytest.raises(ConfigError, match="--seq-length 20 is too short for the template"):
        RewardModelScorer.from_pretrained(broken).compare(*PAIRS[0])
    (broken / "gram_config.json").write_text(json.dumps(gram))
    index = {"weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="model-1.safetensors: no such file. Download the folder again"):
        RewardModelScorer.from_pretrained(broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(ConfigError, match="model_type is 'gpt2'; the engine reads 'llama' and 'qwen3'"):
        RewardModelScorer.from_pretrained(broken)
