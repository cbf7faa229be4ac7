"""The reproduction's figures: intervals, differences, verdicts, and the report beside the paper's."""

import json
import re

import numpy as np
import pytest

from gram_engine.reproduce.collect import Estimate, Results, Scores, bootstrap
from gram_engine.reproduce.compare import compare, kendall_tau, verdict
from gram_engine.reproduce.jobs import JobGraph
from gram_engine.reproduce.paper import COLUMNS, PUBLISHED
from gram_engine.reproduce.report import write_report
from tests.support.recipe_lab import content, demonstration, recipe_of


def test_interval_against_naive_resampling():
    rng = np.random.default_rng(1)
    skill, hardness = rng.normal(size=(4, 1)), rng.normal(size=(1, 150))
    matrices = [(skill + hardness + rng.normal(size=(4, 150)) > 0).astype(float), rng.integers(2, size=(4, 40)).astype(float)]
    drawn = []
    for _ in range(4000):
        seeds = rng.integers(4, size=4)
        means = [matrix[np.ix_(seeds, rng.integers(matrix.shape[1], size=matrix.shape[1]))].mean() for matrix in matrices]
        drawn.append(np.mean(means))
    found = bootstrap(matrices)
    assert found.mean == pytest.approx(np.mean([matrix.mean() for matrix in matrices]))
    assert found.low == pytest.approx(np.quantile(drawn, 0.025), abs=0.01)
    assert found.high == pytest.approx(np.quantile(drawn, 0.975), abs=0.01)


def test_interval_of_one_seed_is_the_binomial_one():
    matrix = (np.arange(400) % 5 < 3).astype(float)[None]
    found, half = bootstrap([matrix]), 1.96 * (0.6 * 0.4 / 400) ** 0.5
    assert (found.mean, found.high - found.low) == (pytest.approx(0.6), pytest.approx(2 * half, rel=0.06))


def test_differences_are_paired_by_seed_and_pair():
    rng = np.random.default_rng(2)
    correct = rng.integers(2, size=(3, 300)).astype(float)
    better = correct.copy()
    better[:, :30] = 1.0
    scores = {
        "a": {"known": Scores((1, 2, 3), better, 1.0, 0.5, 0.0)},
        "b": {"known": Scores((1, 2, 3), correct, 1.0, 0.5, 0.0)},
        "c": {"known": Scores((3, 4), correct[[2, 0]], 1.0, 0.5, 0.0)},
        "d": {"known": Scores((5,), correct[:1], 1.0, 0.5, 0.0)},
    }
    results = Results(scores)
    found = results.difference("a", "b", ["known"])
    assert found.mean == pytest.approx((better - correct).mean()) and found.low > 0, "clear, though both are near one half"
    assert results.difference("a", "c", ["known"]).mean == pytest.approx((better - correct)[2].mean()), "the common seed"
    assert results.difference("a", "d", ["known"]) is None and results.accuracy("a", ["letters"]) is None


def test_orders_and_verdicts():
    assert kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6) and kendall_tau([1, 2], [2, 1]) == -1
    clear, unclear = Estimate(0.1, 0.05, 0.15, seeds=3), Estimate(0.1, -0.05, 0.25, seeds=3)
    assert not Estimate(0.1, 0.05, 0.15, seeds=1).is_clear
    assert [verdict(paper, ours) for paper in (2.0, -2.0) for ours in (clear, unclear)] == [
        "agrees", "same direction, within chance", "contradicts", "other direction, within chance"
    ]  # fmt: skip


def test_published_figures_are_percentages_of_known_columns():
    for published in PUBLISHED.values():
        for row in [*published.rows.values(), published.best]:
            assert set(row) <= set(COLUMNS)
            assert all(abs(value) <= 100 for value in row.values())
    assert PUBLISHED["table-1-8b"].rows["GRAM"] == {"in": 70.4, "out": 85.1, "hhh": 85.4}


def test_report_sets_figures_beside_the_papers(tmp_path):
    recipe = recipe_of(tmp_path, content(demonstration(tmp_path / "demo")))
    graph = JobGraph(recipe, tmp_path / "out")
    right = lambda share: np.tile((np.arange(200) < 200 * share).astype(float), (2, 1))  # noqa: E731
    measured = {
        name: {"known": Scores((1, 2), right(known), 0.9, 0.5, 0.0), "letters": Scores((1, 2), right(letters), 0.8, 0.4, 0.25)}
        for name, known, letters in (("gram", 0.7, 0.9), ("v1", 0.72, 0.6))
    }
    results = Results(measured, {"known": 0.5, "letters": 0.6}, {"known": 200, "letters": 200})
    parts, smoothing = (compare(section, recipe, results) for section in recipe.sections)
    (claim,) = [claim for claim in parts["claims"] if claim["paper"]]
    assert (claim["column"], claim["paper"], claim["verdict"]) == ("out of distribution", -3.9, "agrees")
    assert claim["ours"]["mean"] == pytest.approx(-0.3)
    assert [row["figures"][0] and row["figures"][0]["mean"] for row in smoothing["rows"]] == [None, pytest.approx(0.7)]
    assert smoothing["rows"][1]["paper"] == [None, 85.1] and smoothing["lines"] == [], "one point is no line"

    evil = {next(iter(graph.jobs)): "<script>alert(1)</script>"}
    write_report(graph, results, evil, "gram reproduce")
    page, text = (tmp_path / "out/report.html").read_text(), (tmp_path / "out/report.md").read_text()
    assert not re.search(r"(src|href)=['\"](?!data:)", page), "the page needs nothing from elsewhere"
    assert "<script>alert" not in page and "&lt;script&gt;" in page
    for told in (
        "4 accuracies, each of a variant on a test set: 4 are clearly above one half, 0 clearly below, 0 within chance of it",
        "Ours agree: GRAM-v1 against GRAM (out of distribution)",
        "Not measured: plain",
        "| GRAM-v1 | 72.0 (",
        "-30.0 (-",
        "| known | in distribution | 200 | 50.0 | 0 |",
        "| letters | out of distribution | 200 | 60.0 | 25 |",
        "What the figures do not show",
        "The paper: Table 4. The text names the drop of v1",
    ):
        assert told in text, told
    assert (tmp_path / "out/plots/section-1-out-of-distribution.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["variants"]["gram"]["sets"]["letters"]["by_seed"] == {"1": 0.9, "2": 0.9}
    assert report["failed"] == {"tokenizer": "<script>alert(1)</script>"}
