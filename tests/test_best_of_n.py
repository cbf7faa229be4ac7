"""Best of n: the estimator against all subsets, KL, intervals, candidates from lists and pairs, the command."""

import itertools
import json
import math

import numpy as np
import pytest

from gram_engine.data import demo
from gram_engine.errors import ConfigError, DataError
from gram_engine.evaluation.best_of_n import best_of_n_curve, chance_of_best, expected_of_best, kl_of, main, read_candidates
from gram_engine.scoring.scorer import RewardModelScorer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def over_all_subsets(proxy, values, n) -> float:
    """Mean over every subset of n of the value of its best by the proxy; equals share it."""
    found = []
    for subset in itertools.combinations(range(len(proxy)), n):
        top = max(proxy[i] for i in subset)
        found.append(np.mean([values[i] for i in subset if proxy[i] == top]))
    return float(np.mean(found))


@pytest.mark.parametrize("levels", [1000, 3, 1], ids=["distinct", "many equal", "all equal"])
@pytest.mark.parametrize("candidates", [1, 2, 7])
def test_estimate_equals_the_mean_over_all_subsets(candidates, levels):
    rng = np.random.default_rng(candidates)
    proxy, values = rng.integers(levels, size=candidates) / 7, rng.normal(size=candidates)
    found = expected_of_best(proxy, values, candidates)
    np.testing.assert_allclose(found, [over_all_subsets(proxy, values, n) for n in range(1, candidates + 1)], atol=1e-12)


def test_chances_add_up_and_large_lists_stay_exact():
    chances = chance_of_best(244, 244)
    np.testing.assert_allclose(chances.sum(axis=1), 1.0, atol=1e-12)
    assert chances[243, 243] == 1.0 and chances[0, 0] == pytest.approx(1 / 244)


def test_kl_is_that_of_the_best_of_n_distribution():
    # The best of n has density n u^(n-1) in the quantile u of the policy it is drawn from.
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (1, 2, 5, 244):
        density = n * u ** (n - 1)
        assert kl_of(n) == pytest.approx(float(np.mean(density * np.log(np.maximum(density, 1e-300)))), abs=1e-4)
    assert kl_of(244) == pytest.approx(4.501, abs=5e-4)  # the paper's axis ends at 4.5 with 244


def test_curve_means_over_prompts_and_resamples_them():
    rng = np.random.default_rng(0)
    proxy = [rng.normal(size=size) for size in rng.integers(4, 9, size=60)]
    oracle = [own + rng.normal(size=len(own)) for own in proxy]
    curve = best_of_n_curve(proxy, oracle, 4)
    assert [row["n"] for row in curve] == [1, 2, 3, 4]
    by_prompt = np.array([expected_of_best(one, two, 4) for one, two in zip(proxy, oracle)])
    np.testing.assert_allclose([row["oracle"] for row in curve], by_prompt.mean(axis=0))
    drawn = [by_prompt[rng.integers(60, size=60), 3].mean() for _ in range(4000)]
    assert curve[3]["oracle_low"] == pytest.approx(np.quantile(drawn, 0.025), abs=0.03)
    assert curve[3]["oracle_high"] == pytest.approx(np.quantile(drawn, 0.975), abs=0.03)


def test_pairs_of_one_prompt_become_a_list_with_the_share_of_wins(tmp_path):
    rows = [("x", "a", "b"), ("x", "a", "c"), ("x", "c", "b"), ("y", "d", "e")]
    file = write(tmp_path / "pairs.jsonl", [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in rows])
    first, second = read_candidates(file)
    assert (first.prompt, first.responses, first.oracle) == ("x", ("a", "b", "c"), (1.0, 0.0, 0.5))
    assert (second.responses, second.source_location) == (("d", "e"), f"{file}:4")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "x", "responses": ["a", "b"], "oracle": [1]}, "'oracle' must hold a finite number for each of the 2"),
        ({"prompt": "x", "responses": ["a"], "oracle": [math.nan]}, "'oracle' must hold a finite number"),
        ({"prompt": "x", "response_a": "a", "response_b": "b"}, "no preference, and no `responses`"),
    ],
)
def test_bad_rows_are_named(row, message, tmp_path):
    with pytest.raises(DataError, match=f"rows.jsonl:1: .*{message}"):
        read_candidates(write(tmp_path / "rows.jsonl", [row]))


def test_command_writes_curve_and_report(folder, tmp_path, capsys):
    rows = list(demo.candidates(3, seed=1))
    rows = [{"prompt": row["prompt"], "responses": row["responses"][:5], "oracle": row["oracle"][:5]} for row in rows]
    rows.append({"prompt": "short", "responses": ["a", "b"], "oracle": [0, 1]})
    file, out = write(tmp_path / "lists.jsonl", rows), tmp_path / "out"
    main([file, "--model", str(folder), "--output-dir", str(out), "--n", "4"])
    assert "3 prompts" in capsys.readouterr().out
    report = json.loads((out / "best_of_n.json").read_text())
    assert (report["prompts"], report["prompts_left_out"], report["candidates"]) == (3, 1, 15)
    scorer = RewardModelScorer.from_pretrained(folder)
    ranked = [scorer.rank(row["prompt"], row["responses"], seed=number) for number, row in enumerate(rows[:3])]
    for n in (1, 4):
        wanted = [over_all_subsets(one.rewards, row["oracle"], n) for one, row in zip(ranked, rows)]
        assert report["curve"][n - 1]["oracle"] == pytest.approx(np.mean(wanted), abs=1e-6)
    assert (out / "plots/oracle.png").read_bytes().startswith(b"\x89PNG")
    assert "| 4 | 0.636 |" in (out / "best_of_n.md").read_text() and "<td>0.636</td>" in (out / "best_of_n.html").read_text()

    main([file, "--model", str(folder), "--output-dir", str(out), "--oracle", str(folder)])  # its own oracle
    for row in json.loads((out / "best_of_n.json").read_text())["curve"]:
        assert row["proxy"] == row["oracle"]
    with pytest.raises(SystemExit):
        main([file, "--model", str(folder), "--output-dir", str(out), "--n", "6"])
    assert "--n 6: the prompts have at most 5 responses" in capsys.readouterr().err


def test_candidates_without_oracle_scores_are_refused(folder, tmp_path):
    from gram_engine.evaluation.best_of_n import BestOfNArguments, best_of_n

    file = write(tmp_path / "lists.jsonl", [{"prompt": "x", "responses": ["a", "b"]}])
    with pytest.raises(DataError, match="lists.jsonl:1: no field 'oracle'"):
        best_of_n(BestOfNArguments(file=file, model=str(folder), output_dir=str(tmp_path)))
    with pytest.raises(ConfigError, match="--oracle none: neither 'field' nor a model's folder"):
        best_of_n(BestOfNArguments(file=file, model=str(folder), output_dir=str(tmp_path), oracle="none"))


def test_demonstration_candidates_are_scored_by_their_order():
    for row in demo.candidates(20, seed=3):
        right = [demo.is_right(row, response) for response in row["responses"]]
        assert right == [score == 1.0 for score in row["oracle"]]
        assert len(set(row["oracle"])) > 2 and sum(right) <= 1
        assert len(set(row["responses"])) == demo.CANDIDATES
