"""studies/compare.py: pages and figures say what docs/results.json holds; how runs are made."""

import copy
import html
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from conftest import ROOT, one_error_line, write_jsonl

from playground import world
from studies import compare
from studies.released import VARIANTS

RESULTS = json.loads((ROOT / "docs" / "results.json").read_text())
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


class FakeFigures:
    """Takes the place of `compare.figure`, because matplotlib is no requirement of the tests."""

    def __init__(self):
        self.names = []
        self.titles = []
        self.axes = MagicMock()
        self.axes.get_legend_handles_labels.return_value = ([], [])

    @contextmanager
    def figure(self, path: Path, *, title: str, panels: int = 1, height: float = 3.6):
        self.names.append(path.name)
        self.titles.append(title)
        yield self.axes if panels == 1 else [self.axes] * panels


@pytest.fixture
def figures(monkeypatch) -> FakeFigures:
    fake = FakeFigures()
    monkeypatch.setattr(compare, "figure", fake.figure)
    monkeypatch.setattr(compare, "label_points", MagicMock())
    return fake


@pytest.fixture
def pages(tmp_path) -> Path:
    """A folder with copies of all pages."""
    (tmp_path / "docs").mkdir()
    for page in PAGES:
        shutil.copy(ROOT / page, tmp_path / page)
    return tmp_path


# ----------------------------------------------------------------------------- the committed report
def test_every_table_is_what_the_runs_say(pages, figures):
    """The report is made anew from results.json: not a byte of any page changes, and every figure
    is there."""
    compare.report(RESULTS, pages)
    for page in PAGES:
        assert (pages / page).read_text() == (ROOT / page).read_text(), page
    shown = "\n".join((ROOT / page).read_text() for page in PAGES)
    for name, title in zip(figures.names, figures.titles, strict=True):
        drawn = (ROOT / "docs" / name).read_text()
        assert f"<dc:title>{html.escape(title, quote=False)}</dc:title>" in drawn
        assert f"{name})" in shown
    assert {path.name for path in (ROOT / "docs").glob("*.svg")} == set(figures.names)


LABEL = r'<text style="([^"]*)" x="([-\d.]+)" y="([-\d.]+)"[^>]*>([^<]*)</text>'


def texts_of(figure: str) -> list[tuple]:
    """(text, left, top, right, bottom) of the labels in a figure. A letter is at most 0.62 of the
    font's size wide, in the mean of these words."""
    found = []
    for style, x, y, text in re.findall(LABEL, figure):
        text = html.unescape(text)
        size = float(re.search(r"font-size: ([\d.]+)px", style)[1])
        width = 0.62 * size * len(text)
        left = float(x)
        if "text-anchor: end" in style:
            left -= width
        found.append((text, left, float(y) - 0.75 * size, left + width, float(y)))
    return found


def test_the_picture_of_the_readme_has_a_label_for_every_row_and_none_covers_another():
    figure = (ROOT / "docs/reward_over_time.svg").read_text()
    rows = {**compare.FIVE, **compare.BASELINES}
    wanted = set(compare.measured_rows(RESULTS, rows)) | {"teacher", "best possible"}
    labels = [box for box in texts_of(figure) if box[0] in wanted]
    assert {text for text, *_ in labels} == wanted
    for text, left, top, right, bottom in labels:
        for other, other_left, other_top, other_right, other_bottom in labels:
            beside = right <= other_left or other_right <= left
            apart = bottom <= other_top or other_bottom <= top
            assert text == other or beside or apart, (text, other)


def with_rewards(**rewards: list[float]) -> dict:
    results = {}
    for name, numbers in rewards.items():
        results[name] = {"runs": [{"reward_after": y, "seconds": 10.0} for y in numbers]}
    return results


def test_the_title_of_the_picture_follows_from_the_numbers():
    """ADPA+ takes 20 seconds with its DCKD run, reverse KL 10."""
    methods = {"DCKD": "dckd", "ADPA+": "adpa_plus"}
    baselines = {"reverse KL": "reverse_kl"}
    low = with_rewards(dckd=[0.5, 0.5], adpa_plus=[0.7, 0.71], reverse_kl=[0.9, 0.91])
    assert compare.total_seconds(low, "adpa_plus") == 20
    title = compare.reward_over_time_title(low, methods, baselines)
    assert title == "Reverse KL: more reward than any of the methods,\nin less time than ADPA+"
    high = with_rewards(dckd=[0.5, 0.5], adpa_plus=[1.0, 1.01], reverse_kl=[0.9, 0.91])
    title = compare.reward_over_time_title(high, methods, baselines)
    assert title == "ADPA+: more reward than any of the baselines,\nin more time than reverse KL"
    equal = with_rewards(dckd=[0.5, 0.5], adpa_plus=[0.9, 0.8], reverse_kl=[0.8, 0.9])
    title = compare.reward_over_time_title(equal, methods, baselines)
    assert title.endswith("neither clearly more")


def test_a_figure_without_its_runs_is_neither_drawn_nor_linked(pages, figures):
    few = {name: RESULTS[name] for name in RESULTS if name not in ("dpkd_frozen", "adpa_gamma_4")}
    few = {name: entry for name, entry in few.items() if not name.startswith("adpa_gamma")}
    (pages / "docs/dpkd_frozen.svg").write_text("old")
    compare.report(few, pages)
    assert set(figures.names) == {"reward_over_time.svg", "rm_parts.svg"}
    assert not (pages / "docs/dpkd_frozen.svg").exists()
    for page in PAGES:
        text = (pages / page).read_text()
        assert "dpkd_frozen.svg" not in text and "gamma.svg" not in text


def test_a_changed_result_changes_the_tables(pages, figures):
    changed = copy.deepcopy(RESULTS)
    changed["adpa"]["runs"][0]["reward_after"] -= 0.2
    compare.report(changed, pages)
    different = set()
    for page in PAGES:
        if (pages / page).read_text() != (ROOT / page).read_text():
            different.add(page)
    assert different == {"README.md", "docs/adpa.md", "docs/results.md"}


def add_measured(results: dict, name: str, rewards: list[float]):
    """Results of a run, as `collect` makes them of a measured model."""
    runs = []
    for seed, reward in enumerate(rewards, 1):
        measured = {"responses": 4096, "prompts": 128, "reward": reward}
        run = {"seed": seed, "reward_after": reward, "seconds": 7.0, "measured": measured}
        run["curves"] = {"eval/reward": [[252, 100, reward]]}
        runs.append(run)
    results[name] = {"command": f"python {compare.RUNS[name]}", "runs": runs}


def test_a_row_without_results_is_left_out_and_comes_once_they_are_there(pages, figures):
    assert "AlignDistil" not in (pages / "README.md").read_text().split("## Which method")[0]
    more = copy.deepcopy(RESULTS)
    add_measured(more, "student", [0.6, 0.7, 0.6, 0.7, 0.6])
    add_measured(more, "kd_data", [0.9, 0.9, 0.9, 1.0, 0.9])
    add_measured(more, "teacher_ref", [0.5] * 5)
    add_measured(more, "dpo_large", [1.0, 1.1, 1.0, 1.1, 1.0])
    compare.report(more, pages)
    readme = (pages / "README.md").read_text()
    assert "| KD on the data's responses | 0.920 ± 0.020 |  | 7 |" in readme
    assert "| student, untrained | 0.640 ± 0.024 |" in readme
    results_page = (pages / "docs/results.md").read_text()
    assert "judged on 4,096 sampled responses to the 128 held-out requests" in results_page
    # The gain of the large model is 0.5 or 0.6, and that of the small one what it is.
    small = [run["reward_after"] for run in RESULTS["dpo_student"]["runs"]]
    gains = [after - before for after, before in zip(small, [0.6, 0.7, 0.6, 0.7, 0.6])]
    differences = [gain - other for gain, other in zip([0.5, 0.6, 0.5, 0.6, 0.5], gains)]
    lines = results_page.splitlines()
    [line] = [line for line in lines if line.startswith("| ADPA | DPO gains less")]
    assert f"| {statistics.mean(differences):+.3f} ± " in line


def test_reinforcement_learning_is_shown_from_what_is_there(pages, figures):
    """Two prices for the oracle, one for the full method, none for Bradley-Terry."""
    more = copy.deepcopy(RESULTS)
    for name, spent, reward in (
        ("rloo_oracle_0.1", 2.0, 1.0),
        ("rloo_oracle_1", 0.5, 0.9),
        ("rloo_rm_1", 4.0, 0.7),
    ):
        run = {"seed": 1, "reward_after": reward, "kl_spent": spent, "seconds": 7.0, "curves": {}}
        more[name] = {"command": f"python {compare.RUNS[name]}", "runs": [run]}
    compare.report(more, pages)
    assert "rloo.svg" in figures.names
    lines = [call.args for call in figures.axes.plot.call_args_list if "o-" in call.args]
    assert lines == [([2.0, 0.5], [1.0, 0.9], "o-"), ([4.0], [0.7], "o-")]
    page = (pages / "docs/results.md").read_text()
    assert "](rloo.svg)" in page
    _, _, rest = page.partition("<!-- results:rloo_table -->\n")
    assert rest.partition("\n<!-- /results -->")[0].splitlines() == [
        "| learned from | κ | KL spent, nats | oracle reward |",
        "| --- | --- | --- | --- |",
        "| the oracle | 0.1 | 2.00 | 1.000 |",
        "| the oracle | 1 | 0.50 | 0.900 |",
        "| full method | 1 | 4.00 | 0.700 |",
    ]


def test_reward_models_are_shown_with_their_kinds_and_the_best_of_8_where_it_was_measured():
    results = {}
    for name, accuracy in (("rm", 0.8), ("rm_bt_plain", 0.7), ("styles_rm", 0.6)):
        kinds = compare.STYLE_KINDS if name == "styles_rm" else compare.PAIR_KINDS
        run = {f"accuracy_after/{kind}": accuracy for kind in kinds}
        results[name] = {"runs": [{**run, "accuracy_after": accuracy}]}
    results["best_of_8_rm"] = {"runs": [{"best_of_n_reward": 1.05}]}

    table = compare.reward_model_table(results, compare.REWARD_MODELS, compare.PAIR_KINDS)

    assert table.splitlines() == [
        "|  | accuracy, all pairs | easy | hard | shifted | reward of best of 8 |",
        "| --- | --- | --- | --- | --- | --- |",
        "| Bradley-Terry, plain labels | 0.700 | 0.700 | 0.700 | 0.700 | – |",
        "| full method | 0.800 | 0.800 | 0.800 | 0.800 | 1.050 |",
    ]
    rows = compare.STYLED_REWARD_MODELS
    table = compare.reward_model_table(results, rows, compare.STYLE_KINDS)
    assert table.endswith("\n| full method | 0.600 | 0.600 | 0.600 | 0.600 |")
    assert compare.reward_model_table({}, rows, compare.STYLE_KINDS) == compare.NOT_MEASURED


def test_a_page_without_the_mark_is_named(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- results:other -->\n<!-- /results -->\n")
    with pytest.raises(SystemExit, match=r"page\.md has no mark results:one"):
        compare.replace_block(page, "one", "text")


def test_a_report_of_one_seed_has_no_intervals(pages, figures):
    one_seed = copy.deepcopy(RESULTS)
    for entry in one_seed.values():
        entry["runs"] = entry["runs"][:1]
    compare.report(one_seed, pages)
    assert len(figures.titles) == 4
    intervals = []
    for call in figures.axes.errorbar.call_args_list:
        interval = call.kwargs.get("xerr", call.kwargs.get("yerr"))
        intervals += interval if isinstance(interval, list) else [interval]
    assert len(intervals) >= 20
    assert set(intervals) == {0.0}
    reward = RESULTS["dckd"]["runs"][0]["reward_after"]
    assert f"| DCKD | {reward:.3f} | " in (pages / "README.md").read_text()


def test_a_run_that_starts_from_another_one_is_shown_with_its_cost_and_without_a_win_rate():
    """ADPA+ starts from DCKD's student. Its own win rate is against that one."""
    plus = statistics.median(run["seconds"] for run in RESULTS["adpa_plus"]["runs"])
    dckd = statistics.median(run["seconds"] for run in RESULTS["dckd"]["runs"])
    rewards = [run["reward_after"] for run in RESULTS["adpa_plus"]["runs"]]
    table = compare.reward_table(RESULTS, {"ADPA+": "adpa_plus", "SeqKD": "seqkd"})
    reward = compare.mean_and_error(rewards)
    _, _, row, seqkd = table.splitlines()
    assert row == f"| ADPA+ | {reward} |  | {plus:.0f} + {dckd:.0f} |"
    # A measured model has one against the untrained student's measured responses.
    measured = copy.deepcopy(RESULTS)
    for run in measured["adpa_plus"]["runs"]:
        run["measured"] = {}
        run["win_rate"] = 0.75
    table = compare.reward_table(measured, {"ADPA+": "adpa_plus"})
    assert f"| ADPA+ | {reward} | 0.75 ± 0.00 |" in table
    assert re.fullmatch(r"\| SeqKD \| \S+ ± \S+ \| \S+ ± \S+ \| \d+ \+ \d+ \|", seqkd)
    shown = compare.result_table({name: RESULTS[name] for name in ("dckd", "adpa_plus", "rm")})
    header, _, plus_line, rm_line = shown.splitlines()
    assert header.split()[:2] == ["reward", "before"]
    # It has no win rate against the untrained student, no accuracy and no best of n.
    assert plus_line.split()[-6:] == ["–", "–", "–", f"{plus:.0f}", "+", f"{dckd:.0f}"]
    accuracies = [run["accuracy_after"] for run in RESULTS["rm"]["runs"]]
    assert compare.mean_and_error(accuracies) in rm_line


def test_every_run_is_there_with_every_seed_and_the_command_that_made_it():
    assert RESULTS.keys() <= compare.RUNS.keys()
    torch_versions = {run["torch"] for run in RESULTS["adpa"]["runs"]}
    for name, entry in RESULTS.items():
        assert entry["command"] == f"python {compare.RUNS[name]}"
        assert [run["seed"] for run in entry["runs"]] == [1, 2, 3, 4, 5]
        assert {run["torch"] for run in entry["runs"]} == torch_versions


def test_the_claims_are_at_least_the_papers_twelve():
    methods = {"ADPA", "PAD", "DPKD", "RM-Distiller"}
    assert len(compare.CLAIMS) >= 12
    assert {claim.method for claim in compare.CLAIMS} == methods
    assert {claim.method for claim in compare.RELEASED} == methods
    page = (ROOT / "docs" / "results.md").read_text()
    for claim in compare.CLAIMS + compare.RELEASED:
        names = [claim.better, claim.worse, claim.better_from or "adpa", claim.worse_from or "adpa"]
        assert (claim.text in page) == compare.is_measured(RESULTS, *names)


# --------------------------------------------------------------------------------------- statistics
def t_density(x: float, degrees: int) -> float:
    scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    return scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2)


@pytest.mark.parametrize("degrees", [1, 2, 4, 9, 24])
def test_the_t_points_leave_a_fortieth_above_them(degrees):
    """Half of Student's t lies above 0. What is below the point is summed in small steps."""
    point = compare.T_POINTS[degrees - 1]
    steps = 20_000
    area = 0.0
    for step in range(steps):
        area += t_density((step + 0.5) * point / steps, degrees) * point / steps
    assert 0.5 - area == pytest.approx(0.025, abs=2e-5)


def test_an_interval_by_hand():
    """1, 2 and 3 have a standard error of 1/√3."""
    assert compare.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5)
    assert compare.half_width([2.0]) == math.inf
    assert compare.half_width([0.5] * 40) == 0


def test_a_claim_shows_or_its_opposite_does_or_neither():
    assert compare.verdict([1, 2, 3, 4, 5]) == "yes"
    assert compare.verdict([-1, -2, -3, -4, -5]) == "no: the opposite"
    assert compare.verdict([5, -4, 3, -2, 1]) == "not clearly"
    assert compare.verdict([1, 8]) == "not clearly"  # t is 12.7
    assert compare.verdict([3.0]) == "not clearly"


def test_means_have_standard_errors():
    error = statistics.stdev([1, 2, 3]) / 3**0.5
    assert compare.mean_and_error([1.0, 2.0, 3.0]) == f"2.000 ± {error:.3f}"
    assert compare.mean_and_error([0.25], digits=2) == "0.25"


# ----------------------------------------------------------------------------- what is read of runs
def test_a_run_waits_for_what_it_needs_and_everything_is_known():
    order = list(compare.RUNS)
    for name, command in compare.RUNS.items():
        for needed in compare.needs(command):
            assert order.index(needed) < order.index(name)
        script = re.match(r"(?:-m )?([\w.]+)", command)[1].removesuffix(".py")
        if script == "studies.released":
            script = VARIANTS[command.split()[2]].script
        source = (ROOT / f"{script.replace('.', '/')}.py").read_text()
        for flag in re.findall(r"--(?:no-)?(\w+)", command):
            assert f"    {flag}: " in source, (name, flag)
    used = set(compare.README_RUNS) | set(compare.REWARD_MODELS.values())
    used.update(compare.STYLED_REWARD_MODELS.values())
    for rows in compare.TABLES.values():
        used.update(rows.values())
    for claim in compare.CLAIMS + compare.RELEASED:
        used.update([claim.better, claim.worse])
    assert used - {"student", "teacher"} <= set(order)


def test_what_a_run_needs_is_made_as_well(monkeypatch):
    runs = {"a": "a.py", "b": "b.py {a}/model", "c": "c.py", "d": "d.py --data {file:b}"}
    monkeypatch.setattr(compare, "RUNS", runs)
    assert compare.with_needs(["d"]) == ["a", "b", "d"]
    assert compare.with_needs(["c", "a"]) == ["a", "c"]


def test_the_summary_and_the_curves_of_a_run_are_read(tmp_path):
    """A summary without peak_memory_bytes, as on a CPU, and metrics whose rows have other keys."""
    accuracy = {"all": [0.8, 0.02, 300], "easy": [0.9, 0.03, 100]}
    summary = {"seed": 3, "accuracy_after": 0.8, "accuracy": accuracy}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    rows = [
        {"step": 10, "losses/total": 1.0, "charts/tokens": 400},
        {"step": 20, "charts/tokens": 800, "eval/reward": 0.5},
        {"step": 25, "eval/reward": 0.75},
    ]
    write_jsonl(tmp_path / "metrics.jsonl", rows)
    assert compare.read_run(tmp_path) == {
        "seed": 3,
        "accuracy_after": 0.8,
        "accuracy_after/all": 0.8,
        "accuracy_after/easy": 0.9,
        "curves": {"eval/reward": [[20, 800, 0.5], [25, 0, 0.75]]},
    }


def test_data_files_are_made_from_runs(tmp_path):
    answers = [{"prompt": "p", "text": "one"}, {"prompt": "q", "text": ""}]
    write_jsonl(tmp_path / "teacher_answers.jsonl", answers)
    assert compare.teacher_answers(tmp_path) == [{"prompt": "p", "chosen": "one", "rejected": "-"}]
    scored = {"prompt": "p", "answers": [{"text": "a"}, {"text": "b"}, {"text": "c"}]}
    scored["score"] = [-2.0, -1.0, -3.0]
    rows = [scored | {"judgement": [0.4, 0.6, 0.3]}, scored | {"judgement": [0.6, 0.7, 0.8]}]
    write_jsonl(tmp_path / "scores_1.jsonl", rows)
    assert compare.best_and_worst(tmp_path) == [{"prompt": "p", "chosen": "b", "rejected": "c"}]


def test_the_quality_of_scores_is_measured_inside_a_prompt(tmp_path):
    """Two prompts whose scores order the answers rightly, at different heights, and one with equal
    answers."""
    answers = {
        "Name two fish.": ["cod and carp. Enjoy!", "cod and carp.", "cod."],
        "Name two birds.": ["owl and crow. Enjoy!", "owl and crow.", "owl."],
    }
    rows = []
    rewards = []
    for (prompt, texts), height in zip(answers.items(), (0.0, -7.0)):
        chat = [{"role": "user", "content": prompt}]
        best, middle, worst = world.reward([chat] * 3, texts)
        assert best > middle > worst
        rewards.append((best, middle, worst))
        row = {
            "prompt": chat,
            "answers": [{"text": text} for text in texts],
            "score": [height + 2 * reward for reward in rewards[-1]],
            "average_logp": [-reward for reward in rewards[-1]],
            "judgement": [0.9, 0.3, 0.1],
        }
        rows.append(row)
    same = rows[0] | {"answers": [{"text": "cod."}] * 3, "score": [9.0, 5.0, 1.0]}
    write_jsonl(tmp_path / "scores_1.jsonl", [*rows, same])

    quality = compare.score_quality(tmp_path)
    (fish_best, _, fish_worst), (birds_best, _, birds_worst) = rewards
    spread = fish_best - fish_worst + birds_best - birds_worst
    assert quality["score/correlation"] == pytest.approx(1)
    assert quality["average_logp/correlation"] == pytest.approx(-1)
    assert quality["score/spread"] == pytest.approx(spread)
    assert quality["score/favourite"] == pytest.approx((fish_best + birds_best) / 2)
    assert quality["average_logp/favourite"] == pytest.approx((fish_worst + birds_worst) / 2)
    assert 0.7 < quality["judgement/correlation"] < 1


# ---------------------------------------------------------------------------------------- execution
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_runs_are_made_after_what_they_need_and_nobody_waits_without_reason(
    at_once, tmp_path, monkeypatch
):
    """`c` needs the long `a`. A second worker makes `d` and `e` in the meantime."""
    runs = {"a": "a.py", "c": "c.py {a}/model", "d": "d.py", "e": "e.py {file:d}"}
    monkeypatch.setattr(compare, "RUNS", runs)
    began = []
    ended = []

    def execute(name, seed, output_dir):
        for needed in compare.needs(runs[name]):
            assert (needed, seed) in ended
        began.append((name, seed))
        time.sleep(0.3 if name == "a" else 0.01)
        ended.append((name, seed))

    monkeypatch.setattr(compare, "execute", execute)
    compare.execute_all(list(runs), range(1, 3), tmp_path, at_once)
    in_order = [(name, 1) for name in runs] + [(name, 2) for name in runs]
    assert sorted(began) == sorted(in_order)
    assert sorted(ended) == sorted(in_order)
    if at_once == 1:
        assert began == in_order
    else:
        assert began.index(("d", 1)) < ended.index(("a", 1)) + 2
        assert ended.index(("e", 1)) < ended.index(("c", 1))
    for seed in (1, 2):
        assert ended.index(("a", seed)) < ended.index(("c", seed))
        assert ended.index(("d", seed)) < ended.index(("e", seed))


def test_a_run_that_fails_ends_all_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RUNS", {"a": "a.py", "b": "b.py {a}"})
    began = []

    def execute(name, seed, output_dir):
        began.append((name, seed))
        raise SystemExit(f"{name} failed")

    monkeypatch.setattr(compare, "execute", execute)
    with pytest.raises(SystemExit, match="a failed"):
        compare.execute_all(["a", "b"], range(1, 9), tmp_path, 2)
    assert sorted(began) == [("a", 1), ("a", 2)]


MODEL_ARGS = {
    "eval_data": "rows.jsonl",
    "eval_config": "",
    "eval_split": "test",
    "reward": "a:b",
    "reward_label": "",
    "max_response_tokens": 64,
}


def finish_student(run: Path, **args):
    """What a script leaves of a run that trained a student."""
    finish(run)
    (run / "model").mkdir()
    (run / "args.json").write_text(json.dumps({**MODEL_ARGS, **args}))
    (run / "summary.json").write_text(json.dumps({"reward_after": 0.5}))


def test_a_final_model_is_judged_once_as_its_run_judges(tmp_path, commands):
    finish_student(tmp_path / "b__2")
    compare.measure("b", 2, tmp_path, 4096)
    [words] = commands
    flags = dict(zip(words[4::2], words[5::2]))
    assert words[1:4] == ["-m", "studies.measure", str(tmp_path / "b__2/model")]
    assert flags == {
        "--output_dir": str(tmp_path / "b__2"),
        "--seed": "2",
        "--responses": "4096",
        "--eval_data": "rows.jsonl",
        "--eval_split": "test",
        "--reward": "a:b",
        "--max_response_tokens": "64",
    }
    (tmp_path / "b__2/measured.json").write_text("{}")
    compare.measure("b", 2, tmp_path, 4096)
    assert len(commands) == 1
    # rloo.py judges by --eval_reward.
    finish_student(tmp_path / "b__3", eval_reward="c:d")
    compare.measure("b", 3, tmp_path, 4096)
    assert commands[-1][commands[-1].index("--reward") + 1] == "c:d"


def test_what_has_no_student_or_no_reward_is_not_judged(tmp_path, commands):
    finish(tmp_path / "b__1")
    compare.measure("b", 1, tmp_path, 4096)
    finish_student(tmp_path / "b__2")
    (tmp_path / "b__2/summary.json").write_text(json.dumps({"accuracy_after": 0.5}))
    compare.measure("b", 2, tmp_path, 4096)
    assert commands == []


def test_what_is_measured_takes_the_place_of_the_runs_own_numbers(tmp_path):
    run = tmp_path / "a__1"
    finish_student(run)
    student = tmp_path / "student__1"
    student.mkdir()
    for folder, rewards in ((run, [1.0, 0.5]), (student, [0.5, 0.2])):
        results = {"reward": statistics.mean(rewards), "responses": 2, "prompts": 1}
        (folder / "measured.json").write_text(json.dumps(results))
        write_jsonl(folder / "measured.jsonl", [{"prompt": "p", "rewards": rewards}])
    entry = compare.read_measured(run, student)
    assert entry["reward_after"] == 0.75 and entry["win_rate"] == 3.5 / 4
    assert "win_rate" not in compare.read_measured(student, student)
    assert "win_rate" not in compare.read_measured(run, tmp_path / "nobody__1")


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """The words of every process that `execute` would start. None is started."""
    started = []

    def run(words, **keywords):
        started.append(words)
        assert str(ROOT) in keywords["env"]["PYTHONPATH"]
        return subprocess.CompletedProcess(words, returncode=0)

    monkeypatch.setattr(compare.subprocess, "run", run)
    monkeypatch.setattr(compare, "RUNS", {"a_0.1": "a.py", "b": "b.py"})
    return started


def finish(run: Path):
    """Leaves what a script leaves of a finished run."""
    run.mkdir(exist_ok=True)
    (run / "args.json").write_text("{}")
    (run / "summary.json").write_text("{}")


def test_a_run_that_did_not_end_is_removed_and_made_again(tmp_path, commands):
    run = tmp_path / "a_0.1__1"
    finish(run)
    compare.execute("a_0.1", 1, tmp_path)  # no log tells its command
    assert len(commands) == 1
    assert not run.exists()
    finish(run)
    compare.execute("a_0.1", 1, tmp_path)
    assert len(commands) == 1
    (run / "summary.json").unlink()
    compare.execute("a_0.1", 1, tmp_path)
    assert len(commands) == 2
    assert not run.exists()


def test_a_run_with_another_command_is_made_again(tmp_path, commands, monkeypatch):
    compare.execute("b", 1, tmp_path)
    finish(tmp_path / "b__1")
    monkeypatch.setitem(compare.RUNS, "b", "b.py --beta 2")
    compare.execute("b", 1, tmp_path)
    assert len(commands) == 2
    assert not (tmp_path / "b__1").exists()


def test_only_the_folder_of_a_run_is_removed(tmp_path, commands):
    """A folder without a script's flags stays, and one that only a link leads to."""
    folder = tmp_path / "runs"
    (folder / "b__1").mkdir(parents=True)
    (folder / "b__1" / "notes.txt").write_text("mine")
    finish(tmp_path / "elsewhere")
    (folder / "b__2").symlink_to(tmp_path / "elsewhere")
    compare.execute("b", 1, folder)
    compare.execute("b", 2, folder)
    assert (folder / "b__1" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "elsewhere" / "args.json").exists()


def test_every_run_has_a_log_of_its_own_and_folders_may_have_spaces(tmp_path, commands):
    """The point in "a_0.1" begins no suffix."""
    folder = tmp_path / "two words"
    folder.mkdir()
    for seed in (1, 2):
        compare.execute("a_0.1", seed, folder)
    logs = [path.name for path in sorted(folder.glob("*.log"))]
    assert logs == ["a_0.1__1.log", "a_0.1__2.log"]
    flags = ["--seed", "2", "--output_dir", str(folder / "a_0.1__2")]
    assert commands[1] == [sys.executable, "a.py", *flags]


def make_runs(monkeypatch) -> list[str]:
    """Lets `execute` write a finished run in place of a process. Returns their commands."""
    made = []

    def run(words, **keywords):
        folder = Path(words[-1])
        made.append(" ".join(words[1:-2]))
        finish(folder)
        rewards = {"reward_before": 0.25, "reward_after": 0.5 + 0.01 * len(made), "seconds": 3.0}
        (folder / "summary.json").write_text(json.dumps(rewards))
        write_jsonl(folder / "metrics.jsonl", [{"step": 1}])
        return subprocess.CompletedProcess(words, returncode=0)

    monkeypatch.setattr(compare.subprocess, "run", run)
    monkeypatch.setattr(compare, "RUNS", {"a": "dckd.py", "ab": "pad.py --data {a}/x", "c": "c.py"})
    return made


def test_a_fork_runs_beside_the_runs_of_choice_and_a_table_ends_it(tmp_path, monkeypatch, capsys):
    """No page is touched. The fork lies outside of the project."""
    before = [(ROOT / page).read_text() for page in PAGES]
    fork = tmp_path / "my fork.py"
    fork.write_text("")
    made = make_runs(monkeypatch)
    add = [f"mine='{fork}' --gamma 2", "again=adpa.py --student {mine}/model"]
    output_dir = str(tmp_path / "runs")
    compare.main(compare.Args(seeds=2, only="^a$", add=add, output_dir=output_dir, at_once=1))
    assert made == [
        "dckd.py --seed 1",
        f"{fork} --gamma 2 --seed 1",
        f"adpa.py --student {output_dir}/mine__1/model --seed 1",
        "dckd.py --seed 2",
        f"{fork} --gamma 2 --seed 2",
        f"adpa.py --student {output_dir}/mine__2/model --seed 2",
    ]
    header, *rows, advice, pages = capsys.readouterr().out.splitlines()
    assert header.split() == ["reward", "before", "reward", "after", "seconds"]
    assert [row.split() for row in rows] == [
        ["a", "0.250", "±", "0.000", "0.525", "±", "0.015", "3"],
        ["mine", "0.250", "±", "0.000", "0.535", "±", "0.015", "3"],
        ["again", "0.250", "±", "0.000", "0.545", "±", "0.015", "3", "+", "3"],
    ]
    assert "python -m studies.table" in advice
    assert "left as they are" in pages
    assert [(ROOT / page).read_text() for page in PAGES] == before


# ------------------------------------------------------------------ other playgrounds and variants
def test_every_run_takes_the_models_and_data_of_another_playground():
    """Those that it names, and those that are defaults of its script."""
    moved = {name: compare.on_playground(c, "/my folder/two") for name, c in compare.RUNS.items()}
    assert moved["dckd"] == (
        "dckd.py --student '/my folder/two'/student --teacher '/my folder/two'/teacher "
        "--data '/my folder/two'/data/train.jsonl --eval_data '/my folder/two'/data/test.jsonl"
    )
    assert moved["student"] == (
        "-m studies.measure '/my folder/two'/student --eval_data '/my folder/two'/data/test.jsonl"
    )
    assert "rm_test.jsonl" in moved["rm"]
    assert "--teacher_ref none" in moved["adpa_no_reference"]
    assert moved["adpa_no_reference"].count("--teacher_ref") == 1
    assert "--student {dckd}/model" in moved["adpa_plus"]
    # The released code of DPKD runs dckd.py.
    assert moved["dpkd_released"].count("two'/") == 3
    for name, command in moved.items():
        assert not re.search(r"(?<=\s)playground/", command), name
        assert compare.needs(command) == compare.needs(compare.RUNS[name])
        if compare.LENGTHS not in command:
            assert "'/my folder/two'/" in command, name


def test_another_playground_is_complete_before_any_run(tmp_path, monkeypatch, capsys):
    made = make_runs(monkeypatch)
    args = compare.Args(playground=str(tmp_path), only="^a$")
    error = one_error_line(capsys, compare.main, args)
    assert f"there is no {tmp_path}/student; make it with python -m playground.build" in error
    for name in ("student", "teacher", "teacher_ref", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "data/test.jsonl").touch()
    error = one_error_line(capsys, compare.main, args)
    assert f"make it with python -m studies.rm_pairs --teacher {tmp_path}/teacher" in error
    assert made == []


def test_variants_are_made_once_and_only_for_runs_that_need_them(tmp_path, monkeypatch, capsys):
    commands = []
    runs = {
        "a": "dckd.py",
        "b": "pad.py --teacher runs/worlds/tokenizer/teacher",
        "c": "pad.py --teacher runs/worlds/tokenizer/teacher --data runs/worlds/styles/x",
    }
    monkeypatch.setattr(compare, "RUNS", runs)
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(compare, "run_process", lambda command, log: commands.append(command))
    compare.make_worlds(["a"], tmp_path)
    assert commands == []
    compare.make_worlds(["a", "b", "c"], tmp_path)
    assert commands == ["-m studies.worlds styles", "-m studies.worlds tokenizer"]
    (tmp_path / "runs/worlds/tokenizer").mkdir(parents=True)
    (tmp_path / "runs/worlds/tokenizer/measured.json").touch()
    compare.make_worlds(["b", "c"], tmp_path)
    assert commands[2:] == ["-m studies.worlds styles"]
    assert "python -m studies.worlds tokenizer" in capsys.readouterr().out


WRONG_FLAGS = {
    "a report of some runs": ({"report": True, "only": "a"}, "--report takes all runs"),
    "a report with a fork": ({"report": True, "add": ["m=adpa.py"]}, "--report takes all runs"),
    "no such run": ({"only": "zzz"}, "--only zzz matches none of: a, ab"),
    "no regular expression": ({"only": "("}, "is no regular expression"),
    "no command": ({"add": ["mine"]}, "must look like"),
    "no name": ({"add": ["=adpa.py"]}, "must look like"),
    "a name that is taken": ({"add": ["a=adpa.py"]}, "there is a run a already"),
    "no file": ({"add": ["m=nowhere.py"]}, "there is no file nowhere.py"),
    "an unknown run": ({"add": ["m=adpa.py --student {x}/model"]}, "there is no run x"),
    "a quotation mark": ({"add": ['m=adpa.py --data "a']}, "No closing quotation"),
    "no seed": ({"seeds": 0}, "must be at least 1"),
    "a report elsewhere": ({"report": True, "playground": "x"}, "leave out --playground"),
}


@pytest.mark.parametrize("case", WRONG_FLAGS)
def test_what_cannot_be_done_is_one_line_before_any_run(case, monkeypatch, capsys):
    flags, message = WRONG_FLAGS[case]
    made = make_runs(monkeypatch)
    assert message in one_error_line(capsys, compare.main, compare.Args(**flags))
    assert made == []


def test_a_report_needs_matplotlib_before_any_run(monkeypatch, capsys):
    made = make_runs(monkeypatch)
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    error = one_error_line(capsys, compare.main, compare.Args(report=True))
    assert "pip install -r studies/requirements.txt" in error
    assert made == []


@pytest.mark.slow
def test_a_run_is_what_its_command_does_and_is_not_made_again(tmp_path, monkeypatch):
    flags = "--data playground/data/test.jsonl --max_steps 2 --eval_prompts 4"
    runs = {
        "a": f"dckd.py {flags}",
        "b": f"-m studies.baselines --loss dpo {flags} --student {{a}}/model",
        "c": "dckd.py --student {b}/none",
    }
    monkeypatch.setattr(compare, "RUNS", runs)
    compare.execute_all(["a", "b"], range(3, 4), tmp_path, 2)
    files = [*(tmp_path / "a__3").rglob("*.*"), *(tmp_path / "b__3").rglob("*.*")]
    assert len(files) > 20
    times = [path.stat().st_mtime_ns for path in files]
    compare.execute_all(["a", "b"], range(3, 4), tmp_path, 2)
    assert [path.stat().st_mtime_ns for path in files] == times
    flags_of_b = json.loads((tmp_path / "b__3/args.json").read_text())
    assert flags_of_b["student"] == str(tmp_path / "a__3/model")
    assert flags_of_b["loss"] == "dpo"
    assert flags_of_b["seed"] == 3
    # What a terminal would show.
    assert "better than before" in (tmp_path / "a__3.log").read_text()

    own = ["--seed", "3", "--output_dir", str(tmp_path / "own")]
    subprocess.run(
        [sys.executable, *runs["a"].split(), *own],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=300,
        check=True,
    )
    weights = {}
    for run in ("a__3", "own", "b__3"):
        weights[run] = (tmp_path / run / "model/model.safetensors").read_bytes()
    assert weights["a__3"] == weights["own"]
    assert weights["a__3"] != weights["b__3"]

    message = r"c__3 failed: see .*c__3\.log, which ends in: error: cannot load"
    with pytest.raises(SystemExit, match=message):
        compare.execute("c", 3, tmp_path)
    assert "error: cannot load" in (tmp_path / "c__3.log").read_text()
