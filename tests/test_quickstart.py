"""The quickstart's steps on a user's own files, two training steps a stage; that it learns is `make quickstart`'s to show."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gram_engine.data import demo
from gram_engine.files import write_json
from gram_engine.reproduce.quickstart import QuickstartConfig, forget_other_runs, make_jobs

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.timeout(600)
@pytest.mark.long
def test_own_data_goes_all_the_way_to_a_report(tmp_path):
    train, test = demo.write(demo.DemoConfig(output_dir=str(tmp_path), train_pairs=40, test_pairs=8))
    for stage in ("stage1", "stage2"):
        (tmp_path / f"short-{stage}.yaml").write_text("model: tiny\nseq_length: 512\ntrain_iters: 2\nglobal_batch_size: 4\n")
    command = [sys.executable, "-m", "gram_engine.reproduce.quickstart", "--data", train, "--eval-data", test]
    command += ["--nproc-per-node", 1]
    command += ["--settings", tmp_path / "short", "--vocab-size", 600, "--output-dir", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {"accuracy_before", "accuracy_after", "swap_consistency", "seconds", "commands"} <= report.keys()
    assert report["held_out"]["stage2"]["pairs"] == 8
    assert (tmp_path / "out/stage2-hf/config.json").is_file()


def test_training_data_without_held_out_data_is_refused():
    command = [sys.executable, "-m", "gram_engine.reproduce.quickstart", "--data", "pairs.jsonl"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--data and --eval-data go together" in done.stderr


def test_only_an_interrupted_run_with_the_same_flags_and_files_resumes(tmp_path):
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    pairs.write_text("{}\n")
    given = dict(data=(str(pairs),), eval_data="test.jsonl", nproc_per_node=1, output_dir=str(out))

    def done(**flags) -> bool:
        """Whether the first job still counts as done when the command is given (again)."""
        config = QuickstartConfig(**given, **flags)
        job = next(iter(make_jobs(config).values()))
        forget_other_runs(config, {job.id: job})
        kept = job.done
        write_json(job.mark, {})
        return kept

    assert not done() and done()
    assert not done(seed=1) and done(seed=1)
    pairs.write_text("{}\n{}\n")
    assert not done(seed=1) and done(seed=1)
    write_json(out / "report.json", {})
    assert not done(seed=1) and not (out / "report.json").exists()
