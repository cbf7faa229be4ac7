"""Recipes: their faults, the jobs that they mean, shared stages, selections of data, and those that we ship."""

import json
from pathlib import Path

import pytest
import yaml

from gram_engine.config.parse import parse
from gram_engine.data import demo
from gram_engine.errors import ConfigError
from gram_engine.reproduce.jobs import JobGraph, write_selection
from gram_engine.reproduce.paper import PUBLISHED
from gram_engine.reproduce.recipe import DataSet, load_recipe
from gram_engine.reproduce.runner import flag_problems
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
        ("data.few", 3, "data.few: must be a valid dictionary, not 3"),
        ("seeds", [1, 1], r"the recipe: seeds \[1, 1\] must differ from each other"),
        ("seeds", 3, "seeds: must be a valid list, not 3"),
        ("seeds", [1, True], "seeds.1: must be a valid integer, not True"),
        ("data.few.rows", 0, "data.few.rows: must be greater than 0, not 0"),
        ("data.few.files", [], r"data.few.files: must have at least 1 item, not \[\]"),
        ("data.few.row", 3, "data.few: unknown key 'row'. Did you mean 'rows'?"),
        ("data.a b", {"files": ["x"]}, "data.a b.name: the name 'a b' must be letters"),
        ("evaluation.known.kind", "inside", "evaluation.known.kind: must be 'in', 'out', 'hhh' or 'task', not 'inside'"),
        ("stages.stage1.data", "trian", "stages.stage1.data: 'trian' is not among data .* Did you mean 'train'?"),
        ("stages.stage1.command", "train", "stages.stage1.command: must be 'pretrain' or 'finetune', not 'train'"),
        ("stages.stage2.flags", {"save": "x"}, "stages.stage2.flags.save: gram reproduce sets this flag itself. Remove it"),
        ("flags.tokenizer_model", "x", "flags.tokenizer_model: gram reproduce sets this flag itself"),
        ("flags.lr", {"a": 1}, "flags.lr: no flag takes {'a': 1}. Give a number, text"),
        ("variants.gram", ["stage3"], r"variants.gram.stages.0.stage: 'stage3' is not among stages \(stage1, stage2\)"),
        ("variants.gram", [], r"variants.gram.stages: must have at least 1 item, not \[\]"),
        ("variants.gram", {"stages": ["stage1"], "evaluate": ["x"]}, "variants.gram.evaluate.0: 'x' is not among evaluation"),
        ("sections.0.rows", {"GRAM": "grm"}, "sections.0.rows.GRAM: 'grm' is not among variants .* Did you mean 'gram'?"),
        ("sections.0.reference", "v9", r"sections.0: 'v9' is not among its rows \(GRAM, GRAM-v1\)"),
        ("sections.0.published", "table-9", "sections.0: 'table-9' is not among the paper's results"),
        ("sections.0.series", {"a": {0: "gram"}}, "sections.0: give either rows or series"),
        ("sections.1.series", {"a": {"x": "gram"}}, "sections.1.series.a.x: must be a valid number, not 'x'"),
        ("best_of_n.variants", ["x"], "best_of_n.variants.0: 'x' is not among variants"),
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
    assert found.data["train"].files == ["here/train.jsonl"]
    with pytest.raises(ConfigError, match="--set dat=...: the recipe has no such variable. Did you mean 'data'?"):
        recipe_of(tmp_path, recipe, dat="here")
    with pytest.raises(ConfigError, match="'data' has no value. Give it: --set data=VALUE"):
        recipe_of(tmp_path, {**recipe, "variables": {"data": None}})
    with pytest.raises(ConfigError, match="data.train: elsewhere/train.jsonl: no such file"):
        JobGraph(recipe_of(tmp_path, recipe), tmp_path)


def test_shared_stages_are_one_job(tmp_path, data):
    graph = JobGraph(recipe_of(tmp_path, content(data)), tmp_path / "out")
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
        JobGraph(recipe_of(tmp_path, recipe), tmp_path).models["gram", 1]
        for recipe in (content(data), changed(content(data), path, value))
    )
    assert (before == after) == same


def test_a_changed_file_is_another_training(tmp_path, data):
    for file in ("train.jsonl", "test.jsonl", "candidates.jsonl"):
        (tmp_path / file).write_text((data / file).read_text())
    recipe = recipe_of(tmp_path, content(tmp_path))
    elsewhere = JobGraph(recipe_of(tmp_path, content(data)), tmp_path).models
    before = JobGraph(recipe, tmp_path).models
    assert before == elsewhere, "the same content elsewhere is the same training"
    with open(tmp_path / "train.jsonl", "a") as handle:
        handle.write(json.dumps(next(demo.pairs(1, 9, False))) + "\n")
    assert not set(JobGraph(recipe, tmp_path).models.values()) & set(before.values())


def test_selections(tmp_path, data):
    def rows(**fields):
        write_selection(DataSet(name="x", files=[str(data / "train.jsonl")], **fields), tmp_path / "x.jsonl")
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
    graph = JobGraph(recipe_of(tmp_path, recipe), tmp_path)
    problems = flag_problems(graph.jobs.values())
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
        variables = {variable: str(tmp_path / "rows.jsonl") for variable, default in declared.items() if default is None}
    recipe = load_recipe(RECIPES / f"{name}.yaml", variables)
    graph = JobGraph(recipe, tmp_path / "out")
    reported = {row for section in recipe.sections for row in section.rows.values()}
    reported |= {variant for section in recipe.sections for line in section.series.values() for variant in line.values()}
    assert reported | {"numbers"} >= set(recipe.variants), "every variant is in a section"
    for section in recipe.sections:
        known, shown = set(PUBLISHED[section.published].rows if section.published else {}), set(section.rows)
        assert not shown or known <= shown or (name == "tiny" and shown <= known), f"{section.title}: labels are the paper's"
    assert not flag_problems(graph.jobs.values())


def test_paper_recipe_takes_the_papers_settings_from_the_configurations(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    declared = yaml.safe_load((RECIPES / "paper_8b.yaml").read_text())["variables"]
    variables = {name: str(tmp_path / "rows.jsonl") for name, default in declared.items() if default is None}
    graph = JobGraph(load_recipe(RECIPES / "paper_8b.yaml", variables), tmp_path)
    configs = {job.task: parse(list(job.trainer_flags)) for job in graph.jobs.values() if job.users[:1] == ["gram"]}
    first, second = (configs[f"train {stage}, seed 1234"] for stage in ("stage1", "stage2"))
    assert (first.training.lr, second.training.lr, second.training.label_smoothing) == (2e-5, 1e-5, 0.1)
    assert all(one.training.global_batch_size == 256 and one.training.train_epochs == 1 for one in (first, second))
    assert (first.model.load_hf, second.model.load_hf) == (variables["model"], None)
