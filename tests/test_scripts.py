"""What every script must do, whatever its method: whole runs on the playground, killed and resumed
runs, bad input, and the form of its source. A script that is added is tested without a change here,
unless it needs flags of its own to be quick (RUNS)."""

import ast
import contextlib
import io
import json
import math
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from conftest import (
    ROOT,
    SCRIPTS,
    ScriptProcess,
    first_rows,
    flags_it_has,
    make_model,
    make_tokenizer,
    one_short,
    read_jsonl,
    run_script,
    save,
    training_rows,
)
from safetensors.torch import load_file

import adpa
import common
from common import LM

# A run of a few seconds on the playground. It samples in many small batches, so that a kill meets a
# stage half done.
QUICK = {
    "max_steps": 24,
    "batch_size": 16,
    "micro_batch_size": 16,
    "eval_prompts": 64,
    "sample_batch_size": 16,
    "log_every": 2,
    "eval_every": 12,
    "save_every": 5,
}


@dataclass
class Run:
    """What a script needs to be quick, and the stage in whose middle it is killed."""

    train_rows: int
    killed_in: str
    flags: dict = field(default_factory=dict)


RUNS = {
    "adpa": Run(128, "student_answers.jsonl"),
    "dckd": Run(128, "eval_teacher.jsonl"),
    "dpkd": Run(96, "teacher_answers.jsonl"),
    "pad": Run(128, "samples_1.jsonl", {"sample_batch_size": 64}),
    "rm_distiller": Run(64, "refined.jsonl"),
}
FILES = {"args.json", "metrics.jsonl", "checkpoint.pt", "model", "summary.json", "timings.json"}
REWARDS = {"reward_before", "reward_after", "reward_teacher", "win_rate", "win_rate_stderr"}
OTHER_RESULTS = {"rm_distiller": {"accuracy_before", "accuracy_after", "accuracy"}}
MEASURED = {"script", "seconds", "stage_seconds", "tokens_per_second", "seed", "device"}
VERSIONS = {"torch", "transformers", "datasets", "tyro"}

# The tests of a script run in one process, so that they share its whole run.
every_script = pytest.mark.parametrize(
    "script", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in SCRIPTS]
)


@pytest.mark.xdist_group("a group")
def test_the_tests_of_a_group_run_in_one_process(request):
    """pytest-xdist writes the group behind the name of a test. Under a version of pytest that it
    does not know it fails to, and every process makes the whole runs for itself."""
    if not hasattr(request.config, "workerinput"):
        pytest.skip("there is one process")
    assert request.node.nodeid.endswith("@a group")


def run_of(script: str) -> Run:
    return RUNS.get(script, Run(128, "eval_before.jsonl"))


def flags_of(script: str, folder: Path) -> dict:
    """QUICK and the script's own flags, with the first rows of the playground's data."""
    run = run_of(script)
    flags = {**QUICK, **run.flags, "data": first_rows("train", run.train_rows, folder)}
    if script == "rm_distiller":
        flags["eval_data"] = first_rows("rm_test", 96, folder)
    return flags


@pytest.fixture(scope="session")
def whole_runs(tmp_path_factory):
    """whole_runs("adpa"): (run folder, what it printed, its flags) of one uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    runs = {}

    def run(script: str) -> tuple[Path, str, dict]:
        if script not in runs:
            flags = flags_of(script, folder)
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                assert run_script(script, **flags, output_dir=folder / script) == 0
            runs[script] = (folder / script, out.getvalue(), flags)
        return runs[script]

    return run


def error_line(capsys) -> str:
    """The one line that says what was wrong: on a line of its own, without a traceback."""
    err = capsys.readouterr().err
    lines = [line for line in re.split(r"[\r\n]", err) if "error:" in line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in err, err
    return lines[0]


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder."""
    files = {}
    for path in folder.rglob("*"):
        if path.is_file():
            files[str(path.relative_to(folder))] = path.read_bytes()
    return files


def without_clocks(row: dict) -> dict:
    """A row of metrics without what is measured with a clock."""
    clocks = ("_per_second", "_share")
    return {key: value for key, value in row.items() if not key.endswith(clocks)}


def assert_same_metrics(one: Path, other: Path, **tolerance):
    """The metrics of two runs are equal up to a tolerance."""
    rows = read_jsonl(one / "metrics.jsonl")
    other_rows = read_jsonl(other / "metrics.jsonl")
    for row, other_row in zip(rows, other_rows, strict=True):
        values = without_clocks(row)
        other_values = without_clocks(other_row)
        assert values.keys() == other_values.keys()
        for key, value in values.items():
            expected = pytest.approx(other_values[key], **tolerance)
            assert value == expected, (one.name, row["step"], key)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


# --------------------------------------------------------------------------------------- whole runs
@every_script
def test_a_run_leaves_what_it_should(script, whole_runs):
    run, out, flags = whole_runs(script)
    assert {path.name for path in run.iterdir()} >= FILES
    assert not list(run.rglob("*.partial")) and not list(run.rglob("*.bin"))
    assert json.loads((run / "args.json").read_text())["max_steps"] == flags["max_steps"]

    summary = json.loads((run / "summary.json").read_text())
    results = OTHER_RESULTS.get(script, REWARDS)
    assert summary.keys() >= results | MEASURED | VERSIONS
    assert summary["seed"] == 1 and summary["device"] == "cpu"
    assert summary["torch"].startswith("2.")
    assert summary["seconds"] > 0 and summary["tokens_per_second"] > 0
    assert summary["script"] == script
    stages = {path.stem for path in run.glob("*.jsonl")} - {"metrics", "annotations"}
    assert summary["stage_seconds"].keys() == stages | {"training"}
    assert all(seconds > 0 for seconds in summary["stage_seconds"].values())
    assert sum(summary["stage_seconds"].values()) <= summary["seconds"]
    assert str(run) in out


@every_script
def test_metrics_are_finite_and_come_when_they_should(script, whole_runs):
    run, _, _ = whole_runs(script)
    rows = read_jsonl(run / "metrics.jsonl")
    trained = [row for row in rows if row["step"]]
    assert [row["step"] for row in trained] == list(range(2, 25, 2))
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
        assert all(re.fullmatch(r"step|(losses|charts|eval)/\w+", key) for key in row)
    always = {"losses/total", "charts/learning_rate", "charts/grad_norm", "charts/tokens"}
    assert always <= rows[-1].keys()
    evaluated = [row["step"] for row in trained if "eval/" in " ".join(row)]
    assert evaluated == [12, 24]
    assert rows[-1]["charts/learning_rate"] == pytest.approx(0, abs=1e-12)


@every_script
def test_rewards_and_win_rate_are_means_over_the_evaluations(script, whole_runs):
    if script in OTHER_RESULTS:
        pytest.skip("its results are of another kind")
    run, _, _ = whole_runs(script)
    summary = json.loads((run / "summary.json").read_text())
    rewards = {}
    for when in ("before", "after", "teacher"):
        rewards[when] = [row["reward"] for row in read_jsonl(run / f"eval_{when}.jsonl")]
        assert len(rewards[when]) == 64
        assert summary[f"reward_{when}"] == pytest.approx(sum(rewards[when]) / 64)
    points = 0.0
    for before, after in zip(rewards["before"], rewards["after"]):
        if after == before:
            points += 0.5
        elif after > before:
            points += 1.0
    assert summary["win_rate"] == pytest.approx(points / 64)
    last = read_jsonl(run / "metrics.jsonl")[-1]
    assert last["eval/reward"] == summary["reward_after"]


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
    auto_class = getattr(transformers, f"AutoModelFor{kind}")
    state = auto_class.from_pretrained(run / "model").state_dict()
    transformers.AutoTokenizer.from_pretrained(run / "model")
    trained = torch.load(run / "checkpoint.pt", weights_only=True)["model"]
    shared = state.keys() & trained.keys()
    assert len(shared) > 10
    for name in shared:
        assert torch.equal(state[name], trained[name])
        assert state[name].dtype == torch.float32
    if kind == "CausalLM":
        lm = LM(run / "model", torch.device("cpu"))
        size = flags["sample_batch_size"]
        written = read_jsonl(run / "eval_after.jsonl")[:size]
        prompts = [lm.prompt_ids(row["prompt"]) for row in written]
        again = lm.sample(prompts, max_new_tokens=256, batch_size=size, seed=1)
        assert [responses[0]["text"] for responses in again] == [row["text"] for row in written]


def documented(page: str, heading: str) -> set[str]:
    """The names in the first column of the table under a heading."""
    table = page.split(f"## {heading}")[1].split("\n## ")[0]
    names = set()
    for line in table.splitlines():
        if line.startswith("| "):
            names |= set(re.findall(r"`([\w./]+)`", line.split("|")[1]))
    return names


@every_script
def test_the_methods_page_describes_every_metric_and_every_file(script, whole_runs):
    page = (ROOT / "docs" / f"{script}.md").read_text()
    run, _, _ = whole_runs(script)
    logged = set()
    for row in read_jsonl(run / "metrics.jsonl"):
        logged |= row.keys() - {"step"}
    metrics = {name for name in documented(page, "Logged metrics") if "/" in name}
    assert logged <= metrics and len(metrics - logged) <= 3  # some are logged only with a flag
    files = {name.rstrip("/") for name in documented(page, "What a run leaves behind")}
    assert {path.name for path in run.iterdir()} == files


# ---------------------------------------------------------------------------------- kill and resume
def kill_when(process: ScriptProcess, path: Path, reached) -> None:
    """SIGKILL as soon as reached(the lines of the file at `path`)."""
    deadline = time.time() + 200
    while not (path.exists() and reached(path.read_bytes().splitlines())):
        assert process.is_running() and time.time() < deadline, process.output()
        time.sleep(0.002)
    process.kill()
    assert process.wait(0) == -signal.SIGKILL


def has_two_lines(lines: list[bytes]) -> bool:
    return len(lines) > 1


def has_step_8(lines: list[bytes]) -> bool:
    return bool(lines) and json.loads(lines[-1])["step"] >= 8


@every_script
def test_r36_a_killed_run_ends_with_the_same_bits_as_an_uninterrupted_one(
    script, whole_runs, tmp_path
):
    whole, _, flags = whole_runs(script)
    run = tmp_path / "run"
    stage = run_of(script).killed_in
    process = ScriptProcess(script, {**flags, "output_dir": run})
    kill_when(process, run / stage, has_two_lines)
    rows = len((whole / stage).read_text().splitlines())
    assert 1 < len((run / stage).read_bytes().splitlines()) < rows
    with (run / stage).open("a") as file:  # a line that the kill cut off (r34)
        file.write('{"id": "half a li')

    process = ScriptProcess(script, {"resume": run})
    kill_when(process, run / "metrics.jsonl", has_step_8)
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] in (5, 10)
    assert not (run / "model").exists()
    (run / "checkpoint.pt.partial").write_bytes(b"half a checkpoint")

    assert run_script(script, resume=run) == 0
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, weights(whole)[name]), name
    assert_same_metrics(run, whole, rel=0, abs=0)  # charts/tokens as well: it is counted
    for path in whole.glob("*.jsonl"):
        if path.name != "metrics.jsonl":
            # The batches of a stage may come in another order, with the same rows.
            lines = sorted(path.read_text().splitlines())
            assert lines == sorted((run / path.name).read_text().splitlines()), path.name


@every_script
def test_a_finished_run_that_is_resumed_says_so_and_stays_as_it_is(script, whole_runs, capsys):
    run, _, _ = whole_runs(script)
    before = contents(run)
    assert run_script(script, resume=run) == 0
    assert f"{run} is finished" in capsys.readouterr().out
    assert contents(run) == before


# ----------------------------------------------------------------------- r38: folders with a run
@every_script
def test_r38_a_folder_that_is_not_empty_is_refused(script, whole_runs, tmp_path, capsys):
    run, _, flags = whole_runs(script)
    before = contents(run)
    assert run_script(script, **flags, output_dir=run) == 2
    line = error_line(capsys)
    assert "--resume" in line and "--output_dir" in line and str(run) in line
    assert contents(run) == before

    other = tmp_path / "thesis"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    assert run_script(script, **flags, output_dir=other) == 2
    error_line(capsys)
    assert contents(other) == {"thesis.txt": b"years of work"}


@every_script
def test_a_resumed_run_takes_no_other_flag(script, whole_runs, capsys):
    run, _, _ = whole_runs(script)
    before = contents(run)
    assert run_script(script, resume=run, seed=2) == 2
    assert "no other flag" in error_line(capsys) and contents(run) == before


@every_script
def test_the_run_of_another_script_is_not_resumed(script, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    flags = {"student": "playground/student", "a_flag_of_another_script": 1}
    (run / "args.json").write_text(json.dumps(flags))
    before = contents(run)
    assert run_script(script, resume=run) == 2
    assert f"resume {run}" in error_line(capsys) and contents(run) == before


# ---------------------------------------------------------------------------------------- bad input
FEW = {"max_steps": 1, "eval_prompts": 2, "batch_size": 4}
GOOD = '{"prompt": "Name one fish.", "chosen": "cod.", "rejected": "whale."}'


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


def other_tokenizer(folder: Path) -> str:
    """A model whose tokenizer is not the playground's."""
    tokenizer = make_tokenizer(text="entirely other words make other merges " * 50)
    return save(folder / "other", tokenizer, make_model(len(tokenizer)))


# name: (flags, words in the error). A list of lines as a value is written to a file.
BAD = {
    "no such student": ({"student": "/no/student"}, "/no/student"),
    "no such teacher": ({"teacher": "/no/teacher"}, "/no/teacher"),
    "no such data": ({"data": "/no/data.jsonl"}, "/no/data.jsonl"),
    "no such held-out data": ({"eval_data": "/no/data.jsonl"}, "/no/data.jsonl"),
    "no such folder of data": ({"data": "/no/folder"}, "/no/folder"),
    "no data in the file": ({"data": []}, "there are no rows in"),
    "wrong columns": ({"data": ['{"question": "Who?"}']}, "row 1"),
    "a broken line": ({"data": [GOOD, GOOD, GOOD[:-9]]}, "line 3"),
    "a row of another kind": ({"data": [GOOD, "[1, 2]"]}, "row 2"),
    "nothing fits": ({"max_prompt_tokens": 1}, "no row left: 0 of "),
    "no held-out row": ({"eval_data": []}, "there are no rows in"),
    "another tokenizer": ({"teacher": other_tokenizer}, "different tokenizers"),
    "no such reward": ({"reward": "no.such:function"}, "no.such:function"),
    "negative learning rate": ({"learning_rate": -1}, "--learning_rate -1"),
    "no examples in a batch": ({"batch_size": 0}, "--batch_size 0"),
    "a file as folder": ({"output_dir": ["a thesis"]}, "Not a directory"),
    "a folder nobody can make": ({"output_dir": "/proc/run"}, "/proc/run"),
    "no such device": ({"device": "nonsense"}, "nonsense"),
}
# The methods whose teacher may have any tokenizer.
NOT_FOR = {("pad", "another tokenizer")}
# A reward model is not judged by a reward.
NOT_FOR.add(("rm_distiller", "no such reward"))
BAD_FOR_ADPA = {
    "no such reference": ({"teacher_ref": "/no/ref"}, "/no/ref"),
    "the student as reference": ({"teacher_ref": "playground/student"}, "aligned from"),
    "gamma is NaN": ({"gamma": math.nan}, "--gamma nan"),
    "bounds in the wrong order": ({"advantage_clip": (1, 0)}, "--advantage_clip"),
}
CASES = [("adpa", name) for name in BAD_FOR_ADPA]
for script in SCRIPTS:
    CASES += [(script, name) for name in BAD if (script, name) not in NOT_FOR]


def make_bad_flags(values: dict, folder: Path) -> dict:
    """Flags of BAD, with the files and models that they name made in `folder`."""
    flags = {}
    for name, value in values.items():
        if isinstance(value, list):
            value = write_lines(folder / f"{name}.jsonl", *value)
        elif callable(value):
            value = value(folder)
        flags[name] = value
    return flags


@pytest.mark.parametrize("script, case", CASES)
def test_r46_r47_bad_input_is_one_line_and_nothing_is_overwritten(script, case, tmp_path, capsys):
    values, expected = {**BAD, **BAD_FOR_ADPA}[case]
    run = tmp_path / "run"
    bad = make_bad_flags(values, tmp_path)
    flags = {**flags_of(script, tmp_path), **FEW, "output_dir": run, **bad}
    if case == "another tokenizer" and script == "adpa":
        flags["teacher_ref"] = flags["teacher"]
    before = contents(tmp_path)
    assert run_script(script, **flags) == 2
    assert expected in error_line(capsys)
    assert before.items() <= contents(tmp_path).items()
    assert not (run / "metrics.jsonl").exists()


@every_script
def test_r46_a_run_that_does_not_exist_is_not_resumed(script, capsys):
    assert run_script(script, resume="/no/run") == 2
    assert "/no/run" in error_line(capsys)


@pytest.mark.parametrize("script", one_short(["adpa", "dckd", "dpkd", "pad"], "dckd"))
def test_a_reward_function_that_raises_keeps_its_traceback(script, tmp_path):
    flags = {**flags_of(script, tmp_path), **FEW, "output_dir": tmp_path / "run"}
    with pytest.raises(ZeroDivisionError) as raised:
        run_script(script, **flags, reward="test_scripts:raises")
    assert raised.traceback[-1].name == "raises"
    assert "--reward test_scripts:raises" in " ".join(raised.value.__notes__)


def raises(prompts, responses):
    return 1 / 0


@every_script
def test_r47_unknown_flags_are_refused(script, tmp_path, capsys):
    assert run_script(script, output_dir=tmp_path / "run", no_such_flag=1) == 2
    err = capsys.readouterr().err
    assert "no_such_flag" in err and "Traceback" not in err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", one_short(SCRIPTS, "dpkd"))
def test_r33_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    script, tmp_path, capsys
):
    run = tmp_path / "run"
    flags = flags_of(script, tmp_path)
    flags |= {"learning_rate": 1e30, "save_every": 1, "log_every": 1}
    flags |= {"eval_every": 100, "eval_prompts": 2}
    assert run_script(script, **flags, output_dir=run) == 2
    line = error_line(capsys)
    loss, step, rows = re.search(r"error: loss (.*) in step (\d+) on rows (.*)", line).groups()
    assert re.search(r"\b(nan|inf)\b", loss)
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == int(step) > 0
    assert len(read_jsonl(run / "metrics.jsonl")) >= int(step) and not (run / "model").exists()

    # The rows are named by their places in the file.
    count = len(read_jsonl(flags["data"]))
    named = [int(number) for number in rows.split(", ")]
    assert named and all(1 <= number <= count for number in named)


@pytest.mark.parametrize("script, flag", [("adpa", "gamma"), ("dckd", "kl_chosen")])
def test_r33_a_gradient_that_is_not_finite_ends_the_run_as_well(script, flag, tmp_path, capsys):
    flags = {**flags_of(script, tmp_path), **FEW, "log_every": 1, flag: 1e37}
    assert run_script(script, **flags, output_dir=tmp_path / "run") == 2
    assert "step 0" in error_line(capsys)


# -------------------------------------------------------------------------------- scale of the loss
@pytest.mark.slow
@every_script
def test_r20_r22_r23_the_split_of_a_batch_changes_nothing(script, tmp_path):
    """Eight at once, 8 × 1, 4 × 2, and 3 + 3 + 2: losses, gradient norms and weights."""
    flags = flags_of(script, tmp_path)
    flags |= {"max_steps": 3, "batch_size": 8, "log_every": 1, "save_every": 1, "warmup_ratio": 0}
    flags |= {"eval_prompts": 4, "logits_chunk": 64, "max_grad_norm": 1e9}
    runs = {}
    for size in (8, 1, 2, 3):
        runs[size] = tmp_path / f"run{size}"
        assert run_script(script, **{**flags, "micro_batch_size": size}, output_dir=runs[size]) == 0
    for size in (1, 2, 3):
        assert_same_metrics(runs[size], runs[8], rel=2e-3, abs=2e-5)
        # Before any step the weights are equal, so that the losses differ by rounding alone.
        first = first_step_losses(runs[size])
        for key, value in first_step_losses(runs[8]).items():
            assert first[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (size, key)
        whole = weights(runs[8])
        for name, tensor in weights(runs[size]).items():
            assert (tensor - whole[name]).abs().max() < 1e-3, (size, name)


def first_step_losses(run: Path) -> dict[str, float]:
    """The losses that were logged after the first optimiser step."""
    row = next(row for row in read_jsonl(run / "metrics.jsonl") if row["step"])
    return {key: value for key, value in row.items() if key.startswith("losses/")}


@pytest.mark.parametrize("script", ["adpa", "dckd"])
def test_r21_a_ragged_last_batch_counts_every_example_once(script, tmp_path):
    """With a learning rate of 0, steps over 4 + 4 + 2 examples add up to one step over all ten."""
    flags = {
        "data": first_rows("train", 10, tmp_path),
        "learning_rate": 0,
        "log_every": 1,
        "eval_prompts": 2,
        "num_epochs": 2,
        "micro_batch_size": 3,
    }
    rows = {}
    for size in (10, 4):
        run = tmp_path / f"run{size}"
        assert run_script(script, **flags, batch_size=size, output_dir=run) == 0
        rows[size] = training_rows(run)
    epochs = [row["charts/epoch"] for row in rows[4]]
    assert epochs == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    for epoch in (0, 1):
        first, second, third = rows[4][3 * epoch : 3 * epoch + 3]
        whole = rows[10][epoch]
        for key in whole:
            if key.startswith("losses/"):
                mean = (4 * first[key] + 4 * second[key] + 2 * third[key]) / 10
                assert mean == pytest.approx(whole[key], rel=1e-5)
    totals = [row["losses/total"] for row in rows[4]]
    assert totals[:3] != pytest.approx(totals[3:], rel=1e-6)  # every epoch has its own order
    assert rows[4][2]["charts/tokens"] == rows[10][0]["charts/tokens"]


# ----------------------------------------------------------------------------- r27, r28: the models
@pytest.mark.slow
@every_script
def test_r27_r28_teachers_stay_frozen_and_dropout_stays_off(script, tmp_path, monkeypatch):
    """Every model that a run loads is looked at when the run is over."""
    loaded = []

    class Watched(LM):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            loaded.append(self)

    monkeypatch.setattr(common, "LM", Watched)
    student = tmp_path / "student"
    shutil.copytree(ROOT / "playground/student", student)
    config = json.loads((student / "config.json").read_text())
    config["attention_dropout"] = 0.5
    (student / "config.json").write_text(json.dumps(config))
    flags = {**flags_of(script, tmp_path), "max_steps": 2, "eval_prompts": 2, "log_every": 1}
    flags["student"] = student
    assert run_script(script, **flags, output_dir=tmp_path / "plain") == 0
    # Gradient checkpointing puts the student in train mode.
    flags["gradient_checkpointing"] = True
    assert run_script(script, **flags, output_dir=tmp_path / "checkpointed") == 0

    students = [lm for lm in loaded if lm.trainable]
    teachers = [lm for lm in loaded if not lm.trainable]
    assert {lm.path for lm in students} == {str(student)} and len(teachers) >= 2
    for lm in students:
        assert lm.config.attention_dropout == 0
        assert {parameter.dtype for parameter in lm.model.parameters()} == {torch.float32}  # r31
    for lm in teachers:
        assert not lm.model.training
        for parameter in lm.model.parameters():
            assert not parameter.requires_grad and parameter.grad is None
        state = lm.model.state_dict()
        for name, tensor in load_file(ROOT / lm.path / "model.safetensors").items():
            assert torch.equal(state[name], tensor.to(state[name].dtype))
    assert_same_metrics(tmp_path / "plain", tmp_path / "checkpointed", rel=1e-3, abs=1e-5)


@pytest.mark.slow
@every_script
def test_a_row_per_response_gives_the_same_losses(script, tmp_path, monkeypatch):
    """What an architecture without our mask gets: the layout is a matter of speed."""

    class RowPerResponse(LM):
        def check_packing(self):
            super().check_packing()
            self.share_prefix = False

    flags = {**flags_of(script, tmp_path), "max_steps": 2, "eval_prompts": 2, "log_every": 1}
    flags["eval_temperature"] = 0
    assert run_script(script, **flags, output_dir=tmp_path / "shared") == 0
    monkeypatch.setattr(common, "LM", RowPerResponse)
    assert run_script(script, **flags, output_dir=tmp_path / "alone") == 0
    assert_same_metrics(tmp_path / "shared", tmp_path / "alone", rel=1e-3, abs=1e-5)


# ----------------------------------------------------------------------------------------- tracking
@pytest.mark.slow
@every_script
def test_tensorboard_shows_the_metrics(script, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    flags = {**flags_of(script, tmp_path), "max_steps": 4, "eval_prompts": 2}
    assert run_script(script, **flags, track="tensorboard", output_dir=run) == 0
    events = EventAccumulator(str(run))
    events.Reload()
    for row in read_jsonl(run / "metrics.jsonl"):
        for key in row.keys() - {"step"}:
            [value] = [event.value for event in events.Scalars(key) if event.step == row["step"]]
            assert value == pytest.approx(row[key], rel=1e-5)


@pytest.mark.parametrize("track", ["wandb", "tensorboard"])
@pytest.mark.parametrize("package", ["wandb", "torch.utils.tensorboard"])
def test_a_package_for_tracking_that_is_missing_is_one_line_before_any_work(
    package, track, tmp_path, monkeypatch, capsys
):
    """A package that is there may lack another one, so it is imported."""
    for name in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.delitem(sys.modules, package)
    broken = tmp_path.joinpath(*package.split(".")).with_suffix(".py")
    broken.parent.mkdir(parents=True, exist_ok=True)
    broken.write_text("import nowhere_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.utils, "__path__", [str(broken.parent)])
    run = tmp_path / "run"
    if track == "tensorboard" and package == "wandb":
        common.check_flags(adpa.Args(track=track), [])
        return

    assert run_script("adpa", track=track, output_dir=run) == 2

    error = error_line(capsys)
    assert f"pip install {package.removeprefix('torch.utils.')} " in error
    assert "No module named 'nowhere_at_all'" in error
    assert not run.exists()


# ---------------------------------------------------------------------------------- the source text
def source(script: str) -> str:
    return (ROOT / f"{script}.py").read_text()


def flags_read_in(text: str) -> set[str]:
    """x of every `args.x` in a source text."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "args":
            names.add(node.attr)
    return names


# The classes of flags that Args inherits. Each is a group in --help.
FLAG_GROUPS = ["Method", "Optimisation", "ModelsAndData", "EvaluationAndOutput"]


@every_script
def test_r47_every_flag_is_read_and_every_flag_that_is_read_exists(script):
    fields = set()
    described = []
    for node in ast.parse(source(script)).body:
        if getattr(node, "name", "") in FLAG_GROUPS:
            fields |= {flag.target.id for flag in node.body if isinstance(flag, ast.AnnAssign)}
            described += [text for text in node.body if isinstance(text, ast.Expr)]
    read = flags_read_in(source(script))
    assert read <= fields
    # What a script does not read itself, common.py reads for it.
    assert fields <= read | flags_read_in((ROOT / "common.py").read_text())
    assert len(described) == len(fields)


@every_script
def test_a_script_has_the_order_that_readers_expect(script):
    """Docstring, imports, mathematics, Args, terms, main. Every loss stands where it is logged."""
    text = source(script)
    assert f"\n    python {script}.py\n" in ast.get_docstring(ast.parse(text))
    order = [
        "import torch",
        "- mathematics\n",
    ]
    order += [f"class {group}:\n" for group in FLAG_GROUPS]
    order += ["class Args(EvaluationAndOutput, ModelsAndData, Optimisation, Method):\n"]
    order += [f"def {script}_terms(", "def main(", "    for step in ", 'if __name__ == "__main__":']
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    for name in re.findall(r'values\["(losses/\w+)"\]', text):
        assert text.count(f'"{name}"') == 1
    assert 'values["losses/total"]' in text


def shared_flags(script: str) -> dict[str, str]:
    """{flag: its line and its help} of those of Optimisation and the groups below it."""
    text = source(script)
    start = text.index("class Optimisation:\n")
    end = text.index("class Args(", start)
    entries = re.findall(r'^    (\w+): (.*?""")$', text[start:end], re.M | re.S)
    return dict(entries)


# Flags that a script needs to have in its own words.
OWN_FLAGS = {
    "learning_rate": set(SCRIPTS),
    "eval_data": {"rm_distiller"},
}


@every_script
def test_flags_that_all_scripts_share_have_not_drifted(script):
    expected = flags_it_has(script, shared_flags("adpa"))
    flags = shared_flags(script)
    assert len(flags) > 24 and list(flags) == list(expected)
    for name, entry in flags.items():
        if script not in OWN_FLAGS.get(name, set()):
            assert entry == expected[name], f"--{name} is not what it is in adpa.py"
