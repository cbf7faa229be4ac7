"""`gram compare`: figures by hand-made verdicts, paired intervals on simulated data, what is refused, and real evaluations."""

import json
import re

import numpy as np
import pytest

from gram_engine.errors import ConfigError, DataError
from gram_engine.evaluation import evaluate
from gram_engine.evaluation.compare import CompareArguments, compare_reports, main, read_reports
from gram_engine.evaluation.comparison import LONGER_WINS, compare
from gram_engine.evaluation.saved import FORMAT, line_of, pair_ids, read_evaluation
from gram_engine.evaluation.suites import SUITES, read_eval_pairs
from gram_engine.files import write_json
from gram_engine.metrics import reward_of_first
from gram_engine.scoring.scorer import PairScore
from tests.support.reward_folder import PAIRS


def write_evaluation(folder, model, rows, margins, name="mine.jsonl", suite="auto", limit=None):
    """A folder as `gram evaluate` writes it, with the given margins (given order, swapped) of the first `limit` pairs."""
    folder.mkdir(parents=True)
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite, pairs = read_eval_pairs([str(file)], suite)
    pairs = pairs[:limit]
    scores = [PairScore(float(reward_of_first(*own)), *map(float, own), False, tokens=10) for own in margins[: len(pairs)]]
    lines = [line_of(*one) for one in zip(pairs, pair_ids(pairs), scores, strict=True)]
    (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = {"format": FORMAT, "suite": SUITES[suite].title, "model": model, "kind": "pairwise", "files": [str(file)]}
    write_json(folder / "report.json", report | {"pairs_judged": len(pairs), "seconds": 2.0, "pairs_timed": len(pairs)})
    return str(folder)


def rows_of(count, longer_is_better=lambda number: number % 2 == 0):
    return [
        {"prompt": f"{n}", "chosen": "a" * (5 + 3 * longer_is_better(n)), "rejected": "b" * 6, "id": n} for n in range(count)
    ]


def verdicts(correct):
    """Margins of a judge that is consistently right or wrong, with a reward of .88 for its choice."""
    towards = np.where(correct, 2.0, -2.0)
    return np.stack([towards, -towards], axis=1)


def figures_of(folders, baseline=None, title="mine"):
    return compare(read_reports(folders), baseline)["sets"][title]["models"]


def test_figures_worked_out_by_hand(tmp_path):
    rows = rows_of(8, lambda n: n < 6)  # the better response is longer in six pairs, shorter in two
    correct = np.array([1, 1, 1, 1, 1, 0, 1, 0], dtype=bool)
    margins = verdicts(correct)
    margins[0] = (3.0, 1.0)  # A in both orders, more surely where A is right
    good = write_evaluation(tmp_path / "good", "runs/good", rows, margins)
    bad = write_evaluation(tmp_path / "bad", "runs/bad", rows, verdicts(~correct))
    found = figures_of([good, bad], "bad")["good"]
    assert found["accuracy"]["mean"] == 6 / 8 and found["difference"]["mean"] == pytest.approx(6 / 8 - 2 / 8)
    assert found["swap_consistency"] == 7 / 8 and found["prefers_a"] == 9 / 16
    assert (found["accuracy_longer"], found["accuracy_shorter"]) == (pytest.approx(5 / 6), 1 / 2)
    assert found["length_controlled"]["mean"] == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert (found["seconds_per_pair"], found["tokens_per_pair"], found["shortened"]) == (2 / 8, 10, 0)
    even = reward_of_first(3.0, 1.0)
    sure = 1 / (1 + np.exp(-2.0))
    assert found["ece"] == pytest.approx((1 * (1 - even) + 7 * abs(sure - 5 / 7)) / 8)


def test_longer_wins_needs_no_report_of_its_own(tmp_path):
    rows = [*rows_of(30, lambda n: n < 21), {"prompt": "x", "chosen": "same", "rejected": "size", "id": 30}]
    found = figures_of([write_evaluation(tmp_path / "one", "runs/one", rows, verdicts(np.ones(31, bool)))])[LONGER_WINS]
    assert found["accuracy"]["mean"] == pytest.approx(21.5 / 31), "equal lengths count half"
    assert (found["accuracy_longer"], found["accuracy_shorter"]) == (1.0, 0.0)
    assert found["length_controlled"] == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_a_model_that_ignores_length_keeps_its_accuracy_under_control(tmp_path):
    rows = rows_of(4000, lambda n: n % 10 < 8)
    correct = np.random.default_rng(0).random(4000) < 0.7
    found = figures_of([write_evaluation(tmp_path / "one", "runs/one", rows, verdicts(correct))])["one"]
    assert found["length_controlled"]["mean"] == pytest.approx(found["accuracy"]["mean"], abs=0.02)
    inside = found["length_controlled"]["high"] - found["length_controlled"]["low"]
    by_hand = 1.96 * np.sqrt(sum(0.7 * 0.3 / count for count in (3200, 800))) / 2  # of the mean of two independent shares
    assert inside == pytest.approx(2 * by_hand, rel=0.1)


def test_a_model_does_not_differ_from_itself_nor_by_the_order_of_reports(tmp_path):
    rows, rng = rows_of(60), np.random.default_rng(1)
    folders = [
        write_evaluation(
            tmp_path / name / suite, f"runs/{name}", rows[start:], verdicts(rng.random(60) < skill), f"{suite}.jsonl"
        )
        for name, skill in (("a", 0.9), ("b", 0.6))
        for suite, start in (("first", 0), ("second", 20))
    ]
    twin = [f"twin={tmp_path / 'a' / suite}" for suite in ("first", "second")]
    content = compare(read_reports([*folders, *twin]), "a")
    zero = {"mean": 0.0, "low": 0.0, "high": 0.0, "clear": False}
    assert content["mean"]["difference"]["twin"] == zero
    assert all(one["models"]["twin"]["difference"] == zero for one in content["sets"].values())
    assert list(content["models"]) == ["a", "twin", "b"] and content["mean"]["difference"]["b"]["clear"]
    again = compare(read_reports([*twin[::-1], *folders[::-1]]), "a")
    assert json.dumps(again) == json.dumps(content)
    own = [one["models"]["b"]["accuracy"]["mean"] for one in content["sets"].values()]
    assert own[0] != own[1] and content["mean"]["accuracy"]["b"]["mean"] == pytest.approx(np.mean(own))
    swapped = compare(read_reports(folders), "b")["mean"]["difference"]["a"]
    forth = compare(read_reports(folders), "a")["mean"]["difference"]["b"]
    assert [swapped["mean"], swapped["low"], swapped["high"]] == pytest.approx([-forth["mean"], -forth["high"], -forth["low"]])


def test_the_best_model_is_the_baseline_unless_another_is_named(tmp_path):
    rows = rows_of(40)
    folders = [
        write_evaluation(tmp_path / name, f"runs/{name}", rows, verdicts(np.arange(40) < right))
        for name, right in (("z", 35), ("a", 20))
    ]
    assert compare(read_reports(folders))["baseline"] == "z"
    assert compare(read_reports(folders), LONGER_WINS)["baseline"] == LONGER_WINS
    assert compare(read_reports(folders[:1]))["baseline"] == LONGER_WINS
    with pytest.raises(ConfigError, match="--baseline x: no such model. Choose among z, a, longer wins"):
        compare(read_reports(folders), "x")


def test_only_pairs_that_all_models_judged_count(tmp_path):
    rows = rows_of(50)
    correct = np.arange(50) % 5 > 0
    whole = write_evaluation(tmp_path / "whole", "runs/whole", rows, verdicts(correct))
    part = write_evaluation(tmp_path / "part", "runs/part", rows, verdicts(correct), limit=20)
    output = tmp_path / "out"
    content = compare_reports(CompareArguments(reports=(whole, part), output_dir=str(output)))
    one = content["sets"]["mine"]
    assert (one["pairs"], one["pairs_judged"]) == (20, {"part": 20, "whole": 50})
    assert one["models"]["whole"]["accuracy"]["mean"] == one["models"]["part"]["accuracy"]["mean"] == 16 / 20
    assert "Only these 20 pairs were judged by all models" in (output / "comparison.md").read_text()
    changed = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]  # the other label
    other = write_evaluation(tmp_path / "other", "runs/other", changed, verdicts(correct))
    with pytest.raises(DataError, match="mine: no pair was judged by all models .*Evaluate them on the same files"):
        compare(read_reports([whole, other]))


def rm_bench_rows(count):
    return [
        {"prompt": f"{n}", "chosen": ["a", "aa", "aaa"], "rejected": ["b", "bb", "bbb"], "domain": domain, "id": f"{domain}{n}"}
        for n, domain in enumerate(["chat", "math"] * (count // 2))
    ]


def test_a_suites_own_figures_and_rows_of_several_pairs(tmp_path):
    rows, rng = rm_bench_rows(40), np.random.default_rng(0)
    right = np.repeat(rng.random(40) < 0.7, 9)  # all nine pairs of a row are right, or all are wrong
    folder = write_evaluation(tmp_path / "one", "runs/one", rows, verdicts(right))
    content = compare(read_reports([folder]))
    one = content["sets"]["RM-Bench"]
    own, saved = one["models"]["one"], read_evaluation(folder)
    assert own["figures"] == SUITES["rm-bench"].figures(saved.judged) and list(own["figures"])[0] == "overall"
    assert one["models"][LONGER_WINS]["figures"]["easy"] == 1.0, "here the plainer style is shorter"
    assert (one["pairs"], one["rows"]) == (360, 40)
    low, high = own["accuracy"]["low"], own["accuracy"]["high"]
    share = right.mean()
    assert (high - low) == pytest.approx(2 * 1.96 * np.sqrt(share * (1 - share) / 40), rel=0.1), "40 rows, not 360 pairs"
    difference = own["difference"]  # to longer wins, which has the same share of every row
    assert difference["high"] - difference["low"] == pytest.approx(high - low, rel=0.15)
    short = write_evaluation(tmp_path / "short", "runs/short", rows, verdicts(right), limit=22)  # cuts the third row
    assert compare(read_reports([folder, short]))["sets"]["RM-Bench"]["pairs"] == 18, "rows that both judged whole"


def test_reward_bench_2_is_read_back_with_its_best_of_four(tmp_path):
    row = {"prompt": "x", "num_correct": 1, "subset": "Focus", "chosen": ["aaaa"], "rejected": ["b", "cc", "ddd"]}
    ties = {**row, "subset": "Ties", "num_correct": 2, "chosen": ["aaaa", "aaaaa"], "rejected": ["b"]}
    rows = [{**row, "id": "1"}, {**ties, "id": "ref:0"}, {**ties, "id": "tied:0"}]
    margins = np.random.default_rng(0).normal(size=(12, 2)) + (1, -1)
    folder = write_evaluation(tmp_path / "one", "runs/one", rows, margins)
    found = compare(read_reports([folder]))["sets"]["RewardBench 2"]
    pairs = read_eval_pairs([str(tmp_path / "one/mine.jsonl")], "auto")[1]
    from gram_engine.evaluation.pairs import JudgedPairs

    wanted = SUITES["reward-bench-2"].figures(JudgedPairs(pairs, margins, "wrong"))
    assert found["models"]["one"]["figures"] == wanted and {"Focus", "Ties"} < set(wanted)
    assert found["models"][LONGER_WINS]["figures"]["Focus"] == 1.0 and (found["pairs"], found["ties"]) == (7, 5)


def test_equal_pairs_and_rows_on_one_line_are_told_apart(tmp_path):
    rows = [*rows_of(3), *rows_of(2)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    pairs = read_eval_pairs([str(tmp_path / "rows.json")], "pairs")[1]
    ids = list(pair_ids(pairs))
    assert len(set(ids)) == 5 and ids[3] == f"{ids[0]}-2" and [pair.row for pair in pairs] == [0, 1, 2, 3, 4]


def damaged(folder, name, change):
    path = folder / name
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: (folder / "report.json").unlink(), "no report.json there. Give folders that `gram evaluate"),
        (
            lambda folder: (folder / "report.json").rename(folder / "scores.jsonl.partial"),
            "no report.json there. The evaluation did not end: rerun its command",
        ),
        (
            lambda folder: (folder / "scores.jsonl").unlink(),
            "no scores.jsonl. Evaluate again: gram evaluate .*mine.jsonl --model",
        ),
        (
            lambda folder: damaged(folder, "report.json", lambda text: text.replace('"format"', '"other"')),
            "of an older version, .*reads format 1. Evaluate again: gram evaluate .* --output-dir",
        ),
        (
            lambda folder: damaged(folder, "report.json", lambda text: text.replace('"format": 1', '"format": 9')),
            "format 9; this",
        ),
        (lambda folder: damaged(folder, "report.json", lambda text: text[:30]), "not valid JSON"),
        (lambda folder: damaged(folder, "report.json", lambda text: text.replace("Pairs", "Pears")), "was changed"),
        (lambda folder: damaged(folder, "scores.jsonl", lambda text: text[:-30]), r"scores.jsonl:8: not a line"),
        (
            lambda folder: damaged(folder, "scores.jsonl", lambda text: text.replace("length_a", "a", 1)),
            r"scores.jsonl:1: .*KeyError\('length_a'\)",
        ),
        (
            lambda folder: damaged(folder, "scores.jsonl", lambda text: text[: text.rindex("\n", 0, -1) + 1]),
            "7 lines, but report.json tells of 8 pairs",
        ),
    ],
)
def test_folders_that_cannot_be_read_are_named(change, message, tmp_path):
    write_evaluation(tmp_path / "one", "runs/one", rows_of(8), verdicts(np.ones(8, bool)))
    change(tmp_path / "one")
    with pytest.raises(DataError, match=f"{tmp_path}/one.*{message}"):
        read_evaluation(tmp_path / "one")


def test_names(tmp_path):
    rows, margins = rows_of(8), verdicts(np.ones(8, bool))
    one = write_evaluation(tmp_path / "one", "runs/one/hf", rows, margins)
    two = write_evaluation(tmp_path / "two", "runs/two/hf", rows, margins)
    again = write_evaluation(tmp_path / "again", "runs/one/hf", rows, margins)
    letters = write_evaluation(tmp_path / "letters", "runs/one/hf", rows, margins, "letters.jsonl")
    assert {name: set(own) for name, own in read_reports([one, letters, f"b={two}"]).items()} == {
        "hf": {"mine", "letters"},
        "b": {"mine"},
    }
    with pytest.raises(ConfigError, match="runs/two/hf and runs/one/hf would both be called 'hf'. Name them: NAME="):
        read_reports([one, two])
    with pytest.raises(ConfigError, match="both tell of the model 'hf' on mine. Leave one out, or name them: NAME="):
        read_reports([one, again])
    with pytest.raises(ConfigError, match="name or folder is empty. Write NAME=FOLDER"):
        read_reports([f"={one}"])
    with pytest.raises(ConfigError, match="'chance' is the name of a row of every comparison"):
        read_reports([f"chance={one}"])
    with pytest.raises(ConfigError, match="no report to compare"):
        read_reports([])


def test_models_without_a_common_test_set(tmp_path):
    rows, margins = rows_of(8), verdicts(np.ones(8, bool))
    one = write_evaluation(tmp_path / "one", "runs/one", rows, margins)
    two = write_evaluation(tmp_path / "two", "runs/two", rows, margins, "letters.jsonl")
    with pytest.raises(ConfigError, match=r"no test set was judged by all models \(one: mine; two: letters\)"):
        compare(read_reports([one, two]))
    with pytest.raises(ConfigError, match=r"--baseline one: has no test set in common with two \("):
        compare(read_reports([one, two]), "one")
    both = write_evaluation(tmp_path / "both", "runs/one", rows, margins, "letters.jsonl")
    content = compare(read_reports([one, two, both]), "one")
    assert content["mean"]["sets"] == ["letters"] and "two" not in content["sets"]["mine"]["models"]
    ties = [{"prompt": "x", "response_a": "a", "response_b": "b", "label": "tie"}]
    with pytest.raises(DataError, match="all 1 common pairs are labelled as ties"):
        compare(read_reports([write_evaluation(tmp_path / "ties", "runs/t", ties, margins[:1])]))


def test_real_evaluations_side_by_side(folder, scorer, tmp_path, capsys):
    """Two real models on two files, from `gram evaluate` to the page."""
    evil = "<script>alert(1)</script>$\\frac$|"
    rows = [{"prompt": prompt, "chosen": a, "rejected": b} for prompt, a, b in PAIRS]
    for name, own in (("first", rows), ("second", rows[:4])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
        for model, dtype in (("full", "float32"), ("half", "bfloat16")):
            flags = ["--model", str(folder), "--dtype", dtype, "--output-dir", str(tmp_path / model / name)]
            evaluate.main([str(tmp_path / f"{name}.jsonl"), *flags])
    report = json.loads((tmp_path / "full/first/report.json").read_text())
    texts = [scorer.template.judge(*one) for prompt, a, b in PAIRS for one in ((prompt, a, b), (prompt, b, a))]
    assert report["tokens"] == sum(len(scorer.tokenizer.hf(text).input_ids) for text in texts)
    assert report["seconds"] > 0 and (report["pairs_timed"], report["kind"]) == (7, "pairwise")
    capsys.readouterr()
    reports = [
        f"{name}={tmp_path / model / file}"
        for name, model in (("full", "full"), (evil, "half"))
        for file in ("first", "second")
    ]
    main([*reports, "--output-dir", str(tmp_path / "out"), "--baseline", "full"])
    printed = capsys.readouterr().out
    assert "longer wins" in printed and "comparison.html" in printed and "chance" in printed
    content = json.loads((tmp_path / "out/comparison.json").read_text())
    assert content["sets"]["first"]["models"]["full"]["accuracy"]["mean"] == report["all"]["accuracy"]
    assert content["sets"]["first"]["models"][LONGER_WINS]["accuracy"]["mean"] == pytest.approx(report["all"]["longer_wins"])
    page = (tmp_path / "out/comparison.html").read_text()
    assert not re.search(r"(src|href)=['\"](?!data:)", page), "the page needs nothing from elsewhere"
    assert evil not in page and page.count("<img") == 6
    assert {path.name for path in (tmp_path / "out/plots").iterdir()} == {
        f"{number}-{kind}.png" for number in (1, 2) for kind in ("accuracy", "length", "reliability")
    }


def test_a_damaged_folder_ends_the_command_with_its_remedy(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), "--output-dir", str(tmp_path / "out")])
    assert ended.value.code == 2 and "no report.json there" in capsys.readouterr().err and not (tmp_path / "out").exists()
