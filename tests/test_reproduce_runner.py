"""The runner of a reproduction's jobs: failures, kills, going on; and a whole run."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml

from gram_engine.errors import ConfigError
from gram_engine.reproduce import command
from gram_engine.reproduce.runner import Runner, exclusive_lock
from gram_engine.training.stopping import LEAVING
from tests.support.recipe_lab import changed, content, demonstration
from tests.support.shell_jobs import shell_jobs


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


def test_echo_shows_commands_and_training_steps(tmp_path):
    jobs = shell_jobs(tmp_path, {"train": ("echo 'step 1/2 | loss 3 | a | b | c | d'; echo other", ())})
    said = []
    Runner(jobs, 1, said.append, echo=True).run()
    (job,) = jobs.values()
    assert said[1:3] == [f"train\n    $ {job}", "    step 1/2 | loss 3 | a | b | c"] and said[3].startswith("[1/1] train: 0 s")
    assert job.log.read_text() == "step 1/2 | loss 3 | a | b | c | d\nother\n"


def test_a_training_that_left_early_is_not_done(tmp_path):
    """On SIGTERM a trainer saves and exits with 0, and a cluster's manager sends it to trainers and runner alike."""
    left = f"received SIGTERM: {LEAVING} 3/9, saved"
    jobs = shell_jobs(tmp_path, {"train": (f"echo '{left}'", ()), "convert": ("true", ("train",))})
    runner = Runner(jobs, 1, lambda _: None)
    runner.run()
    assert runner.failed == {
        f"{tmp_path.name}/train": f"{left}. Rerun the command to resume.", f"{tmp_path.name}/convert": "needs: train"
    }  # fmt: skip
    again = Runner(shell_jobs(tmp_path, {"train": ("true", ()), "convert": ("true", ("train",))}), 1, lambda _: None)
    again.run()
    assert not again.failed and runs_of(tmp_path) == ["train", "train", "convert"]


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL], ids=["terminated", "killed"])
def test_a_killed_run_goes_on(kill, tmp_path):
    script = textwrap.dedent(
        """
        import signal, sys
        from pathlib import Path
        from gram_engine.reproduce.runner import Runner, exclusive_lock
        from tests.support.shell_jobs import shell_jobs
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        folder = Path(sys.argv[1])
        with exclusive_lock(folder) as lock:
            Runner(shell_jobs(folder, {"one": ("true", ()), "two": ("exec sleep 60", ("one",))}), lock=lock).run()
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], start_new_session=True)
    try:
        wait_for(lambda: (tmp_path / "runs").is_file() and "two" in runs_of(tmp_path))
        process.send_signal(kill)
        process.wait(timeout=60)
        if kill == signal.SIGKILL:  # its command lives on, and is in the way
            with pytest.raises(ConfigError, match="a killed run has left behind, works here"), exclusive_lock(tmp_path):
                pass
            os.killpg(process.pid, signal.SIGKILL)
        wait_for(lambda: not group_lives(process.pid))
    finally:
        if group_lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    runner = Runner(shell_jobs(tmp_path, {"one": ("true", ()), "two": ("true", ("one",))}), 1, lambda _: None)
    with exclusive_lock(tmp_path):
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


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_whole_run(tmp_path, capfd):
    """Two variants that share stage 1; every figure of the report comes from commands that really ran."""
    recipe = changed(content(demonstration(tmp_path / "demo")), "seeds", [1])
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
