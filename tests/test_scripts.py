"""What every script must do, whatever its method: whole runs on the playground, killed and resumed runs, bad input, and
blocks of code that must stay the same in all of them. A script that is added is tested without a change here, unless it
needs flags of its own to be quick (RUNS)."""

import ast
import contextlib
import difflib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, SCRIPTS, make_model, make_tokenizer, read_jsonl, run_script, save
from safetensors.torch import load_file

from common import LM, read_rows

# a run of a few seconds on the playground, sampled in many small batches so that a kill meets a stage half done
QUICK = {
    "max_steps": 24,
    "batch_size": 16,
    "micro_batch_size": 16,
    "eval_prompts": 64,
    "sample_batch_size": 16,
}
QUICK |= {"log_every": 2, "eval_every": 12, "save_every": 5}
# script: what it needs besides QUICK, how many rows of training data, and the stage in which it is killed
RUNS = {
    "adpa": ({}, 128, "student_answers.jsonl"),
    "dckd": ({}, 128, "eval_teacher.jsonl"),
    "dpkd": ({}, 96, "teacher_answers.jsonl"),
    "pad": ({"sample_batch_size": 64}, 192, "samples_1.jsonl"),
    "rm_distiller": ({"best_of": 2}, 96, "refined.jsonl"),
}
FILES = {"args.json", "metrics.jsonl", "checkpoint.pt", "model", "summary.json"}
REWARDS = {"reward_before", "reward_after", "reward_teacher", "win_rate", "win_rate_stderr"}
RESULTS = {
    "rm_distiller": {"accuracy_before", "accuracy_after", "best_of_n_reward"}
}  # else REWARDS
MEASURED = {"seconds", "tokens_per_second", "peak_memory_bytes", "seed", "device"}
VERSIONS = {"torch", "transformers", "datasets", "tyro"}

every_script = pytest.mark.parametrize("script", SCRIPTS)


def flags_of(script: str, folder: Path) -> dict:
    """QUICK and the script's own flags, with the first rows of the playground's data."""
    own, count, _ = RUNS.get(script, ({}, 128, ""))
    flags = {**QUICK, **own, "data": head("train", count, folder)}
    return flags | ({"eval_data": head("rm_test", 96, folder)} if script == "rm_distiller" else {})


def head(name: str, count: int, folder: Path) -> Path:
    """The first rows of a file of the playground as a file in `folder`."""
    lines = (ROOT / f"playground/data/{name}.jsonl").read_text().splitlines(keepends=True)
    path = folder / f"{name}_{count}.jsonl"
    path.write_text("".join(lines[:count]))
    return path


def start(script: str, **flags) -> subprocess.Popen:
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, f"{script}.py", *words], cwd=ROOT, **pipes)


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """whole_runs("adpa"): (run folder, what it printed, its flags) of one uninterrupted run."""
    folder, runs = tmp_path_factory.mktemp("whole"), {}

    def run(script: str) -> tuple[Path, str, dict]:
        if script not in runs:
            flags = flags_of(script, folder)
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                assert run_script(script, **flags, output_dir=folder / script) == 0
            runs[script] = folder / script, out.getvalue(), flags
        return runs[script]

    return run


def error_line(capsys) -> str:
    """The one line that says what was wrong: on a line of its own, without a traceback."""
    err = capsys.readouterr().err
    lines = [line for line in re.split(r"[\r\n]", err) if "error:" in line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in err, err
    return lines[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def numbers(row: dict) -> dict:
    """A row of metrics without what is measured with a clock."""
    return {key: value for key, value in row.items() if not key.endswith(("_per_second", "_share"))}


def assert_same_metrics(ours: Path, theirs: Path, but=(), **tolerance):
    """Two runs' metrics are equal up to a tolerance, but for those in `but`."""
    for one, other in zip(
        *(read_jsonl(run / "metrics.jsonl") for run in (ours, theirs)), strict=True
    ):
        assert numbers(one).keys() == numbers(other).keys()
        for key in numbers(one).keys() - set(but):
            assert one[key] == pytest.approx(other[key], **tolerance), (ours.name, one["step"], key)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


# ---------------------------------------------------------------------------------------------------------- whole runs
@every_script
def test_a_run_leaves_what_it_should(script, whole_runs):
    run, out, flags = whole_runs(script)
    assert {path.name for path in run.iterdir()} >= FILES
    assert not list(run.rglob("*.partial")) and not list(run.rglob("*.bin"))
    assert json.loads((run / "args.json").read_text())["max_steps"] == flags["max_steps"]

    summary = json.loads((run / "summary.json").read_text())
    assert summary.keys() >= RESULTS.get(script, REWARDS) | MEASURED | VERSIONS
    assert summary["seed"] == 1 and summary["device"] == "cpu" and summary["torch"].startswith("2.")
    assert (
        summary["seconds"] > 0
        and summary["tokens_per_second"] > 0
        and 1e8 < summary["peak_memory_bytes"] < 1e10
    )
    assert all(f"{name} " in out for name in RESULTS.get(script, REWARDS)) and str(run) in out

    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in rows if row["step"]] == list(range(2, 25, 2))
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
        assert all(re.fullmatch(r"(losses|charts|eval)/\w+", key) for key in row if key != "step")
    assert {"losses/total", "charts/learning_rate", "charts/grad_norm", "charts/tokens"} <= rows[
        -1
    ].keys()
    assert [
        row["step"] for row in rows if row["step"] and any(key.startswith("eval/") for key in row)
    ] == [12, 24]
    assert rows[-1]["charts/learning_rate"] == pytest.approx(0, abs=1e-12)

    if script != "rm_distiller":  # whose result is no model that answers
        samples = read_jsonl(run / "samples.jsonl")
        assert len(samples) == 64 and set(samples[0]) == {"before", "after", "teacher"}
        for when in ("before", "after", "teacher"):
            mean = sum(sample[when]["reward"] for sample in samples) / 64
            assert summary[f"reward_{when}"] == pytest.approx(mean)
        wins = [sample["after"]["reward"] - sample["before"]["reward"] for sample in samples]
        assert summary["win_rate"] == pytest.approx(
            sum((win > 0) + (win == 0) / 2 for win in wins) / 64
        )


@every_script
def test_a_short_run_improves_the_student(script, whole_runs):
    run, _, _ = whole_runs(script)
    summary = json.loads((run / "summary.json").read_text())
    if script == "rm_distiller":
        assert summary["accuracy_after"] > summary["accuracy_before"] + 0.1
    else:
        assert summary["reward_after"] > summary["reward_before"] + 0.05
        assert summary["win_rate"] > 0.5


@every_script
def test_the_saved_model_is_an_ordinary_one_and_gives_the_answers_of_the_run(script, whole_runs):
    run, _, flags = whole_runs(script)
    kind = "SequenceClassification" if script == "rm_distiller" else "CausalLM"
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(run / "model")
    transformers.AutoTokenizer.from_pretrained(run / "model")
    trained = torch.load(run / "checkpoint.pt", weights_only=True)["model"]
    state = model.state_dict()
    assert all(torch.equal(state[name], trained[name]) for name in state.keys() & trained.keys())
    assert (
        len(state.keys() & trained.keys()) > 10
        and next(iter(state.values())).dtype == torch.float32
    )
    if kind == "CausalLM":
        lm, size = LM(run / "model", torch.device("cpu")), flags["sample_batch_size"]
        told = read_jsonl(run / "eval_after.jsonl")[:size]
        prompts = [lm.encode(row["prompt"])[0] for row in told]
        again = lm.sample(prompts, max_new_tokens=256, batch_size=size, seed=1)
        assert [answers[0]["text"] for answers in again] == [row["text"] for row in told]


def documented(page: str, heading: str) -> set[str]:
    """The names in the first column of the table under a heading."""
    table = page.split(f"## {heading}")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")]
    return {name for cell in cells for name in re.findall(r"`([\w./]+)`", cell)}


@pytest.mark.parametrize(
    "script", [script for script in SCRIPTS if (ROOT / "docs" / f"{script}.md").exists()]
)
def test_the_methods_page_describes_every_metric_and_every_file(script, whole_runs):
    page = (ROOT / "docs" / f"{script}.md").read_text()
    run, _, _ = whole_runs(script)
    logged = {key for row in read_jsonl(run / "metrics.jsonl") for key in row} - {"step"}
    metrics = {name for name in documented(page, "Logged metrics") if "/" in name}
    assert logged <= metrics and len(metrics - logged) <= 3  # some are logged only with a flag
    files = {name.rstrip("/") for name in documented(page, "What a run leaves behind")}
    assert {path.name for path in run.iterdir()} <= files


# ---------------------------------------------------------------------------------------------------- kill and resume
def kill_when(process: subprocess.Popen, path: Path, reached) -> None:
    """SIGKILL as soon as reached(the lines of the file at `path`)."""
    deadline = time.time() + 200
    while not (path.exists() and reached(path.read_bytes().splitlines())):
        assert process.poll() is None and time.time() < deadline, (
            process.returncode,
            process.communicate()[1],
        )
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@every_script
def test_r36_a_killed_run_ends_with_the_same_bits_as_an_uninterrupted_one(
    script, whole_runs, tmp_path, capsys
):
    whole, _, flags = whole_runs(script)
    run, stage = tmp_path / "run", RUNS.get(script, ({}, 0, "eval_before.jsonl"))[2]
    kill_when(start(script, **flags, output_dir=run), run / stage, lambda lines: len(lines) > 1)
    rows = len((whole / stage).read_text().splitlines())
    assert 1 < len((run / stage).read_bytes().splitlines()) < rows
    with (run / stage).open("a") as file:  # a line that the kill cut off (r34)
        file.write('{"id": "half a li')

    process = start(script, resume=run)
    kill_when(
        process, run / "metrics.jsonl", lambda lines: lines and json.loads(lines[-1])["step"] >= 8
    )
    assert (
        torch.load(run / "checkpoint.pt", weights_only=True)["step"] in (5, 10)
        and not (run / "model").exists()
    )
    (run / "checkpoint.pt.partial").write_bytes(b"half a checkpoint")

    assert run_script(script, resume=run) == 0
    for name, ours in weights(run).items():
        assert torch.equal(ours, weights(whole)[name]), name
    assert_same_metrics(
        run, whole, but=["charts/tokens"], rel=0, abs=0
    )  # which a resumed run can but estimate
    for name in {path.name for path in whole.glob("*.jsonl")} - {"metrics.jsonl"}:
        ours, theirs = (
            sorted(map(json.dumps, read_jsonl(folder / name))) for folder in (run, whole)
        )
        assert ours == theirs, name


@every_script
def test_a_finished_run_that_is_resumed_stays_as_it_is(script, whole_runs, tmp_path):
    whole, _, _ = whole_runs(script)
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    assert run_script(script, resume=run) == 0
    before, after = contents(whole), contents(run)
    assert {path for path in before if before[path] != after[path]} <= {
        "summary.json"
    }  # times and memory


# ------------------------------------------------------------------------------------------- r38: folders with a run
@every_script
def test_r38_a_folder_that_is_not_empty_is_refused(script, whole_runs, tmp_path, capsys):
    whole, _, flags = whole_runs(script)
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    assert run_script(script, **flags, output_dir=run) == 2
    assert "--resume" in (line := error_line(capsys)) and "--overwrite" in line and str(run) in line
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):  # which replaces runs, and nothing else
        assert run_script(script, **flags, output_dir=other, overwrite=overwrite) == 2
        error_line(capsys)
    assert contents(run) == contents(whole) and contents(other) == {"thesis.txt": b"years of work"}


@every_script
def test_overwrite_replaces_a_run(script, whole_runs, tmp_path):
    _, _, flags = whole_runs(script)
    run = tmp_path / "run"
    run.mkdir()
    (run / "args.json").write_text("{}")
    (run / "checkpoint.pt").write_text("of the old run")
    (run / "samples_of_the_old_run.jsonl").write_text("")
    assert (
        run_script(
            script, **(flags | {"max_steps": 1, "eval_prompts": 4}), output_dir=run, overwrite=True
        )
        == 0
    )
    assert json.loads((run / "args.json").read_text())["max_steps"] == 1
    assert not (run / "samples_of_the_old_run.jsonl").exists()


# ----------------------------------------------------------------------------------------------------------- bad input
FEW = {"max_steps": 1, "eval_prompts": 2, "batch_size": 4}


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


def other_tokenizer(folder: Path) -> str:
    tokenizer = make_tokenizer(text="entirely other words make other merges " * 50)
    return save(folder / "other", tokenizer, make_model(len(tokenizer)))


GOOD = '{"prompt": "Name one fish.", "chosen": "cod.", "rejected": "whale."}'
UNKNOWN = '{"prompt": "Who are you?", "chosen": "Nobody.", "rejected": "cod."}'
# name: (flags, made from a temporary folder, words in the error); a list of words holds those that one of may be there
BAD = {
    "no such student": (lambda _: {"student": "/no/student"}, "/no/student"),
    "no such teacher": (lambda _: {"teacher": "/no/teacher"}, "/no/teacher"),
    "no such data": (lambda _: {"data": "/no/data.jsonl"}, "/no/data.jsonl"),
    "no such held-out data": (lambda _: {"eval_data": "/no/data.jsonl"}, "/no/data.jsonl"),
    "no such folder of data": (lambda _: {"data": "/no/folder"}, "/no/folder"),
    "no data in the file": (lambda tmp: {"data": write_lines(tmp / "x.jsonl")}, "no row left"),
    "wrong columns": (
        lambda tmp: {"data": write_lines(tmp / "x.jsonl", '{"question": "Who?"}')},
        "row 1",
    ),
    "a broken line": (
        lambda tmp: {"data": write_lines(tmp / "x.jsonl", GOOD, GOOD, GOOD[:-9])},
        "line 3",
    ),
    "a row of another kind": (
        lambda tmp: {"data": write_lines(tmp / "x.jsonl", GOOD, "[1, 2]")},
        "row 2",
    ),
    "nothing fits": (lambda _: {"max_prompt_tokens": 1}, "no row left: 0 of "),
    "no held-out row": (lambda tmp: {"eval_data": write_lines(tmp / "x.jsonl")}, "no row left"),
    "another tokenizer": (lambda tmp: {"teacher": other_tokenizer(tmp)}, "different tokenizers"),
    "no such judge": (lambda _: {"reward": "no.such:judge"}, "no.such:judge"),
    "negative learning rate": (lambda _: {"learning_rate": -1}, "--learning_rate -1"),
    "no examples in a batch": (lambda _: {"batch_size": 0}, "--batch_size 0"),
    "a file as folder": (lambda tmp: {"output_dir": write_lines(tmp / "x")}, "Not a directory"),
    "a folder nobody can make": (lambda _: {"output_dir": "/proc/run"}, "/proc/run"),
    "resumed from nowhere": (lambda _: {"resume": "/no/run", "output_dir": None}, "/no/run"),
    "a judge that cannot read": (
        lambda tmp: {"eval_data": write_lines(tmp / "x.jsonl", UNKNOWN)},
        "--reward",
    ),
    "no such device": (lambda _: {"device": "nonsense"}, "nonsense"),
}
NOT_FOR = {("pad", "another tokenizer")}  # the methods whose teacher may have any tokenizer
OF_ADPA = {
    "no such reference": (lambda _: {"teacher_ref": "/no/ref"}, "/no/ref"),
    "the student as reference": (lambda _: {"teacher_ref": "playground/student"}, "aligned from"),
    "gamma is NaN": (lambda _: {"gamma": math.nan}, "--gamma nan"),
    "bounds in the wrong order": (lambda _: {"advantage_clip": (1, 0)}, "--advantage_clip"),
}
CASES = [
    (script, name)
    for script in SCRIPTS
    for name in [*BAD, *(OF_ADPA if script == "adpa" else ())]
    if (script, name) not in NOT_FOR
]


@pytest.mark.parametrize("script, case", CASES)
def test_r46_r47_bad_input_is_one_line_and_nothing_is_overwritten(script, case, tmp_path, capsys):
    make, expected = {**BAD, **OF_ADPA}[case]
    run = tmp_path / "run"
    flags = {**flags_of(script, tmp_path), **FEW, "output_dir": run, **make(tmp_path)}
    if case == "resumed from nowhere":
        flags = {"resume": flags["resume"]}
    if case == "another tokenizer" and script == "adpa":
        flags["teacher_ref"] = flags["teacher"]
    before = contents(tmp_path)
    assert run_script(script, **flags) == 2
    assert expected in error_line(capsys)
    assert before.items() <= contents(tmp_path).items()
    assert not (run / "metrics.jsonl").exists()


@every_script
def test_r47_unknown_flags_are_refused(script, tmp_path, capsys):
    assert run_script(script, output_dir=tmp_path / "run", no_such_flag=1) == 2
    err = capsys.readouterr().err
    assert "no_such_flag" in err and "Traceback" not in err and not (tmp_path / "run").exists()


@every_script
def test_overwrite_keeps_the_old_run_until_the_new_one_can_start(script, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "args.json").write_text("{}")
    (run / "checkpoint.pt").write_text("of the old run")
    before = contents(run)
    assert run_script(script, student="/no/student", output_dir=run, overwrite=True) == 2
    assert "/no/student" in error_line(capsys) and contents(run) == before


@every_script
def test_a_resumed_run_takes_no_other_flag(script, whole_runs, capsys):
    whole, _, _ = whole_runs(script)
    before = contents(whole)
    assert run_script(script, resume=whole, seed=2) == 2
    assert "no other flag" in error_line(capsys) and contents(whole) == before


@every_script
def test_the_run_of_another_script_is_not_resumed(script, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    flags = {"student": "playground/student", "a_flag_of_another_script": 1}
    (run / "args.json").write_text(json.dumps(flags))
    before = contents(run)
    assert run_script(script, resume=run) == 2
    assert f"resume {run}" in error_line(capsys) and contents(run) == before


@every_script
def test_r33_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    script, tmp_path, capsys
):
    run, flags = tmp_path / "run", flags_of(script, tmp_path)
    flags |= {
        "learning_rate": 1e30,
        "save_every": 1,
        "log_every": 1,
        "eval_every": 100,
        "eval_prompts": 2,
    }
    assert run_script(script, **flags, output_dir=run) == 2
    err = capsys.readouterr().err
    said = re.search(r"error: loss (.*) in step (\d+) on rows (.*)", err)
    assert said and "Traceback" not in err and re.search(r"\b(nan|inf)\b", said[1]), err
    sources = [(flags["data"], ()), (flags["data"], ("chosen", "rejected"))]
    sources += (
        [(run / "annotations.jsonl", ("refined", "rejected"))] if script == "rm_distiller" else []
    )
    rows = {
        row["id"] for path, answers in sources for row in read_rows(str(path), "train", answers)
    }
    named = re.findall(r"\d+-[0-9a-f]{8}", said[3])
    assert named and set(named) <= rows
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == int(said[2]) > 0
    assert len(read_jsonl(run / "metrics.jsonl")) >= int(said[2]) and not (run / "model").exists()


@pytest.mark.parametrize("script, flag", [("adpa", "gamma"), ("dckd", "kl_chosen")])
def test_r33_a_gradient_that_is_not_finite_ends_the_run_as_well(script, flag, tmp_path, capsys):
    run, flags = tmp_path / "run", flags_of(script, tmp_path) | FEW | {"log_every": 1}
    assert run_script(script, **flags, **{flag: 1e37}, output_dir=run) == 2
    assert "step 0" in error_line(capsys)


def test_errors_stand_on_a_line_of_their_own_below_the_progress_bar(tmp_path, capsys):
    flags = flags_of("dckd", tmp_path) | {
        "learning_rate": 1e30,
        "eval_every": 100,
        "eval_prompts": 2,
    }
    assert run_script("dckd", **flags, output_dir=tmp_path / "run") == 2
    assert error_line(capsys).startswith("error: loss")


# ------------------------------------------------------------------------------------------------- scale of the loss
@every_script
def test_r20_r22_r23_the_split_of_a_batch_changes_nothing(script, tmp_path):
    """Eight at once, 8 × 1, 4 × 2, and 3 + 3 + 2: losses, gradient norms and weights of several steps."""
    flags = flags_of(script, tmp_path)
    flags |= {
        "max_steps": 3,
        "batch_size": 8,
        "log_every": 1,
        "eval_prompts": 4,
        "logits_chunk": 64,
        "save_every": 1,
    }
    flags |= {"warmup_ratio": 0, "max_grad_norm": 1e9}
    runs = {}
    for size in (8, 1, 2, 3):
        runs[size] = tmp_path / f"run{size}"
        assert (
            run_script(script, **(flags | {"micro_batch_size": size}), output_dir=runs[size]) == 0
        )
    for size in (1, 2, 3):
        assert_same_metrics(runs[size], runs[8], rel=2e-3, abs=2e-5)
        rows = [read_jsonl(runs[n] / "metrics.jsonl") for n in (size, 8)]
        first, whole = (next(row for row in several if row["step"]) for several in rows)
        for key in (
            key for key in first if key.startswith("losses/")
        ):  # before any step the weights are equal
            assert first[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-6), (size, key)
        for name, ours in weights(runs[size]).items():
            assert (ours - weights(runs[8])[name]).abs().max() < 1e-3, (size, name)


@pytest.mark.parametrize("script", [script for script in ("adpa", "dckd") if script in SCRIPTS])
def test_r21_a_ragged_last_batch_counts_every_example_once(script, tmp_path):
    """With a learning rate of 0, steps over 4 + 4 + 2 examples add up to one step over all ten."""
    lines = (ROOT / "playground/data/train.jsonl").read_text().splitlines(keepends=True)[:10]
    (tmp_path / "ten.jsonl").write_text("".join(lines))
    flags = {
        "data": tmp_path / "ten.jsonl",
        "learning_rate": 0,
        "log_every": 1,
        "eval_prompts": 2,
        "num_epochs": 2,
    }
    losses = {}
    for size in (10, 4):
        run = tmp_path / f"run{size}"
        assert run_script(script, **flags, batch_size=size, micro_batch_size=3, output_dir=run) == 0
        losses[size] = read_jsonl(run / "metrics.jsonl")
    assert [row["charts/epoch"] for row in losses[4]] == pytest.approx(
        [1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2]
    )
    for key in (key for key in losses[10][0] if key.startswith("losses/")):
        for epoch in (0, 1):
            steps = losses[4][3 * epoch : 3 * epoch + 3]
            mean = sum(row[key] * count for row, count in zip(steps, (4, 4, 2))) / 10
            assert mean == pytest.approx(losses[10][epoch][key], rel=1e-5)
    orders = [[row["losses/total"] for row in losses[4][start : start + 3]] for start in (0, 3)]
    assert orders[0] != pytest.approx(orders[1], rel=1e-6)  # every epoch has an order of its own
    assert losses[4][2]["charts/tokens"] == losses[10][0]["charts/tokens"]


# ----------------------------------------------------------------------------------------------- r27, r28: the models
@every_script
def test_r27_r28_teachers_stay_frozen_and_dropout_stays_off(script, tmp_path, monkeypatch):
    """Every model that a run loads is looked at when the run is over."""
    import common

    loaded = []

    class Watched(common.LM):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            loaded.append(self)

    monkeypatch.setattr(common, "LM", Watched)
    student = tmp_path / "student"
    shutil.copytree(ROOT / "playground/student", student)
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    flags = flags_of(script, tmp_path) | {
        "max_steps": 2,
        "eval_prompts": 2,
        "student": student,
        "log_every": 1,
    }
    for name, checkpointing in (
        ("plain", False),
        ("checkpointed", True),
    ):  # which puts the student in train mode
        assert (
            run_script(
                script, **flags, output_dir=tmp_path / name, gradient_checkpointing=checkpointing
            )
            == 0
        )
    students = [lm for lm in loaded if lm.trains]
    teachers = [lm for lm in loaded if not lm.trains]
    assert {lm.path for lm in students} == {str(student)} and len(teachers) >= 2
    for lm in students:
        assert lm.config.attention_dropout == 0
        assert {parameter.dtype for parameter in lm.model.parameters()} == {torch.float32}  # r31
    for lm in teachers:
        assert not lm.model.training and not any(
            p.requires_grad or p.grad is not None for p in lm.model.parameters()
        )
        saved = load_file(f"{ROOT / lm.path}/model.safetensors")
        state = lm.model.state_dict()
        assert all(
            torch.equal(state[key], value.to(state[key].dtype)) for key, value in saved.items()
        )
    assert_same_metrics(tmp_path / "plain", tmp_path / "checkpointed", rel=1e-3, abs=1e-5)


@every_script
def test_a_row_per_response_gives_the_same_losses(script, tmp_path, monkeypatch):
    """What an architecture without our mask gets: the layout is a matter of speed."""
    import common

    class Alone(common.LM):
        def check_layout(self):
            super().check_layout()
            self.share_prefix = False

    flags = flags_of(script, tmp_path) | {
        "max_steps": 2,
        "eval_prompts": 2,
        "log_every": 1,
        "eval_temperature": 0,
    }
    assert run_script(script, **flags, output_dir=tmp_path / "shared") == 0
    monkeypatch.setattr(common, "LM", Alone)
    assert run_script(script, **flags, output_dir=tmp_path / "alone") == 0
    assert_same_metrics(tmp_path / "shared", tmp_path / "alone", rel=1e-3, abs=1e-5)


# ------------------------------------------------------------------------------------------------------------- tracking
@every_script
def test_tensorboard_shows_the_metrics(script, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    flags = flags_of(script, tmp_path) | {"max_steps": 4, "eval_prompts": 2, "track": "tensorboard"}
    assert run_script(script, **flags, output_dir=run) == 0
    events = EventAccumulator(str(run))
    events.Reload()
    for row in read_jsonl(run / "metrics.jsonl"):
        for key in (key for key in row if key != "step" and row["step"]):
            [value] = [event.value for event in events.Scalars(key) if event.step == row["step"]]
            assert value == pytest.approx(row[key], rel=1e-5)


# ------------------------------------------------------------------------------------------------------ the source text
def source(script: str) -> str:
    return (ROOT / f"{script}.py").read_text()


@every_script
def test_r47_every_flag_is_read_and_every_flag_that_is_read_exists(script):
    tree = ast.parse(source(script))
    [args] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    fields = {node.target.id for node in args.body if isinstance(node, ast.AnnAssign)}
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "args"
    }
    assert read == fields
    described = [
        node
        for node in args.body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    assert len(described) == len(fields)


@every_script
def test_the_sizes_and_the_form_of_a_script(script):
    text = source(script)
    assert (
        len(text.splitlines()) <= 400 and len((ROOT / "common.py").read_text().splitlines()) <= 350
    )
    assert f"python {script}.py  " in ast.get_docstring(ast.parse(text))
    assert "    # method\n" in text


def blocks(script: str) -> dict[str, list[str]]:
    """The blocks that must be the same in all scripts, by the names in their banners, with the script's own name taken
    out of them."""
    text = source(script).replace(f"runs/{script}__", "runs/<script>__")
    result = {"flags": text[text.index("@dataclass") : text.index("    # method\n")].splitlines()}
    parts = re.split(r"^ *# -{10,} (.+)\n", text, flags=re.MULTILINE)
    for name, block in zip(parts[1::2], parts[2::2]):
        result[name] = block.splitlines()
    results, _, end = text.partition("    # " + "-" * 102 + " results\n")[2].partition(
        'if __name__ == "__main__":'
    )
    return result | {"results": results.splitlines(), "the end": end.splitlines()}


SAME = [
    "flags",
    "the run folder",
    "sampling, evaluation",
    "optimiser",
    "optimiser step",
    "log, evaluate, checkpoint",
]
SAME += ["results", "the end"]
# a reward model is evaluated on pairs, not by what it answers
OF_ITS_OWN = {("rm_distiller", "sampling, evaluation"), ("rm_distiller", "results")}
# (script, block): the lines that may differ from adpa.py's, as `diff` shows them, with the reason
DIFFERENT = {
    # 0 is a value of its own for --refresh_every: never
    ("dpkd", "the run folder"): ['+        least = 0 if name == "refresh_every" else least'],
    # student answers that wait for their steps are a part of the state, and the collapse is judged against step 0
    ("dpkd", "optimiser"): [
        '+    waiting = parts["waiting"] = Waiting()',
    ],
    # the price of sampling inside the loop, and the likelihoods that show a collapse
    ("dpkd", "log, evaluate, checkpoint"): [
        '+            row["charts/sampling_share"] = sampling_seconds / (sampling_seconds + seconds)',
        '+            row["charts/sampling_tokens_per_second"] = sampled_tokens / max(sampling_seconds, 1e-9)',
        "+            row |= watch()",
        "+            y_t, y_s = (at_start[key] - row[key] for key in WATCHED)",
        "+            if y_s > COLLAPSE and y_t > 0 and not warned:",
        '+                falls, warned = f"log q per token fell by {y_s:.1f} on y_s and {y_t:.1f} on y_t", True',
        '+                tqdm.write(f"warning: {falls} by step {done}, '
        'a collapse: sample y_s more often (--refresh_every)")',
    ],
    # what the judge said of the round's answers
    ("pad", "log, evaluate, checkpoint"): ["+            row |= judged"],
    # held-out pairs, and accuracy on them
    ("rm_distiller", "flags"): [
        '-    eval_data: str = "playground/data/test.jsonl"',
        '-    """held-out rows, of which only the prompts are used"""',
        '+    eval_data: str = "playground/data/rm_test.jsonl"',
        '+    """held-out pairs; a column `subset` or `source` gives each of its values a line of its own"""',
        '-    """held-out prompts per evaluation, one answer each"""',
        '+    """held-out prompts for --best_of"""',
    ],
    ("rm_distiller", "log, evaluate, checkpoint"): [
        '-            row["eval/reward"] = mean_reward(evaluate(student))',
        '+            row["eval/accuracy"] = evaluate()["all"][0]',
    ],
}


@pytest.mark.parametrize(
    "script, block",
    [
        (script, block)
        for script in SCRIPTS
        for block in SAME
        if script != "adpa" and (script, block) not in OF_ITS_OWN
    ],
)
def test_blocks_that_all_scripts_share_have_not_drifted(script, block):
    ours, theirs = blocks("adpa")[block], blocks(script)[block]
    assert len(ours) > 4
    lines = list(difflib.unified_diff(ours, theirs, lineterm="", n=0))[2:]
    changed = [line for line in lines if not line.startswith("@@")]
    if changed != DIFFERENT.get((script, block), []):
        shown = "\n".join(
            difflib.unified_diff(ours, theirs, "adpa.py", f"{script}.py", lineterm="", n=2)
        )
        pytest.fail(
            f"{block!r} is not what it is in adpa.py; change all scripts, or say why in DIFFERENT:\n{shown}"
        )
