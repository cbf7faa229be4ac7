"""Recipes: their faults, the jobs that they mean, shared stages, selections of data, and those that we ship."""

import json
from pathlib import Path

import pytest
import yaml

from gram_engine.data import demo
from gram_engine.errors import ConfigError
from gram_engine.reproduce.data import prepare
from gram_engine.reproduce.jobs import make_jobs
from gram_engine.reproduce.paper import PUBLISHED
from gram_engine.reproduce.recipe import DataSet, load_recipe
from gram_engine.reproduce.runner import refused
from tests.support.recipe_lab import changed, content, demonstration, recipe_of

RECIPES = Path(__file__).resolve().parents[1] / "examples" / "recipes"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return demonstration(tmp_path_factory.mktemp("demo"))


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
        make_jobs(recipe_of(tmp_path, recipe), tmp_path)


def test_shared_stages_are_one_job(tmp_path, data):
    graph = make_jobs(recipe_of(tmp_path, content(data)), tmp_path / "out")
    trainings = [job for job in graph.jobs.values() if job.name == "train"]
    assert len(trainings) == 2 * 4, "stage 1 once a seed, and three times stage 2"
    assert graph.models["gram", 1] != graph.models["gram", 2] != graph.models["plain", 2]
    stage1 = next(job for job in trainings if job.command[1] == "pretrain" and "--seed 1" in str(job))
    assert stage1.users == ["gram", "plain"]
    assert [stage1.id in job.needs for job in trainings if "--seed 1" in str(job)] == [False, True, True, False]
    places = {name: place for place, name in enumerate(graph.jobs)}
    assert all(places[needed] < places[job.id] for job in graph.jobs.values() for needed in job.needs)
    assert {job.name for job in graph.needed_for(("v1",)).values()} == {
        "tokenizer", "train", "convert", graph.evaluations[graph.models["v1", 1]].name
    }  # fmt: skip
    assert len(graph.needed_for(("v1",))) == 1 + 2 * 3


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
        make_jobs(recipe_of(tmp_path, recipe), tmp_path).models["gram", 1]
        for recipe in (content(data), changed(content(data), path, value))
    )
    assert (before == after) == same


def test_a_changed_file_is_another_training(tmp_path, data):
    for file in ("train.jsonl", "test.jsonl", "candidates.jsonl"):
        (tmp_path / file).write_text((data / file).read_text())
    recipe = recipe_of(tmp_path, content(tmp_path))
    elsewhere = make_jobs(recipe_of(tmp_path, content(data)), tmp_path).models
    before = make_jobs(recipe, tmp_path).models
    assert before == elsewhere, "the same content elsewhere is the same training"
    with open(tmp_path / "train.jsonl", "a") as handle:
        handle.write(json.dumps(next(demo.pairs(1, 9, False))) + "\n")
    assert not set(make_jobs(recipe, tmp_path).models.values()) & set(before.values())


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


def test_unknown_flags_are_refused_before_anything_runs(tmp_path, data):
    recipe = changed(content(data), "variants.v1", [{"stage": "stage2", "flags": {"label_smothing": 0}}])
    recipe = changed(recipe, "variants.plain", ["stage1", {"stage": "stage2", "flags": {"lr": "high"}}])
    graph = make_jobs(recipe_of(tmp_path, recipe), tmp_path)
    problems = refused(graph.jobs.values())
    told = {graph.jobs[name].users[0]: reason for name, reason in problems.items()}
    assert set(told) == {"v1", "plain"} and len(problems) == 4
    assert "--label-smothing" in told["v1"] and "--lr" in told["plain"]


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
    graph = make_jobs(recipe, tmp_path / "out")
    reported = {row for section in recipe.sections for row in section.rows.values()}
    reported |= {variant for section in recipe.sections for line in section.series.values() for variant in line.values()}
    assert reported | {"numbers"} >= set(recipe.variants), "every variant is in a section"
    for section in recipe.sections:
        known, shown = set(PUBLISHED[section.published].rows if section.published else {}), set(section.rows)
        assert not shown or known <= shown or (name == "tiny" and shown <= known), f"{section.title}: labels are the paper's"
    assert not refused(graph.jobs.values())


def test_paper_recipe_holds_the_papers_settings(tmp_path):
    declared = yaml.safe_load((RECIPES / "paper_8b.yaml").read_text())["variables"]
    recipe = load_recipe(RECIPES / "paper_8b.yaml", dict.fromkeys(declared, "x"))
    first, second = recipe.variants["gram"].stages
    assert (first.flags["lr"], second.flags["lr"], second.flags["label_smoothing"]) == (2e-5, 1e-5, 0.1)
    assert all(stage.flags["global_batch_size"] == 256 and stage.flags["train_epochs"] == 1 for stage in (first, second))
    assert first.flags["load_hf"] == "x" and "load_hf" not in second.flags
