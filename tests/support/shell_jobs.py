"""Jobs of shell commands, for tests of the runner."""

from pathlib import Path

from gram_engine.reproduce.jobs import Job


def shell_jobs(folder: Path, scripts: dict[str, tuple[str, tuple[str, ...]]]) -> dict[str, Job]:
    """Jobs of shell commands: name -> (script, names of what it needs). Each run leaves a line in the file `runs`."""
    jobs = {}
    for name, (script, needs) in scripts.items():
        words = ("sh", "-c", f"echo {name} >> {folder}/runs; {script}")
        jobs[f"{folder.name}/{name}"] = Job(name, name, name, [], folder, words, tuple(f"{folder.name}/{n}" for n in needs))
    return jobs
