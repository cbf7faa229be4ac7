"""Reproduction: recipes and their faults, jobs shared and run once, kills and failures, intervals, the report, a whole run."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from gram_engine import demo
from gram_engine.config import TrainingConfig
from gram_engine.errors import ConfigError
from gram_engine.reproduce import command
from gram_engine.reproduce.collect import Estimate, Results, Scores, bootstrap
from gram_engine.reproduce.compare import compare, kendall_tau, verdict
from gram_engine.reproduce.data import prepare
from gram_engine.reproduce.paper import COLUMNS, PUBLISHED
from gram_engine.reproduce.plan import make_plan
from gram_engine.reproduce.recipe import DataSet, load_recipe
from gram_engine.reproduce.report import write_report
from gram_engine.reproduce.runner import Runner, alone_in, refused
from tests.conftest import TEMPLATE
from tests.shell_jobs import shell_jobs

RECIPES = Path(__file__).resolve().parents[1] / "examples" / "recipes"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Demonstration pairs and candidates."""
    folder = tmp_path_factory.mktemp("demo")
    demo.write(demo.DemoConfig(output_dir=str(folder), train_pairs=60, test_pairs=24, candidates=4))
    return folder


def content(data) -> dict:
    """A recipe of three variants, two of which begin with the same stage 1."""
    return {
        "title": "A test",
        "variables": {"data": str(data)},
        "seeds": [1, 2],
        "tokenizer": {"data": "train", "vocab_size": 640},
        "flags": {"model": "tiny", "template": TEMPLATE, "seq_length": 192, "train_iters": 2, "global_batch_size": 4},
        "data": {
            "train": {"files": ["${data}/train.jsonl"]},
            "few": {"files": ["${data}/train.jsonl"], "rows": 20},
            "test": {"files": ["${data}/test.jsonl"], "where": {"kind": ["days", "months"]}},
            "letters": {"files": ["${data}/test.jsonl"], "where": {"kind": "letters"}},
            "candidates": {"files": ["${data}/candidates.jsonl"]},
        },
        "evaluation": {"known": {"data": "test", "kind": "in"}, "letters": {"data": "letters", "kind": "out"}},
        "stages": {
            "stage1": {"command": "pretrain", "data": "train"},
            "stage2": {"command": "finetune", "data": "few", "flags": {"label_smoothing": 0.1}},
        },
        "variants": {
            "gram": ["stage1", "stage2"],
            "plain": ["stage1", {"stage": "stage2", "flags": {"label_smoothing": 0}}],
            "v1": ["stage2"],
        },
        "best_of_n": {"data": "candidates", "n": 4, "variants": ["gram"]},
        "sections": [
            {"title": "Parts", "rows": {"GRAM": "gram", "GRAM-v1": "v1"}, "reference": "GRAM", "published": "table-4"},
            {"title": "Smoothing", "x": "eps", "series": {"GRAM": {0: "plain", 0.1: "gram"}}, "published": "figure-10"},
        ],
    }


def recipe_of(tmp_path, recipe: dict, **variables):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return load_recipe(path, variables)


def changed(recipe: dict, path: str, value) -> dict:
    """The recipe with one entry replaced (None: removed)."""
    recipe = copy.deepcopy(recipe)
    *parents, last = path.split(".")
    entry = recipe
    for name in parents:
        entry = entry[int(name) if name.isdigit() else name]
    if value is None:
        del entry[last]
    else:
        entry[last] = value
    return recipe


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("seed", [1], "the recipe: unknown key 'seed'. Did you mean 'seeds'?"),
        ("title", None, "the recipe: 'title' is missing"),
        ("seeds", [1, 1], "seeds must be different whole numbers"),
        ("seeds", 3, "the recipe.seeds: must be a list, not 3"),
        ("data.few.rows", 0, "data.few: needs at least one file and one row"),
        ("data.a b", {"files": ["x"]}, "data: the name 'a b' must be letters"),
        ("evaluation.known.kind", "inside", "evaluation.known.kind: 'inside' must be one of in, out, hhh, task"),
        ("stages.stage1.data", "trian", "stages.stage1: 'trian' is not among data .* Did you mean 'train'?"),
        ("stages.stage1.command", "train", "stages.stage1.command: 'train' must be one of pretrain, finetune"),
        ("stages.stage2.flags", {"save": "x"}, "stages.stage2.flags.save: the runner gives this flag itself"),
        ("flags.tokenizer_model", "x", "flags.tokenizer_model: the runner gives this flag itself"),
        ("flags.lr", {"a": 1}, "flags.lr: {'a': 1} is no value of a flag"),
        ("variants.gram", ["stage3"], "variants.gram: 'stage3' is not among stages"),
        ("variants.gram", [], "variants.gram: has no stage"),
        ("variants.gram", {"stages": ["stage1"], "evaluate": ["x"]}, "variants.gram: 'x' is not among evaluation"),
        ("sections.0.rows", {"GRAM": "grm"}, "section 'Parts': 'grm' is not among variants .* Did you mean 'gram'?"),
        ("sections.0.reference", "v9", "section 'Parts': 'v9' is not among its rows"),
        ("sections.0.published", "table-9", "section 'Parts': 'table-9' is not among the paper's tables"),
        ("sections.0.series", {"a": {0: "gram"}}, "section 'Parts': give either rows or series"),
        ("best_of_n.variants", ["x"], "best_of_n: 'x' is not among variants"),
        ("variables", {}, "variable 'data' has no value. Name it under 'variables'"),
    ],
)
def test_faults_of_recipes_are_named(path, value, message, tmp_path, data):
    recipe = changed(content(data), path, value)
    with pytest.raises(ConfigError, match=f"recipe.yaml: .*{message}"):
        recipe_of(tmp_path, recipe)


def test_variables_come_from_the_command_line(tmp_path, data):
    recipe = changed(content(data), "variables.data", "elsewhere")
    found = recipe_of(tmp_path, recipe, data="here")
    assert found.variants["v1"].stages[0].data.files == ("here/train.jsonl",)
    with pytest.raises(ConfigError, match="--set dat=...: the recipe has no such variable. Did you mean 'data'?"):
        recipe_of(tmp_path, recipe, dat="here")
    with pytest.raises(ConfigError, match="'data' has no value. Give it: --set data=VALUE"):
        recipe_of(tmp_path, {**recipe, "variables": {"data": None}})
    with pytest.raises(ConfigError, match="data.train: elsewhere/train.jsonl: no such file"):
        make_plan(recipe_of(tmp_path, recipe), tmp_path)


def test_shared_stages_are_one_job(tmp_path, data):
    plan = make_plan(recipe_of(tmp_path, content(data)), tmp_path / "out")
    trainings = [job for job in plan.jobs.values() if job.name == "train"]
    assert len(trainings) == 2 * 4, "stage 1 once a seed, and three times stage 2"
    assert plan.models["gram", 1] != plan.models["gram", 2] != plan.models["plain", 2]
    stage1 = next(job for job in trainings if job.command[1] == "pretrain" and "--seed 1" in str(job))
    assert stage1.users == ["gram", "plain"]
    assert [stage1.id in job.needs for job in trainings if "--seed 1" in str(job)] == [False, True, True, False]
    places = {name: place for place, name in enumerate(plan.jobs)}
    assert all(places[needed] < places[job.id] for job in plan.jobs.values() for needed in job.needs)
    assert {job.name for job in plan.needed_for(("v1",)).values()} == {
        "tokenizer", "train", "convert", plan.evaluations[plan.models["v1", 1]].name
    }  # fmt: skip
    assert len(plan.needed_for(("v1",))) == 1 + 2 * 3


@pytest.mark.parametrize(
    "path, value, same",
    [
        ("title", "Another", True),
        ("sections", [], True),
        ("data.test.where", {"kind": "days"}, True),  # what is measured is no part of a training
        ("stages.stage1.flags", {"lr": 1e-3}, False),
        ("data.train.rows", 40, False),
        ("tokenizer.vocab_size", 600, False),
    ],
)
def test_names_of_folders_follow_what_a_training_depends_on(path, value, same, tmp_path, data):
    before, after = (
        make_plan(recipe_of(tmp_path, recipe), tmp_path).models["gram", 1]
        for recipe in (content(data), changed(content(data), path, value))
    )
    assert (before == after) == same


def test_a_changed_file_is_another_training(tmp_path, data):
    for file in ("train.jsonl", "test.jsonl", "candidates.jsonl"):
        (tmp_path / file).write_text((data / file).read_text())
    recipe = recipe_of(tmp_path, content(tmp_path))
    elsewhere = make_plan(recipe_of(tmp_path, content(data)), tmp_path).models
    before = make_plan(recipe, tmp_path).models
    assert before == elsewhere, "the same content elsewhere is the same training"
    with open(tmp_path / "train.jsonl", "a") as handle:
        handle.write(json.dumps(next(demo.pairs(1, 9, False))) + "\n")
    assert not set(make_plan(recipe, tmp_path).models.values()) & set(before.values())


def test_selections(tmp_path, data):
    def rows(**fields):
        prepare(DataSet("x", (str(data / "train.jsonl"),), **fields), tmp_path / "x.jsonl")
        return [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]

    everything = rows()
    few, more = rows(rows=10), rows(rows=30)
    assert (len(everything), len(few), len(more)) == (60, 10, 30)
    assert all(row in more for row in few) and few != rows(rows=10, seed=1)
    assert {row["kind"] for row in rows(where={"kind": ["days"]})} == {"days"}
    with pytest.raises(ConfigError, match="data.x: 61 rows wanted, but 60 match"):
        rows(rows=61)


def runs_of(folder) -> list[str]:
    return (folder / "runs").read_text().split()


def test_a_failure_takes_along_only_what_needs_it(tmp_path):
    jobs = shell_jobs(
        tmp_path,
        {
            "good": ("true", ()),
            "bad": ("echo first; echo error: disk is full; echo last; exit 3", ()),
            "after-bad": ("true", ("bad",)),
            "after-that": ("true", ("after-bad",)),
            "after-good": (f"test -f {tmp_path}/good.done.json", ("good",)),
        },
    )
    said = []
    runner = Runner(jobs, 2, said.append)
    runner.run()
    assert sorted(runs_of(tmp_path)) == ["after-good", "bad", "good"]
    reasons = {name.partition("/")[2]: reason for name, reason in runner.failed.items()}
    assert "exit status 3: error: disk is full" in reasons["bad"] and str(tmp_path / "bad.log") in reasons["bad"]
    assert reasons["after-bad"] == "needs: bad" and reasons["after-that"] == "needs: after-bad" and len(reasons) == 3
    assert any(line.startswith("FAILED bad") for line in said) and any("ETA" in line for line in said)

    mended = shell_jobs(tmp_path, {"good": ("true", ()), "bad": ("true", ()), "after-bad": ("true", ("bad",))})
    again = Runner(mended, 1, said.append)
    again.run()
    assert not again.failed and runs_of(tmp_path)[3:] == ["bad", "after-bad"], "what was done is not done again"


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL], ids=["terminated", "killed"])
def test_a_killed_run_goes_on(kill, tmp_path):
    script = textwrap.dedent(
        """
        import signal, sys
        from pathlib import Path
        from gram_engine.reproduce.runner import Runner, alone_in
        from tests.shell_jobs import shell_jobs
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        folder = Path(sys.argv[1])
        with alone_in(folder) as lock:
            Runner(shell_jobs(folder, {"one": ("true", ()), "two": ("exec sleep 60", ("one",))}), lock=lock).run()
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], start_new_session=True)
    try:
        wait_for(lambda: (tmp_path / "runs").is_file() and "two" in runs_of(tmp_path))
        process.send_signal(kill)
        process.wait(timeout=60)
        if kill == signal.SIGKILL:  # its command lives on, and is in the way
            with pytest.raises(ConfigError, match="a command that a killed one has left, works here"), alone_in(tmp_path):
                pass
            os.killpg(process.pid, signal.SIGKILL)
        wait_for(lambda: not group_lives(process.pid))
    finally:
        if group_lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    runner = Runner(shell_jobs(tmp_path, {"one": ("true", ()), "two": ("true", ("one",))}), 1, lambda _: None)
    with alone_in(tmp_path):
        runner.run()
    assert runs_of(tmp_path) == ["one", "two", "two"] and not runner.failed


def wait_for(condition, seconds: float = 100) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def group_lives(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def test_unknown_flags_are_refused_before_anything_runs(tmp_path, data):
    recipe = changed(content(data), "variants.v1", [{"stage": "stage2", "flags": {"label_smothing": 0}}])
    recipe = changed(recipe, "variants.plain", ["stage1", {"stage": "stage2", "flags": {"lr": "high"}}])
    plan = make_plan(recipe_of(tmp_path, recipe), tmp_path)
    problems = refused(plan.jobs.values())
    told = {plan.jobs[name].users[0]: reason for name, reason in problems.items()}
    assert set(told) == {"v1", "plain"} and len(problems) == 4
    assert "--label-smothing" in told["v1"] and "--lr" in told["plain"]


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
        "a": {"known": Scores((1, 2, 3), better, 1.0, 0.5)},
        "b": {"known": Scores((1, 2, 3), correct, 1.0, 0.5)},
        "c": {"known": Scores((3, 4), correct[[2, 0]], 1.0, 0.5)},
        "d": {"known": Scores((5,), correct[:1], 1.0, 0.5)},
    }
    results = Results(scores)
    found = results.difference("a", "b", ["known"])
    assert found.mean == pytest.approx((better - correct).mean()) and found.low > 0, "clear, though both are near one half"
    assert results.difference("a", "c", ["known"]).mean == pytest.approx((better - correct)[2].mean()), "the common seed"
    assert results.difference("a", "d", ["known"]) is None and results.accuracy("a", ["letters"]) is None


def test_orders_and_verdicts():
    assert kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6) and kendall_tau([1, 2], [2, 1]) == -1
    clear, unclear = Estimate(0.1, 0.05, 0.15), Estimate(0.1, -0.05, 0.25)
    assert [verdict(paper, ours) for paper in (2.0, -2.0) for ours in (clear, unclear)] == [
        "agrees", "same direction, within chance", "contradicts", "other direction, within chance"
    ]  # fmt: skip


def test_published_figures_are_percentages_of_known_columns():
    for published in PUBLISHED.values():
        for row in [*published.rows.values(), published.best]:
            assert set(row) <= set(COLUMNS)
            assert all(abs(value) <= 100 for value in row.values())
    assert PUBLISHED["table-1-8b"].rows["GRAM"] == {"in": 70.4, "out": 85.1, "hhh": 85.4}


def test_report_sets_figures_beside_the_papers(tmp_path, data):
    recipe = recipe_of(tmp_path, content(data))
    plan = make_plan(recipe, tmp_path / "out")
    right = lambda share: np.tile((np.arange(200) < 200 * share).astype(float), (2, 1))  # noqa: E731
    measured = {
        name: {"known": Scores((1, 2), right(known), 0.9, 0.5), "letters": Scores((1, 2), right(letters), 0.8, 0.4)}
        for name, known, letters in (("gram", 0.7, 0.9), ("v1", 0.72, 0.6))
    }
    results = Results(measured, {"known": 0.5, "letters": 0.6}, {"known": 200, "letters": 200})
    parts, smoothing = (compare(section, recipe, results) for section in recipe.sections)
    (claim,) = [claim for claim in parts["claims"] if claim["paper"]]
    assert (claim["column"], claim["paper"], claim["verdict"]) == ("out of distribution", -3.9, "agrees")
    assert claim["ours"]["mean"] == pytest.approx(-0.3)
    assert [row["figures"][0] and row["figures"][0]["mean"] for row in smoothing["rows"]] == [None, pytest.approx(0.7)]
    assert smoothing["rows"][1]["paper"] == [None, 85.1] and smoothing["lines"] == [], "one point is no line"

    evil = {next(iter(plan.jobs)): "<script>alert(1)</script>"}
    write_report(plan, results, evil, "gram reproduce")
    page, text = (tmp_path / "out/report.html").read_text(), (tmp_path / "out/report.md").read_text()
    assert not re.search(r"(src|href)=['\"](?!data:)", page), "the page needs nothing from elsewhere"
    assert "<script>alert" not in page and "&lt;script&gt;" in page
    for told in (
        "Ours agree: GRAM-v1 against GRAM (out of distribution)",
        "Not measured: plain",
        "| GRAM-v1 | 0.720 (",
        "-30.0 (-",
        "| known | in distribution | 200 | 0.500 |",
        "What the figures do not show",
        "The paper: Table 4. The text names the drop of v1",
    ):
        assert told in text, told
    assert (tmp_path / "out/plots/section-1-out-of-distribution.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["variants"]["gram"]["sets"]["letters"]["by_seed"] == {"1": 0.9, "2": 0.9}
    assert report["failed"] == {"tokenizer": "<script>alert(1)</script>"}


@pytest.mark.parametrize("name", ["tiny", "paper_small", "paper_8b"])
def test_shipped_recipes_make_plans(name, tmp_path, data):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    for file in ("train/preferences", "test/in_distribution", "test/hhh_alignment", "test/human_chat", "test/pandalm"):
        path = tmp_path / f"{file}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}\n")
    variables = {"tiny": {"data": str(data)}, "paper_small": {"data": str(tmp_path)}}.get(name)
    if variables is None:
        declared = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["variables"]
        variables = {variable: str(tmp_path / "rows.jsonl") for variable in declared}
    recipe = load_recipe(RECIPES / f"{name}.yaml", variables)
    plan = make_plan(recipe, tmp_path / "out")
    reported = {row for section in recipe.sections for row in section.rows.values()}
    reported |= {variant for section in recipe.sections for line in section.series.values() for variant in line.values()}
    assert reported | {"numbers"} >= set(recipe.variants), "every variant is in a section"
    for section in recipe.sections:
        known, shown = set(PUBLISHED[section.published].rows if section.published else {}), set(section.rows)
        assert not shown or known <= shown or (name == "tiny" and shown <= known), f"{section.title}: labels are the paper's"
    if name == "tiny" or hasattr(TrainingConfig, "freeze"):
        assert not refused(plan.jobs.values())


def test_paper_recipe_holds_the_papers_settings(tmp_path):
    declared = yaml.safe_load((RECIPES / "paper_8b.yaml").read_text())["variables"]
    recipe = load_recipe(RECIPES / "paper_8b.yaml", dict.fromkeys(declared, "x"))
    first, second = recipe.variants["gram"].stages
    assert (first.flags["lr"], second.flags["lr"], second.flags["label_smoothing"]) == (2e-5, 1e-5, 0.1)
    assert all(stage.flags["global_batch_size"] == 256 and stage.flags["train_epochs"] == 1 for stage in (first, second))
    assert first.flags["load_hf"] == "x" and "load_hf" not in second.flags


@pytest.mark.timeout(900)
def test_a_whole_run(tmp_path, data, capfd):
    """Two variants that share stage 1; every figure of the report comes from commands that really ran."""
    recipe = changed(content(data), "seeds", [1])
    recipe["variants"] = {"gram": ["stage1", "stage2"], "v2": ["stage1"]}
    recipe["sections"] = [{"title": "Parts", "rows": {"GRAM": "gram", "GRAM-v2": "v2"}, "reference": "GRAM"}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    words = ["--recipe", str(tmp_path / "recipe.yaml"), "--output-dir", str(tmp_path / "out"), "--jobs", "2"]
    command.main([*words, "--dry-run"])
    assert "8 jobs, 2 trainings, 2 variants, 1 seeds" in capfd.readouterr().out and not (tmp_path / "out").exists()

    command.main(words)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["jobs"]["done"] == 8 and not report["failed"] and not report["not_measured"]
    assert report["sets"]["letters"]["pairs"] == 6 and report["sets"]["known"]["pairs"] == 12
    folder = Path(report["variants"]["gram"]["folders"]["1"])
    (scored,) = folder.glob("evaluate-*/report.json")
    own = report["variants"]["gram"]["sets"]
    mean = (12 * own["known"]["mean"] + 6 * own["letters"]["mean"]) / 18
    assert mean == pytest.approx(json.loads(scored.read_text())["all"]["accuracy"])
    assert len(report["best_of_n"]["gram"]["1"]) == 4
    marks = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.done.json")}
    assert len(marks) == 8
    command.main(words)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.done.json")} == marks
    assert "8 jobs, 8 of them done already" in capfd.readouterr().out
