"""What a user sees for bad input: the exact message, once, and exit status 2."""

import contextlib
import io
import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest

from gram_engine import cli
from tests.conftest import TEMPLATE
from tests.support.pool import run_alone

GOOD = {"prompt": "say yes", "chosen": "yes", "rejected": "no"}


def run(*arguments, **environment):
    """(exit status, output) of the gram command in a process of its own."""
    return run_alone(gram, [*map(str, arguments)], environment)


def gram(arguments, environment):
    os.environ.update(environment)
    cli.main([*arguments, "--device", "cpu"])


def write_rows(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def preprocess(data, tiny_data, tmp_path, *extra):
    """(exit status, output) of `gram preprocess`, called here."""
    arguments = [
        "preprocess", "--data", data, "--output-prefix", tmp_path / "out", "--tokenizer-model", tiny_data["tokenizer"],
        "--template", TEMPLATE, "--seq-length", "192", *extra,
    ]  # fmt: skip
    output, status = io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            cli.main([*map(str, arguments)])
        except SystemExit as end:
            status = end.code
    return status, output.getvalue()


@pytest.mark.parametrize(
    "rows, message",
    [
        (['{"prompt": '], "pairs.jsonl:2: not valid JSON: .* Write one JSON object a line."),
        ([{"prompt": "x", "chosen": "y"}], "pairs.jsonl:2: field 'rejected' is missing beside 'chosen'. Add it,"),
        ([{"prompt": "x", "chosen": "y", "rejected": "y"}], "pairs.jsonl:2: 'chosen' and 'rejected' are equal."),
        ([{"prompt": "x", "chosen": " ", "rejected": "y"}], "pairs.jsonl:2: 'chosen' is empty. Fill it in, or remove"),
        ([{"prompt": "x", "response_a": "y", "response_b": "z"}], "pairs.jsonl:2: no label, which pair-preference needs."),
    ],
    ids=["broken-json", "missing-field", "equal-responses", "empty-response", "no-label"],
)
def test_bad_rows_are_named_with_file_and_line(rows, message, tiny_data, tmp_path):
    status, output = preprocess(write_rows(tmp_path / "pairs.jsonl", GOOD, *rows), tiny_data, tmp_path)
    assert status == 2 and re.search(message, output), output
    assert "Traceback" not in output and not list(tmp_path.glob("out*"))


def test_bad_rows_can_be_skipped_and_are_kept_aside(tiny_data, tmp_path):
    data = write_rows(tmp_path / "pairs.jsonl", GOOD, "{", {"prompt": "x"}, GOOD)
    status, output = preprocess(data, tiny_data, tmp_path, "--skip-bad-rows")
    assert status == 0 and "2 rows -> 2 samples" in output and "2 rejected" in output
    assert len((tmp_path / "out.rejects.jsonl").read_text().splitlines()) == 2


def test_missing_file(tiny_data, tmp_path):
    status, output = preprocess(tmp_path / "nowhere.jsonl", tiny_data, tmp_path)
    assert status == 2 and "nowhere.jsonl: no such file. Check the path" in output


def test_seq_length_too_short_for_the_template(tiny_data, tmp_path):
    data = write_rows(tmp_path / "pairs.jsonl", GOOD)
    status, output = preprocess(data, tiny_data, tmp_path, "--seq-length", "40")
    assert status == 2
    assert re.search(r"--seq-length 40 is too short for the template: .* Use --seq-length \d+ or more.", output)


def test_label_that_is_no_single_token(tiny_data, tmp_path):
    template = Path(TEMPLATE).read_text().replace("label_a: A", "label_a: Assistant number one")
    (tmp_path / "template.yaml").write_text(template)
    data = write_rows(tmp_path / "pairs.jsonl", GOOD)
    status, output = preprocess(data, tiny_data, tmp_path, "--template", tmp_path / "template.yaml")
    assert status == 2 and "Assistant number one" in output and "token" in output, output


def test_tensor_parallel_size_that_does_not_divide_the_heads(tiny_data):
    status, output = run(
        "finetune", "--model", "tiny", "--tensor-model-parallel-size", "3", "--data-path", tiny_data["stage2"],
        "--tokenizer-model", tiny_data["tokenizer"], "--train-iters", "1", WORLD_SIZE="3",
    )  # fmt: skip
    assert status == 2
    assert "error: --tensor-model-parallel-size 3 does not divide the 4 attention heads. Use a divisor of 4." in output


def test_checkpoint_of_another_shape(tiny_data, tmp_path):
    common = ["--data-path", tiny_data["stage2"], "--tokenizer-model", tiny_data["tokenizer"], "--seq-length", "192"]
    common += ["--global-batch-size", "4", "--train-iters", "1"]
    status, output = run("finetune", "--model", "tiny", *common, "--save", tmp_path / "run")
    assert status == 0, output
    status, output = run("finetune", "--model", "tiny", "--num-layers", "4", *common, "--load", tmp_path / "run")
    assert status == 2 and "Traceback" not in output
    assert re.search(r"error: .*iter_0000001: saved with --num-layers 2, this run has 4. Use the checkpoint's", output)
    status, output = run("finetune", "--model", "tiny", *common, "--pretrained-checkpoint", tmp_path / "nothing")
    assert status == 2 and re.search("nothing: no checkpoint here", output)


def test_data_of_the_other_stage_is_refused(tiny_data):
    status, output = run(
        "finetune", "--model", "tiny", "--data-path", tiny_data["stage1"], "--tokenizer-model", tiny_data["tokenizer"],
        "--train-iters", "1",
    )  # fmt: skip
    assert status == 2 and "made for --objective response-lm, this run's is pair-preference" in output


def output_that_nobody_reads(command, *arguments):
    """Call command(*arguments), with standard output into a pipe whose reader has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    command(*arguments)


def script(name, *arguments):
    sys.argv = [name, *arguments]
    runpy.run_path(str(Path(__file__).parents[1] / "tools" / name), run_name="__main__")


@pytest.mark.parametrize(
    "command, arguments",
    [(cli.main, (["finetune", "--help"],)), (cli.main, (["--help"],)), (script, ("score.py", "--help"))],
    ids=["gram finetune --help", "gram --help", "tools/score.py --help"],
)
def test_a_reader_that_ends_early_ends_the_command_silently(command, arguments):
    status, output = run_alone(output_that_nobody_reads, command, *arguments)
    assert (status, output) == (cli.READER_IS_GONE, "")


def lost_connection():
    raise BrokenPipeError("a server went away")


def test_any_other_broken_pipe_stays_an_error():
    status, output = run_alone(cli.run, lost_connection)
    assert status == 1 and "a server went away" in output
