"""studies/released.py, rm_pairs.py and table.py: the released variants run, the committed pairs are
drawn again, and runs stand side by side. The released formulas of PAD and RM-Distiller are tested
beside those that they replace."""

import csv
import importlib
import inspect
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT,
    command_line,
    first_rows,
    one_error_line,
    read_jsonl,
    run_script,
    write_jsonl,
)

import adpa
import rm_distiller
from playground.world import all_requests
from studies import released, rm_pairs, table

PLAYGROUND = ROOT / "playground/data"


# ------------------------------------------------------------------------------------- released.py
def float64(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_the_released_margins_by_hand():
    """Two likeliest tokens. The teacher's are 0 and 1, the reference's 1 and 2. So token 0 is
    compared with .3, the teacher's second probability, and token 1 with the reference's .6."""
    teacher = float64([0.5, 0.3, 0.15, 0.05]).log()
    reference = float64([0.1, 0.6, 0.2, 0.1]).log()
    [margins] = released.stabilised_margins(teacher, reference, None, 2).tolist()
    assert margins == pytest.approx([math.log(0.5 / 0.3), 1e-8, 1e-8, 1e-8])
    # A margin above 1 becomes 1. The paper's own log-ratios have no bounds.
    [margins] = released.stabilised_margins(teacher, reference, None, 4).tolist()
    assert margins == pytest.approx([1 - 1e-8, 1e-8, 1e-8, 1e-8])
    assert math.log(0.5 / 0.1) > 1.6


def test_the_released_margins_equal_what_the_released_functions_returned():
    """gaoshiping/ADPA a95c32f: `get_reverse_ce` of what `load_input_and_target_probs_fast` makes of
    margins of `get_margin_logp_token`, for these logits of student, teacher and reference."""
    torch.manual_seed(1)
    log_probs = [(2 * torch.randn(6, 120)).log_softmax(-1) for _ in range(3)]
    student, teacher, reference = log_probs
    margins = released.stabilised_margins(teacher, reference, None, 50)
    value = (student.exp() * margins).sum(-1).mean().item()
    assert value == pytest.approx(0.275852, abs=1e-5)
    # Neither the clamp alone nor the clamp of the 50 likeliest tokens' exact log-ratios is that.
    for top_k, expected in ((0, 0.433783), (50, 0.329971)):
        clipped = adpa.advantages(teacher, reference, (1e-8, 1 - 1e-8), top_k)
        value = (student.exp() * clipped).sum(-1).mean().item()
        assert value == pytest.approx(expected, abs=1e-5)


def test_the_released_divergence_equals_what_the_released_function_returned():
    """`jenson_shannon_divergence` of EganGu/PAD 89f2a91 on the rankings of these scores, two
    prompts with three answers each."""
    student = float64([1.541, -0.293, -2.179], [0.568, -1.085, -1.399])
    teacher = float64([0.403, 0.838, -0.719], [-0.403, -0.597, 0.182])
    values = released.divergence_from_a_shared_mixture(student, teacher)
    assert values.tolist() == pytest.approx([2.159, 2.031], abs=2e-3)


def test_the_released_divergence_equals_a_slow_loop():
    student = float64([0.3, -1.2], [0.9, 0.1], [-0.4, 0.5])
    teacher = float64([1.3, 0.2], [-0.9, 0.4], [0.1, -0.2])
    probs = []
    for scores in (student, teacher):
        # Two answers have two rankings, the first of which is won by the first answer.
        first = scores.exp() / scores.exp().sum(-1, keepdim=True)
        probs.append([[a, 1 - a] for a in first[:, 0].tolist()])
    expected = []
    for i in range(3):
        total = 0.0
        for ranking in range(2):
            mass = sum(side[k][ranking] for side in probs for k in range(3)) / 2
            for side in probs:
                total += mass * (math.log(mass) - math.log(side[i][ranking])) / 2
        expected.append(total)
    values = released.divergence_from_a_shared_mixture(student, teacher)
    assert values.tolist() == pytest.approx(expected, abs=1e-12)


def test_the_released_preference_equals_what_the_released_function_returned():
    """`get_distil_loss` of microsoft/LMOps 4f2a9de with `seqKD_DPO`, its softmax in float64, gave
    1.02205 over the five tokens that are not masked."""
    torch.manual_seed(2)
    student, teacher = [(2 * torch.randn(2, 5, 7)).double().log_softmax(-1) for _ in range(2)]
    is_response = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 0, 0]]).bool()
    values = released.argmax_preference(teacher[is_response], student[is_response])
    assert values.mean().item() == pytest.approx(1.022052, abs=1e-6)


def test_the_released_table_by_hand():
    """Rewards (1, 2) against (0, 0), margins (1, 4): ½ [(1 − 1)² + (1 − 4)²] and
    ½ [(2 − 1)² + (2 − 4)²]. Pair by pair it is (1 − 1)² and (2 − 4)²."""
    better, worse, margins = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.0, 4.0]])
    assert released.margin_loss_over_a_table(better, worse, margins).tolist() == [4.5, 2.5]
    assert rm_distiller.pair_loss(better, worse, margins).tolist() == [0.0, 4.0]


def test_the_settings_of_the_release_are_the_variants_flags():
    """What the configurations say of the number of examples of a forward pass, and of weights."""
    assert released.VARIANTS["pad"].flags == ["--micro_batch_size", "1"]
    assert released.VARIANTS["rm_distiller"].flags == ["--micro_batch_size", "4"]
    assert released.VARIANTS["dpkd"].flags[:4] == ["--kl_chosen", "1", "--kl_rejected", "0"]
    assert released.VARIANTS["adpa"].flags == ["--top_k", "50"]


def test_the_released_preference_by_hand():
    """Of the three tokens the teacher prefers the first and the student the third. With β = 0.1 the
    margin is 0.1 · [log(.2/.5) − log(.6/.2)]."""
    teacher = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    student = torch.tensor([[0.2, 0.2, 0.6]], dtype=torch.float64).log()
    margin = 0.1 * torch.tensor(0.2 / 0.5 * 0.2 / 0.6, dtype=torch.float64).log()
    value = released.argmax_preference(teacher, student)
    assert value.tolist() == pytest.approx([-F.logsigmoid(margin).item()])
    # Where both prefer the same token there is no margin.
    assert released.argmax_preference(teacher, teacher).item() == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize("name", released.VARIANTS)
def test_a_variant_takes_the_place_of_a_function_with_the_same_first_arguments(name):
    variant = released.VARIANTS[name]
    function = getattr(importlib.import_module(variant.script), variant.function_name)
    expected = list(inspect.signature(function).parameters)
    replacement = list(inspect.signature(variant.replacement).parameters)
    assert replacement[: len(expected)] == expected


FLAGS_OF_VARIANTS = {
    "adpa": {"top_k": 50},
    "dpkd": {"kl_chosen": 1, "kl_rejected": 0, "learning_rate": 3e-3},
    "pad": {"micro_batch_size": 1},
    "rm_distiller": {"micro_batch_size": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", released.VARIANTS)
def test_a_variant_learns_from_another_loss_than_its_script(name, tmp_path, monkeypatch):
    variant = released.VARIANTS[name]
    script = importlib.import_module(variant.script)
    original = getattr(script, variant.function_name)
    flags = {
        "data": first_rows("train", 24, tmp_path),
        "eval_data": first_rows("rm_test", 8, tmp_path),
        "max_steps": 1,
        "batch_size": 8,
        "log_every": 1,
    }
    if name != "rm_distiller":  # it samples no responses
        flags["eval_prompts"] = 4
    # The variant stays in the module, so monkeypatch puts the function back after the test.
    monkeypatch.setattr(script, variant.function_name, original)
    monkeypatch.chdir(ROOT)
    released.main([name, *command_line({**flags, "output_dir": tmp_path / "released"})])
    args = json.loads((tmp_path / "released" / "args.json").read_text())
    for flag, value in FLAGS_OF_VARIANTS.get(name, {}).items():
        assert args[flag] == value
        flags[flag] = value
    assert run_script(variant.script, **flags, output_dir=tmp_path / "own") == 0
    *_, released_row = read_jsonl(tmp_path / "released" / "metrics.jsonl")
    *_, own_row = read_jsonl(tmp_path / "own" / "metrics.jsonl")
    assert released_row.keys() == own_row.keys()
    assert released_row["losses/total"] != pytest.approx(own_row["losses/total"], rel=1e-3)


@pytest.mark.parametrize("words", [[], ["dckd"], ["--help"]])
def test_a_variant_that_does_not_exist_is_one_line(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        released.main(words)
    assert stopped.value.code == 2
    assert "released {adpa,dpkd,pad,rm_distiller} [flags" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- rm_pairs.py
def test_the_writers_pairs_are_drawn_as_they_were():
    """They come before the shifted pairs, and need no model."""
    _, requests = all_requests()
    # Stands in for the teacher's answers, and leaves the pairs that are drawn before them alone.
    teacher_answers = [["Nothing.", "Nothing"] for _ in requests]
    rows = rm_pairs.make_pairs(requests, teacher_answers, pairs=2, seed=1)
    committed = read_jsonl(PLAYGROUND / "rm_test.jsonl")
    assert rows[:512] == committed[:512]
    assert [row["subset"] for row in rows] == [row["subset"] for row in committed]


@pytest.mark.slow
def test_all_pairs_are_drawn_as_they_were(tmp_path, monkeypatch):
    """A processor that rounds in another way may sample other answers from the teacher, so a few
    of the shifted pairs may differ."""
    monkeypatch.chdir(ROOT)
    rm_pairs.main(rm_pairs.Args(output=str(tmp_path / "rm_test.jsonl")))
    rows = read_jsonl(tmp_path / "rm_test.jsonl")
    committed = read_jsonl(PLAYGROUND / "rm_test.jsonl")
    assert len(rows) == len(committed)
    equal = sum(row == other for row, other in zip(rows, committed))
    assert equal >= 0.95 * len(committed)


def test_rewards_that_are_never_far_enough_apart_are_an_error():
    _, requests = all_requests()
    with pytest.raises(RuntimeError, match=r"no two answers to 'Name two planets\.'"):
        rm_pairs.draw_pair(
            rm_pairs.SUBSETS["shifted"], requests[0], ["Mars.", "Mars."], random.Random(1)
        )


# ---------------------------------------------------------------------------------------- table.py
def write_run(folder: Path, flags: dict, rewards: dict[str, list[float]], **summary) -> Path:
    """What a script leaves of a run of 30 steps. Without a summary it is not finished."""
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(flags))
    metrics = [{"step": 0, "eval/reward": 0.1}, {"step": 20, "eval/reward": 0.625}, {"step": 30}]
    write_jsonl(folder / "metrics.jsonl", metrics)
    (folder / "timings.json").write_text(json.dumps({"eval_before": 1.5}))
    for name, values in rewards.items():
        rows = [{"id": f"{i}-x", "reward": value} for i, value in enumerate(values)]
        write_jsonl(folder / f"eval_{name}.jsonl", rows)
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


REWARDS = {"before": [0.0, 1.0], "after": [1.0, 1.0], "teacher": [1.0, 0.5]}


def table_of(*folders: Path) -> dict[tuple[str, str], list]:
    """The cells of every line, by group and label."""
    rows = table.table_rows([table.read_run(folder) for folder in folders])
    return {(row.group, row.label): row.cells for row in rows}


def texts(cells: list) -> list[str]:
    return [table.cell_text(cell) for cell in cells]


def test_runs_of_two_scripts_stand_side_by_side(tmp_path):
    """Rewards of 0 and 1 have the mean 0.5 and the standard error 0.5 / √2. Of the second run's two
    prompts one is better than the first run's, and one equal."""
    one = write_run(
        tmp_path / "one",
        {"beta": 2.0, "gamma": 0.7, "seed": 1, "output_dir": "a"},
        REWARDS,
        script="fork",
        win_rate=0.75,
        win_rate_stderr=0.25,
        stage_seconds={"eval_before": 1.0, "samples_1": 2.0, "training": 4.0, "eval_after": 0.5},
        seconds=10.0,
    )
    other = write_run(
        tmp_path / "other",
        {"beta": 4.0, "clip": None, "seed": 1, "output_dir": "b"},
        {**REWARDS, "after": [1.0, 2.0]},
        script="pad",
        stage_seconds={"eval_before": 1.0, "scores_1": 3.0, "training": 4.0},
        seconds=5.0,
    )
    cells = table_of(one, other)
    assert cells["run", "script"] == ["fork", "pad"]
    assert cells["run", "state"] == ["finished, step 30"] * 2
    flags = {label: texts(line) for (group, label), line in cells.items() if "flags" in group}
    assert flags == {"beta": ["2.0", "4.0"], "gamma": ["0.7", "–"], "clip": ["–", "None"]}
    assert texts(cells["results", "reward before"]) == ["0.500 ± 0.354"] * 2
    assert texts(cells["results", "reward after"]) == ["1.000 ± 0.000", "1.500 ± 0.354"]
    assert texts(cells["results", "reward teacher"]) == ["0.750 ± 0.177"] * 2
    assert texts(cells["results", "win rate"]) == ["0.750 ± 0.250", "–"]
    assert texts(cells["results", "beats the first run"]) == ["–", "0.750 ± 0.177"]
    seconds = {label: texts(line) for (group, label), line in cells.items() if group == "seconds"}
    assert list(seconds.items()) == [
        ("eval_before", ["1.0", "1.0"]),
        ("samples_1", ["2.0", "–"]),
        ("scores_1", ["–", "3.0"]),
        ("training", ["4.0", "4.0"]),
        ("eval_after", ["0.5", "–"]),
        # The second run was resumed: its last process took less than all its stages.
        ("everything else", ["2.5", "0.0"]),
        ("in all", ["10.0", "8.0"]),
    ]


def test_runs_without_rewards_unfinished_runs_and_reward_models_are_shown_as_such(tmp_path):
    unfinished = write_run(tmp_path / "dpkd__1__9", {}, {"before": [0.0, 1.0]})
    with (unfinished / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "eval')  # a kill cut this line
    no_rewards = write_run(tmp_path / "none", {}, {}, seconds=2.0)
    write_jsonl(no_rewards / "eval_after.jsonl", [{"id": "1", "text": "yes"}])
    accuracy = {"all": [0.8, 0.02, 300], "hard": [0.7, 0.04, 100]}
    reward_model = write_run(
        tmp_path / "rm", {}, {}, accuracy_before=0.5, accuracy=accuracy, best_of_n_reward=0.9
    )
    cells = table_of(unfinished, no_rewards, reward_model)
    assert cells["run", "script"] == ["dpkd", None, None]
    assert cells["run", "state"] == [
        "unfinished, step 30",
        "finished, step 30, no rewards",
        "finished, step 30",
    ]
    assert texts(cells["results", "reward before"]) == ["0.500 ± 0.354", "–", "–"]
    assert texts(cells["results", "reward after"]) == ["0.625 at step 20", "–", "–"]
    assert texts(cells["results", "accuracy before"]) == ["–", "–", "0.500"]
    assert texts(cells["results", "accuracy after"]) == ["–", "–", "0.800 ± 0.020"]
    assert texts(cells["results", "accuracy after, hard"]) == ["–", "–", "0.700 ± 0.040"]
    assert texts(cells["results", "reward of the best of n"]) == ["–", "–", "0.900"]
    assert ("results", "beats the first run") not in cells
    assert texts(cells["seconds", "in all"]) == ["1.5", "2.0", "1.5"]


def test_responses_without_a_reward_are_left_out(tmp_path):
    """Of the prompts with both rewards, the second run wins one and ties one."""
    rewards = {"before": [None, 1.0, 0.0, 0.5], "after": [2.0, 1.0, 0.0, None]}
    one = write_run(tmp_path / "one", {}, rewards, seconds=1.0)
    other = write_run(tmp_path / "other", {}, {"after": [3.0, 1.0, None, 0.0]}, seconds=1.0)
    cells = table_of(one, other)
    # The standard error of 0, ½, 1 is √(1/6) / √3, and that of 0, 1, 2 is √(2/3) / √3.
    assert texts(cells["results", "reward before"]) == ["0.500 ± 0.236", "–"]
    assert texts(cells["results", "reward after"]) == ["1.000 ± 0.471", "1.333 ± 0.720"]
    assert texts(cells["results", "beats the first run"]) == ["–", "0.750 ± 0.177"]


def test_other_folders_beside_runs_are_left_out_with_a_note(tmp_path, capsys):
    """As runs/* has them, once runs/compare is there."""
    run = write_run(tmp_path / "run", {"seed": 1}, REWARDS, seconds=1.0)
    other = tmp_path / "compare"
    other.mkdir()
    table.main(table.Args([str(other), str(run)]))
    out = capsys.readouterr().out
    assert f"note: {other} is no run folder and is left out" in out
    assert "1.000 ± 0.000" in out
    for missing in ([str(other)], [str(run), str(tmp_path / "typo")]):
        error = one_error_line(capsys, table.main, table.Args(missing))
        assert f"{missing[-1]} is no run folder" in error


def test_a_table_that_is_cut_by_head_ends_without_a_word(tmp_path):
    for number in range(300):
        write_run(tmp_path / f"run{number}", {"seed": number}, {}, seconds=1.0)
    command = f"{sys.executable} -m studies.table {tmp_path}/run* | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_what_a_run_took_from_another_one_is_said(tmp_path):
    source = write_run(tmp_path / "dckd", {"student": "playground/student"}, {})
    flags = {"student": str(source / "model"), "data": str(source / "rows.jsonl")}
    run = table.read_run(write_run(tmp_path / "plus", {**flags, "output_dir": str(source)}, {}))
    assert table.notes([table.read_run(source)]) == []
    assert table.notes([run]) == [
        f"plus took --student from {source}, whose seconds come on top, and its win rate is against"
        " that student",
        f"plus took --data from {source}, whose seconds come on top",
    ]


def test_real_runs_are_printed_in_the_width_of_the_terminal_and_written(
    run_tiny, checkpoints, tmp_path, capsys, monkeypatch
):
    reference = checkpoints["teacher_ref"]
    runs = [
        run_tiny("dckd"),
        run_tiny("adpa", teacher_ref=reference, gamma=2),
        run_tiny("adpa", teacher_ref=reference),
    ]
    folders = [str(run) for run in runs]
    names = [Path(folder).name for folder in folders]
    monkeypatch.setenv("COLUMNS", "90")
    capsys.readouterr()
    table.main(table.Args(folders, output=str(tmp_path / "table.csv")))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 90
    *blocks, explanation = printed.strip().split("\n\n")
    assert explanation.startswith("± is a standard error")
    assert [block.splitlines()[0].split() for block in blocks] == [names[:2], names[2:]]
    assert re.search(r"^  gamma +– +2\.0$", blocks[0], re.M)

    with (tmp_path / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["run: script"] for line in lines] == ["dckd", "adpa", "adpa"]
    for line, folder in zip(lines, folders):
        summary = json.loads((Path(folder) / "summary.json").read_text())
        assert line["run"] == folder
        assert float(line["results: reward after"]) == pytest.approx(summary["reward_after"])
        assert float(line["seconds: in all"]) == pytest.approx(summary["seconds"])

    table.main(table.Args(folders, output=str(tmp_path / "table.md")))
    header, _, *rows = (tmp_path / "table.md").read_text().splitlines()
    assert header == f"|  | {' | '.join(names)} |"
    assert "| flags that differ: gamma | – | 2.0 | 0.7 |" in rows


@pytest.mark.parametrize("output", ["README.md", "docs/results.md", "docs/new.csv", "table.txt"])
def test_the_table_goes_to_no_page_and_to_known_kinds_of_files(output, tmp_path, capsys):
    run = write_run(tmp_path / "run", {}, {})
    before = (ROOT / "README.md").read_text()
    error = one_error_line(capsys, table.main, table.Args([str(run)], output=str(ROOT / output)))
    assert output in error
    assert (ROOT / "README.md").read_text() == before


def test_a_folder_that_is_no_run_is_one_line(tmp_path, capsys):
    assert f"{tmp_path} is no run" in one_error_line(capsys, table.read_run, tmp_path)
    (tmp_path / "args.json").write_text('{"beta": ')
    assert f"cannot read {tmp_path / 'args.json'}" in one_error_line(
        capsys, table.read_run, tmp_path
    )
    assert "at least one" in one_error_line(capsys, table.main, table.Args([]))
