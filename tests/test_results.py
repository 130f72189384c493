"""README.md and docs/ say what docs/results.json holds: tables, figures, and the numbers in running text."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from unittest.mock import MagicMock

import pytest
from conftest import ROOT, read_jsonl

from playground import compare, world

RESULTS = json.loads((ROOT / "docs" / "results.json").read_text())
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def test_every_table_is_what_the_runs_say(tmp_path, monkeypatch):
    """The report is made anew from results.json: not a byte of any page changes, and every figure is there."""
    (tmp_path / "docs").mkdir()
    for page in PAGES:
        shutil.copy(ROOT / page, tmp_path / page)
    figures = []
    monkeypatch.setattr(compare, "figure", lambda path, *_, **how: figures.append(path.name))
    compare.report(RESULTS, tmp_path)
    for page in PAGES:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), page
    shown = "\n".join((ROOT / page).read_text() for page in PAGES)
    for name in figures:
        assert (ROOT / "docs" / name).stat().st_size > 1000 and name in shown
    assert {path.name for path in (ROOT / "docs").glob("*.svg")} == set(figures)


def test_a_changed_result_changes_the_tables(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    for page in PAGES:
        shutil.copy(ROOT / page, tmp_path / page)
    monkeypatch.setattr(compare, "figure", lambda *_, **how: None)
    changed = json.loads(json.dumps(RESULTS))
    changed["adpa"]["runs"][0]["reward_after"] -= 0.2
    compare.report(changed, tmp_path)
    different = {
        page for page in PAGES if (tmp_path / page).read_text() != (ROOT / page).read_text()
    }
    assert different == {"README.md", "docs/adpa.md", "docs/results.md"}


def test_a_report_of_one_seed_has_no_intervals(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    for page in PAGES:
        shutil.copy(ROOT / page, tmp_path / page)
    drawn, figures = MagicMock(), []  # axes: matplotlib is no requirement of the tests
    monkeypatch.setattr(
        compare, "figure", lambda path, draw, title, *_, **how: figures.append((title, draw(drawn)))
    )
    compare.report(
        {name: {**entry, "runs": entry["runs"][:1]} for name, entry in RESULTS.items()}, tmp_path
    )
    assert "Reward after distillation, 1 seed" in dict(figures) and len(figures) == 6
    intervals = [
        call.kwargs.get("xerr", call.kwargs.get("yerr")) for call in drawn.errorbar.call_args_list
    ]
    assert len(intervals) > 20 and {
        str(value) for value in intervals if not isinstance(value, list)
    } == {"0.0"}
    assert (
        f"| DCKD | {RESULTS['dckd']['runs'][0]['reward_after']:.3f} | "
        in (tmp_path / "README.md").read_text()
    )


def test_every_run_is_there_with_every_seed_and_the_command_that_made_it():
    assert RESULTS.keys() == compare.RUNS.keys()
    for name, entry in RESULTS.items():
        assert entry["command"] == f"python {compare.RUNS[name]}"
        assert [run["seed"] for run in entry["runs"]] == [1, 2, 3, 4, 5]
        assert {run["torch"] for run in entry["runs"]} == {
            run["torch"] for run in RESULTS["adpa"]["runs"]
        }


def test_the_claims_are_at_least_the_papers_twelve():
    methods = {"ADPA", "PAD", "DPKD", "RM-Distiller"}
    assert len(compare.CLAIMS) >= 12
    assert (
        {claim[0] for claim in compare.CLAIMS}
        == {claim[0] for claim in compare.RELEASED}
        == methods
    )
    page = (ROOT / "docs" / "results.md").read_text()
    for _, text, *_ in compare.CLAIMS + compare.RELEASED:
        assert text in page


def test_the_sign_flip_test_counts_all_patterns():
    assert compare.sign_flip_test([1, 2, 3, 4, 5]) == 1 / 32
    assert compare.sign_flip_test([-1, -2, -3]) == 1
    assert (
        compare.sign_flip_test([1.0, -1.0]) == 3 / 4
    )  # (+,−) and (−,+) have the mean 0 as well; (+,+) a larger one
    assert compare.sign_flip_test([3.0, -1.0]) == 2 / 4


def test_means_have_standard_errors():
    assert (
        compare.mean_and_error([1.0, 2.0, 3.0])
        == f"2.000 ± {statistics.stdev([1, 2, 3]) / 3**0.5:.3f}"
    )
    assert compare.mean_and_error([0.25], 2) == "0.25"


def test_a_run_waits_for_what_it_needs_and_everything_is_known():
    order = list(compare.RUNS)
    for name, command in compare.RUNS.items():
        for needed in compare.needs(command):
            assert order.index(needed) < order.index(name)
        script = re.match(r"(?:-m )?([\w.]+)", command)[1].removesuffix(".py")
        assert (ROOT / f"{script.replace('.', '/')}.py").exists()
    used = {name for rows in compare.TABLES.values() for name in rows.values()} | set(
        compare.REWARD_MODELS.values()
    )
    used |= {name for claim in [*compare.CLAIMS, *compare.RELEASED] for name in claim[2:4]}
    assert used - {"student", "teacher"} <= set(order)


def test_the_quality_of_scores_is_measured_inside_a_prompt(tmp_path):
    """Two prompts whose scores order the answers rightly, at different heights, and one with equal answers."""
    prompts = ["Name two fish.", "Name two birds."]
    answers = [
        ["cod and carp. Enjoy!", "cod and carp.", "cod."],
        ["owl and crow. Enjoy!", "owl and crow.", "owl."],
    ]
    rows = []
    for prompt, texts, height in zip(prompts, answers, (0.0, -7.0)):
        chat = [{"role": "user", "content": prompt}]
        worth = world.reward([chat] * 3, texts)
        assert worth[0] > worth[1] > worth[2]
        scores = [height + 2 * value for value in worth]
        row = {"prompt": chat, "answers": [{"text": text} for text in texts], "score": scores}
        rows.append(
            row | {"average_logp": [-value for value in worth], "judgement": [0.9, 0.3, 0.1]}
        )
    same = rows[0] | {"answers": [{"text": "cod."}] * 3, "score": [9.0, 5.0, 1.0]}
    (tmp_path / "scores_1.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, same])
    )
    found = compare.score_quality(tmp_path)
    assert len(read_jsonl(tmp_path / "scores_1.jsonl")) == 3
    assert found["score/correlation"] == pytest.approx(1) and found[
        "average_logp/correlation"
    ] == pytest.approx(-1)
    first, second = (
        world.reward([row["prompt"]] * 3, [a["text"] for a in row["answers"]]) for row in rows
    )
    assert found["score/spread"] == pytest.approx(first[0] - first[2] + second[0] - second[2])
    assert found["score/favourite"] == pytest.approx((first[0] + second[0]) / 2)
    assert found["average_logp/favourite"] == pytest.approx((first[2] + second[2]) / 2)
    assert 0.7 < found["judgement/correlation"] < 1


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_runs_are_made_after_what_they_need_and_nobody_waits_without_reason(
    at_once, tmp_path, monkeypatch
):
    """`c` needs the long `a`; a second worker makes `d` and `e` in the meantime."""
    runs = {"a": "a.py", "c": "c.py {a}/model", "d": "d.py", "e": "e.py {file:d}"}
    monkeypatch.setattr(compare, "RUNS", runs)
    began, ended = [], []

    def execute(name, seed, folder):
        began.append((name, seed))
        time.sleep(0.3 if name == "a" else 0.01)
        ended.append((name, seed))

    monkeypatch.setattr(compare, "execute", execute)
    compare.execute_all(list(runs), range(1, 3), tmp_path, at_once)
    assert (
        sorted(began) == sorted((name, seed) for name in runs for seed in (1, 2)) == sorted(ended)
    )
    if at_once == 1:
        assert began == [(name, seed) for seed in (1, 2) for name in runs]
    else:
        assert began.index(("d", 1)) < ended.index(("a", 1)) + 2 and ended.index(
            ("e", 1)
        ) < ended.index(("c", 1))
    for seed in (1, 2):
        for first, second in (("a", "c"), ("d", "e")):
            assert ended.index((first, seed)) < ended.index((second, seed))


def test_a_run_that_fails_ends_all_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RUNS", {"a": "a.py", "b": "b.py {a}"})
    monkeypatch.setattr(compare, "execute", lambda *_: sys.exit("a failed"))
    with pytest.raises(SystemExit, match="a failed"):
        compare.execute_all(["a", "b"], range(1, 3), tmp_path, 2)


def test_a_run_is_what_its_command_does_and_is_not_made_again(tmp_path, monkeypatch):
    flags = "--data playground/data/test.jsonl --max_steps 2 --eval_prompts 4"
    runs = {
        "a": f"dckd.py {flags}",
        "b": f"-m playground.baselines --loss dpo {flags} --student {{a}}/model",
    }
    monkeypatch.setattr(compare, "RUNS", runs | {"c": "dckd.py --student {b}/none"})
    compare.execute_all(["a", "b"], range(3, 4), tmp_path, 2)
    made = {
        path: path.stat().st_mtime_ns
        for name in "ab"
        for path in (tmp_path / f"{name}__3").rglob("*.*")
    }
    assert len(made) > 20
    compare.execute_all(["a", "b"], range(3, 4), tmp_path, 2)
    assert made == {path: path.stat().st_mtime_ns for path in made}
    flags_of_b = json.loads((tmp_path / "b__3/args.json").read_text())
    assert [flags_of_b[name] for name in ("student", "loss", "seed")] == [
        str(tmp_path / "a__3/model"),
        "dpo",
        3,
    ]
    assert "reward_after" in (tmp_path / "a__3.log").read_text()  # what a terminal would show

    words = [
        sys.executable,
        *runs["a"].split(),
        "--seed",
        "3",
        "--output_dir",
        str(tmp_path / "own"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert (
        subprocess.run(
            words, cwd=ROOT, env=environment, capture_output=True, timeout=300
        ).returncode
        == 0
    )
    weights = [
        (tmp_path / run / "model/model.safetensors").read_bytes() for run in ("a__3", "own", "b__3")
    ]
    assert weights[0] == weights[1] != weights[2]

    with pytest.raises(SystemExit, match=r"c with seed 3 failed: see .*c__3\.log"):
        compare.execute("c", 3, tmp_path)
    assert "error: cannot load" in (tmp_path / "c__3.log").read_text()
