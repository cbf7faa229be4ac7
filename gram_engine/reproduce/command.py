"""`gram reproduce`: the paper's comparison, from a recipe to a report."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

import tyro

from gram_engine.config.parse import fail
from gram_engine.errors import ConfigError, GramError
from gram_engine.reproduce.collect import collect
from gram_engine.reproduce.jobs import JobGraph
from gram_engine.reproduce.recipe import load_recipe
from gram_engine.reproduce.report import write_report
from gram_engine.reproduce.runner import Runner, exclusive_lock, exit_on_signals, flag_problems


@dataclass
class ReproduceArguments:
    """Train and measure every variant of a recipe, and compare the results with the paper's.

    After an interruption or a failure, rerun the command to resume: finished jobs are not run again.
    """

    recipe: str
    """YAML file, such as examples/recipes/paper_small.yaml."""
    output_dir: Optional[str] = None
    """Folder for everything; default: runs/NAME-OF-THE-RECIPE."""
    variables: Annotated[tuple[str, ...], tyro.conf.arg(name="set")] = ()
    """NAME=VALUE ...: the recipe's variables, such as the folder of the data."""
    only: tuple[str, ...] = ()
    """Variants to run; default: all. The report also shows finished results of the others."""
    jobs: int = 1
    """Commands that run side by side; they share the processors."""
    dry_run: bool = False
    """List the jobs and their commands, and run nothing."""


def main(argv: list[str] | None = None) -> None:
    """Command line of `gram reproduce`."""
    words = sys.argv[1:] if argv is None else argv
    arguments = tyro.cli(ReproduceArguments, args=words, prog="gram reproduce")
    exit_on_signals()
    try:
        failed = reproduce(arguments, shlex.join(["gram", "reproduce", *words]))
    except GramError as error:
        fail(error)
    if failed:
        raise SystemExit(1)


def reproduce(arguments: ReproduceArguments, command: str) -> dict[str, str]:
    """Run a recipe and write its report; returns failed job -> reason.

    Raises:
        ConfigError: the recipe or a flag is wrong, or another run works in the folder.
        DataError: a row of the data cannot be used.
    """
    if arguments.jobs < 1:
        raise ConfigError(f"--jobs {arguments.jobs} must be at least 1.")
    recipe = load_recipe(arguments.recipe, _variables(arguments.variables))
    graph = JobGraph(recipe, Path(arguments.output_dir or f"runs/{Path(arguments.recipe).stem}"))
    jobs = graph.needed_for(arguments.only) if arguments.only else graph.jobs
    if arguments.dry_run:
        _list(graph, jobs)
        return {}
    with exclusive_lock(graph.out) as lock:
        graph.write_data()
        runner = Runner(jobs, arguments.jobs, lambda line: print(line, flush=True), lock)
        runner.run()
        print(f"report: {write_report(graph, collect(graph), runner.failed, command)}")
    return runner.failed


def _list(graph: JobGraph, jobs: dict) -> None:
    problems = flag_problems(jobs.values())
    for job in jobs.values():
        state = "done" if job.done else f"REFUSED, {problems[job.id]}" if job.id in problems else "to do"
        print(f"{state}: {job.title}\n    $ {job}")
    trained = sum(job.name == "train" for job in jobs.values())
    print(f"{len(jobs)} jobs, {trained} trainings, {len(graph.recipe.variants)} variants, {len(graph.recipe.seeds)} seeds")


def _variables(given: tuple[str, ...]) -> dict[str, str]:
    for word in given:
        if "=" not in word:
            raise ConfigError(f"--set {word}: must be NAME=VALUE.")
    return dict(word.split("=", 1) for word in given)
